"""Adapters of runs and files: their strengths, several together, training that starts from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tests import tiny
from tests.models import test_lora_files
from worldr1_jax import settings
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import lora_files
from worldr1_jax.nn import lora
from worldr1_jax.policies import adapters as trained
from worldr1_jax.policies import wan
from worldr1_jax.workdir.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def folder(weights):
    return weights


@pytest.fixture(scope="module")
def one():
    """A mesh of one device."""
    return make_mesh({}, jax.devices()[:1])


def test_adapters_are_joined_by_strength_and_grown_for_training(tmp_path):
    rng = np.random.default_rng(0)

    def adapter(rank, scale):
        halves = rng.normal(size=(2, 6, rank)), rng.normal(size=(2, rank, 5))
        return lora.Adapter(*(half.astype(np.float32) for half in halves), scale)

    def product(found):
        return found.scale * np.asarray(found.a) @ np.asarray(found.b)

    one, two = {"x": adapter(3, 0.5), "y": adapter(1, 1.0)}, {"x": adapter(2, 4.0)}
    both = lora.joined([(one, 0.7), (two, -2.0)])
    want = 0.7 * product(one["x"]) - 2 * product(two["x"])
    np.testing.assert_allclose(product(both["x"]), want, atol=1e-5)  # float32 sums of five
    np.testing.assert_allclose(product(both["y"]), 0.7 * product(one["y"]), atol=1e-6)

    fresh = {"x": adapter(4, 2.0), "y": adapter(4, 2.0), "z": adapter(4, 2.0)}
    fresh = {path: found._replace(b=0 * found.b) for path, found in fresh.items()}
    grown = lora.grown(fresh, one)
    for path in ("x", "y"):
        np.testing.assert_allclose(product(grown[path]), product(one[path]), atol=1e-5)
        assert grown[path].a.shape == (2, 6, 4) and grown[path].scale == 2
    np.testing.assert_array_equal(grown["x"].a[..., 3], fresh["x"].a[..., 3])  # can be trained
    assert not np.any(product(grown["z"]))
    with pytest.raises(ValueError, match=r"have rank 3 on 'x': policy\.lora_rank is 2"):
        lora.grown({"x": adapter(2, 1.0), "y": adapter(1, 1.0)}, one)
    with pytest.raises(ValueError, match="have 'y', which is not trained"):
        lora.grown({"x": fresh["x"]}, one)


def test_the_strength_of_an_adapter(tmp_path):
    (tmp_path / "a:3").mkdir()
    for spec, want in (
        ("a.safetensors", ("a.safetensors", 1)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("runs/b:-1", ("runs/b", -1)),
        (f"{tmp_path}/a:3", (f"{tmp_path}/a:3", 1)),
        (f"{tmp_path}/a:3:0.5", (f"{tmp_path}/a:3", 0.5)),
        ("C:x", ("C:x", 1)),
    ):
        assert trained.strength_of(spec) == want
    for text in ("nan", "inf", "-inf", "1e999"):
        with pytest.raises(ValueError, match="it has to be finite"):
            trained.strength_of(f"a:{text}")


def of_run(folder, width=16, alpha=8.0, value=1.0):
    """A workdir with adapters of a network of this width."""
    halves = jnp.full((3, width, 4), value), jnp.ones((3, 4, width))
    leaves = dict(zip(("lora_a", "lora_b"), halves, strict=True))
    state = {"ema": {"blocks": {"attn1": {"to_q": leaves}}}}
    with Checkpointer(folder, config={"policy": {"lora_alpha": alpha}}) as checkpoints:
        checkpoints.save(1, state, data={}, meta={})
    return str(folder)


@pytest.mark.parametrize(
    "run, words",
    [
        (
            {"width": 32},
            r"is of another network: the adapter of 'blocks\.attn1\.to_q' is \[3, 32, 4",
        ),
        ({"alpha": 10**400}, "has no config.json of a run"),
        ({"value": np.nan}, "has numbers that are not finite"),
    ],
)
def test_adapters_of_a_run_that_are_none_of_this_network(tmp_path, run, words):
    with pytest.raises(ValueError, match=words):
        trained.load_all([of_run(tmp_path, **run)], test_lora_files.CONFIG)


@pytest.mark.parametrize("read", [trained.load_all, trained.read_all])
def test_a_strength_beyond_float32_is_refused(tmp_path, read):
    save_file(test_lora_files.comfy(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not finite in float32, as they are or by their strength"):
        read([f"{tmp_path}/x.safetensors:1e39"], test_lora_files.CONFIG)


def test_a_difference_times_its_strength_is_finite_too(tmp_path):
    difference = {"diffusion_model.patch_embedding.diff_b": np.ones(16, np.float32)}
    save_file(difference, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"'patch_embedding\.bias' has numbers that are not finite"
    ):
        trained.read_all([f"{tmp_path}/x.safetensors:1e39"], test_lora_files.CONFIG)


def test_a_sum_that_its_dtype_does_not_hold_is_not_stored(folder, one, tmp_path):
    given = {"blocks.attn1.to_q": lora.Adapter(np.ones((2, 32, 1)), np.ones((2, 1, 32)), 1e5)}
    with pytest.raises(ValueError, match=r"in float16: 'blocks\.attn1\.to_q\.kernel' holds"):
        wan.store(folder, tmp_path / "new", mesh=one, dtype=jnp.float16, adapters=given)


def test_training_can_start_from_adapters(folder, one):
    """In the config's rank and scale, with the function that they had."""
    given = {"blocks.attn1.to_q": lora.Adapter(np.ones((2, 32, 1)), np.ones((2, 1, 32)), 0.5)}
    model = wan.load(folder, mesh=one, tokens=8, lora_rank=4, lora_alpha=8.0, adapters=given)
    found = lora.adapters(model.networks[wan.POLICY])
    assert len(found) == 8 and {a.scale for a in found.values()} == {2.0}
    q = found["blocks.attn1.to_q"]
    np.testing.assert_allclose(2 * q.a @ q.b, np.full((2, 32, 32), 0.5), rtol=1e-6)
    assert not np.any(found["blocks.attn2.to_k"].b) and np.any(found["blocks.attn2.to_k"].a)


