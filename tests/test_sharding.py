"""Tables of rules: complete, used, and equal results on any mesh."""

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from worldr1_jax import sharding
from worldr1_jax.models import da3, lora, umt5, wan_dit, wan_vae

NETWORKS = {
    "wan_dit": lambda: wan_dit.WanDiT(wan_dit.Config.nano(), nnx.Rngs(0)),
    "umt5": lambda: umt5.UMT5Encoder(umt5.Config.nano(), nnx.Rngs(0)),
    "wan_vae": lambda: wan_vae.WanVAE(wan_vae.Config.nano(), nnx.Rngs(0)),
    "da3": lambda: da3.DA3(da3.Config.nano(), nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_leaf_has_a_rule_and_every_rule_a_leaf(name):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    state = nnx.state(nnx.eval_shape(NETWORKS[name]))
    placed = jax.tree.leaves(sharding.shardings_of(state, name, mesh))
    assert len(placed) == len(jax.tree.leaves(state))


@pytest.mark.parametrize("preset", [wan_dit.Config.wan_1_3b, wan_dit.Config.wan_14b])
def test_published_sizes_are_split_over_fsdp_and_tensor(preset):
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    model = nnx.eval_shape(lambda: wan_dit.WanDiT(preset(), nnx.Rngs(0)))
    placed = dict(nnx.to_flat_state(sharding.shardings_of(nnx.state(model), "wan_dit", mesh)))
    kernel = placed[("blocks", "ffn", "linear_1", "kernel")]
    assert kernel.get_raw_value().spec == P(None, "fsdp", "tensor")


def test_adapters_follow_their_kernels():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    model = lora.add(NETWORKS["wan_dit"](), 4, 8.0, nnx.Rngs(1))
    sharding.place(model, "wan_dit", mesh)
    assert model.blocks.attn1.to_q.lora_a[...].sharding.spec == P(None, "fsdp", None)
    assert model.blocks.attn1.to_q.kernel[...].sharding.spec == P(None, "fsdp", "tensor")


def test_unmatched_leaves_and_unused_rules_are_errors(monkeypatch):
    mesh = sharding.make_mesh({"data": 8})
    state = nnx.state(nnx.eval_shape(NETWORKS["umt5"]))
    monkeypatch.setitem(sharding.RULES, "umt5", sharding.RULES["umt5"][:-1])
    with pytest.raises(ValueError, match="no sharding rule matches the leaf"):
        sharding.shardings_of(state, "umt5", mesh)
    monkeypatch.setitem(
        sharding.RULES, "umt5", (*sharding.RULES["umt5"], (".*", ()), ("ghost", ()))
    )
    with pytest.raises(ValueError, match="the sharding rule 'ghost'"):
        sharding.shardings_of(state, "umt5", mesh)


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
        sharding.make_mesh(sizes)
