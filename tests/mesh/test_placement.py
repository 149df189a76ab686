"""Tables of rules: complete, used, and equal results on any mesh."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from configs import world
from worldr1_jax import settings
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh import make as meshes
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import AXES, default_sizes, make_mesh
from worldr1_jax.models import clip, umt5
from worldr1_jax.models.da3 import model as da3
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nn import lora

NETWORKS = {
    "wan_dit": lambda: wan_dit.WanDiT(wan_dit.Config.nano(), nnx.Rngs(0)),
    "umt5": lambda: umt5.UMT5Encoder(umt5.Config.nano(), nnx.Rngs(0)),
    "wan_vae": lambda: wan_vae.WanVAE(wan_vae.Config.nano(), nnx.Rngs(0)),
    "da3": lambda: da3.DA3(da3.Config.nano(), nnx.Rngs(0)),
    "clip": lambda: clip.CLIP(clip.Config.nano(64, 1), nnx.Rngs(0)),
}


PLACES = {
    "wan_dit": wan_dit.PLACES,
    "umt5": umt5.PLACES,
    "wan_vae": wan_vae.PLACES,
    "da3": da3.PLACES,
    "clip": clip.PLACES,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_leaf_has_a_rule_and_every_rule_a_leaf(name):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    state = nnx.state(nnx.eval_shape(NETWORKS[name]))
    placed = jax.tree.leaves(sharding.shardings_of(state, PLACES[name], mesh))
    assert len(placed) == len(jax.tree.leaves(state))


@pytest.mark.parametrize("preset", [wan_dit.Config.wan_1_3b, wan_dit.Config.wan_14b])
def test_published_sizes_are_split_over_fsdp_and_tensor(preset):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model = nnx.eval_shape(lambda: wan_dit.WanDiT(preset(), nnx.Rngs(0)))
    placed = dict(nnx.to_flat_state(sharding.shardings_of(nnx.state(model), wan_dit.PLACES, mesh)))
    kernel = placed[("blocks", "ffn", "linear_1", "kernel")]
    assert kernel.get_raw_value().spec == P(None, "fsdp", "tensor")


def test_weights_adapters_and_moments_fall_as_devices_grow():
    """From 16 to 256 devices, and whether a video lies on one or on eight."""
    model = nnx.eval_shape(
        lambda: wan_dit.WanDiT(
            wan_dit.Config.wan_14b(), nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
        )
    )
    lora.add(model, 32, 64.0, nnx.Rngs(1))
    each = {}
    for devices in (16, 256):
        for context in (1, 8):
            shape = (1, devices // context, context, 1)
            mesh = jax.sharding.AbstractMesh(
                shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4
            )
            total = 0
            for kind, table, copies in (
                (
                    nnx.LoRAParam,
                    wan_dit.ADAPTER_PLACES,
                    4,
                ),  # with both moments of Adam and the average
                (nnx.Not(nnx.LoRAParam), wan_dit.PLACES, 1),
            ):
                state = nnx.state(model, nnx.All(nnx.Param, kind))
                places = sharding.shardings_of(state, table, mesh)
                for leaf, place in zip(
                    jax.tree.leaves(state), jax.tree.leaves(places), strict=True
                ):
                    part = math.prod(place.shard_shape(leaf.shape))
                    total += copies * part * leaf.dtype.itemsize
            each[devices, context] = total
    assert each[16, 1] == each[16, 8] and each[256, 1] == each[256, 8]
    # Norms, biases and modulation tables, 16 MB, are whole on each; the rest is 30.7 GB.
    for devices in (16, 256):
        assert each[devices, 1] == pytest.approx(30.7e9 / devices + 16.2e6, rel=0.01)


def test_adapters_follow_their_kernels():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model = lora.add(NETWORKS["wan_dit"](), 4, 8.0, nnx.Rngs(1))
    sharding.place(model, wan_dit.PLACES, mesh)
    sharding.place(model, wan_dit.ADAPTER_PLACES, mesh, sharding.ADAPTERS)
    assert model.blocks.attn1.to_q.lora_a[...].sharding.spec == P(None, "fsdp", None)
    assert model.blocks.attn1.to_q.lora_b[...].sharding.spec == P(None, None, ("tensor", "fsdp"))
    assert model.blocks.attn1.to_q.kernel[...].sharding.spec == P(None, "fsdp", "tensor")


def test_unmatched_leaves_and_unused_rules_are_errors():
    mesh = make_mesh({"data": 8})
    state = nnx.state(nnx.eval_shape(NETWORKS["umt5"]))
    with pytest.raises(ValueError, match="no sharding rule matches the leaf"):
        sharding.shardings_of(state, umt5.PLACES[:-1], mesh)
    with pytest.raises(ValueError, match="the sharding rule 'ghost'"):
        sharding.shardings_of(state, (*umt5.PLACES[:-1], (".*", ()), ("ghost", ())), mesh)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 2}, "axis 'model'"),
        ({"data": -1, "fsdp": -1}, "at most one"),
        ({"data": 3}, "needs 3 devices"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


def _devices(platform, count, slices=1):
    made = []
    for i in range(count):
        device = types.SimpleNamespace(platform=platform, id=i, process_index=0)
        device.slice_index = i * slices // count
        made.append(device)
    return made


def test_default_meshes_suit_the_devices():
    tpu, sizes = _devices("tpu", 64), default_sizes
    assert sizes(tpu, 384, 40) == {"data": 1, "fsdp": 64, "context": 1, "tensor": 1}
    # As many devices a video as the machine has more than videos, or as its memory asks for.
    assert sizes(tpu, 32, 40)["context"] == 2
    assert sizes(tpu, 384, 40, least_context=3)["context"] == 4
    two = sizes(_devices("tpu", 64, slices=2), 384, 40)
    assert two == {"data": 2, "fsdp": 32, "context": 1, "tensor": 1}
    three = sizes(_devices("tpu", 192), 384, 40)  # 192 divides no width
    assert three == {"data": 3, "fsdp": 64, "context": 1, "tensor": 1}
    assert sizes(_devices("cpu", 8), 12, 4) == {"data": 4, "fsdp": 1, "context": 2, "tensor": 1}
    with pytest.raises(ValueError, match=r"7 videos, .* do not divide over 64 devices"):
        sizes(tpu, 7, 40)


def test_slices_lie_along_data(monkeypatch):
    placed = []
    monkeypatch.setattr(meshes, "Mesh", lambda array, *_, **__: placed.append(array))
    monkeypatch.setattr(meshes, "_torus", lambda shape, d: np.array(d, object).reshape(shape))
    make_mesh({"data": 2, "fsdp": 4}, _devices("tpu", 8, slices=2))
    assert {d.slice_index for d in placed[0][0].flat} == {0}
    assert {d.slice_index for d in placed[0][1].flat} == {1}
    with pytest.raises(ValueError, match="data has to be a multiple"):
        make_mesh({"data": 1, "fsdp": 8}, _devices("tpu", 8, slices=2))


def test_activations_are_placed_by_what_their_axes_are():
    mesh = make_mesh({"fsdp": 4, "context": 2})
    x = jnp.zeros((8, 6, 3))
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda x: sharding.constrain(x, "videos", "tokens", "features"))(x)
    assert placed.sharding.shard_shape(x.shape) == (2, 3, 3)
    with pytest.raises(ValueError, match="do not describe"):
        sharding.constrain(x, "videos", "pixels", None)
    with pytest.raises(ValueError, match="do not describe"):
        sharding.constrain(x, "videos")


def test_networks_rest_on_the_hosts_and_come_back_to_their_shards():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model = lora.add(NETWORKS["wan_dit"](), 4, 8.0, nnx.Rngs(1))
    sharding.place(model, wan_dit.PLACES, mesh)
    before = nnx.to_pure_dict(nnx.state(model))
    arrays.rest(model)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))}
    assert kinds == {"device"}
    base = nnx.state(model, nnx.Not(nnx.LoRAParam))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(base)} == {arrays.HOST}
    woken = nnx.to_pure_dict(arrays.awake(nnx.state(model)))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(woken), strict=True):
        assert new.sharding == old.sharding
        np.testing.assert_array_equal(old, new)
    # Awake copies are the caller's: the network itself goes on resting.
    assert model.blocks.ffn.linear_1.kernel[...].sharding.memory_kind == arrays.HOST


def test_moments_lie_where_their_adapters_do():
    """Not whole on every device, as zeros that depend on no input would."""
    config = world.get_config("nano")
    with config.unlocked():
        config.mesh.data, config.mesh.fsdp = 1, 4
    found = settings.read(config)
    mesh = settings.make_mesh(found, jax.devices()[:4])
    pipeline = settings.build_pipeline(found, mesh, jax.random.key(0))
    state = settings.make_state(found, pipeline)
    described = settings.described_state(found, pipeline)
    assert all(
        a.sharding.is_equivalent_to(b.sharding, a.ndim)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(described), strict=True)
    )
    split = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(state.adapters)}
    assert any(not place.is_fully_replicated for place in split.values())
    beside = jax.tree.leaves((state.opt_state, state.ema, state.algorithm))
    assert sum(leaf.shape in split for leaf in beside) == 4 * len(jax.tree.leaves(state.adapters))
    assert all(
        leaf.sharding.is_equivalent_to(split[leaf.shape], leaf.ndim)
        for leaf in beside
        if leaf.shape in split
    )