def test_adapters_may_be_where_the_prompt_enters_alone(folder, one):
    model = wan.load(folder, mesh=one, tokens=8, lora_rank=2, lora_layers="cross")
    found = lora.adapters(model.networks[wan.POLICY])
    assert set(found) == {f"blocks.attn2.to_{name}" for name in ("q", "k", "v", "out")}
    outside = {"blocks.attn1.to_q": lora.Adapter(np.ones((2, 32, 1)), np.ones((2, 1, 32)), 0.5)}
    with pytest.raises(ValueError, match=r"have 'blocks\.attn1\.to_q', which is not trained"):
        wan.load(folder, mesh=one, tokens=8, lora_rank=2, lora_layers="cross", adapters=outside)


def test_training_starts_from_the_adapters_that_the_config_names(weights, tmp_path):
    """The policy is that of the file, in the run's own rank; without one it is the base."""
    network = wan_dit.read_config(weights / "transformer")
    shapes = nnx.eval_shape(lambda: wan_dit.WanDiT(network, nnx.Rngs(0)))
    rng, given = np.random.default_rng(0), {}
    for path, linear in lora.linears(shapes).items():
        if path.startswith("blocks.attn1.to_q"):
            *stack, fan_in, fan_out = linear.kernel.shape
            halves = ((*stack, fan_in, 2), (*stack, 2, fan_out))
            given[path] = lora.Adapter(
                *(rng.normal(size=shape).astype(np.float32) for shape in halves), 1.0
            )
    lora_files.save(given, tmp_path / "lora")
    changes = {"policy.adapters": str(tmp_path / "lora"), "mesh.data": 8}
    found = settings.read(tiny.config(weights, **changes))
    pipeline = settings.build_pipeline(found, settings.make_mesh(found), jax.random.key(0))
    ((path, want),) = given.items()
    got = lora.from_state(pipeline.adapters, found.policy.lora_alpha)[path]
    assert got.a.shape[-1] == found.policy.lora_rank
    product = got.scale * np.asarray(got.a) @ np.asarray(got.b)
    np.testing.assert_allclose(product, want.scale * want.a @ want.b, atol=1e-4)
