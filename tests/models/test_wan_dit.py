"""The Wan2.1 DiT and its LoRA without torch: golden, remat, adapters, errors, files."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import goldens
from tests.goldens.make_wan_dit import PATH
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.nn import attention_kernels, layers, lora, rotary
from worldr1_jax.nn.attention import attention


@pytest.fixture(scope="module")
def golden():
    return goldens.read(PATH)


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """The golden's network, in the files that diffusers' save_pretrained wrote."""
    folder = tmp_path_factory.mktemp("wan_dit")
    return goldens.publish(golden, folder, "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def inputs(golden):
    return tuple(jnp.asarray(golden[name]) for name in ("latents", "timestep", "text"))


@pytest.fixture(scope="module")
def base_velocity(published, inputs):
    return run(wan_dit.load(published), *inputs)


@pytest.fixture(scope="module")
def lora_velocity(published, inputs):
    return run(with_lora(published), *inputs)


def run(model, *inputs, **kwargs):
    """One jitted call."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda s, *a: nnx.merge(graphdef, s)(*a, **kwargs))(state, *inputs)


def with_lora(path, **kwargs):
    """The golden's network with adapters whose B is not zero."""
    model = lora.add(wan_dit.load(path, **kwargs), 3, 6.0, nnx.Rngs(1))
    key = jax.random.key(2)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.LoRAParam):
            key, used = jax.random.split(key)
            node[...] = 0.1 * jax.random.normal(used, node.shape)
    return model


def test_golden_of_diffusers(golden, base_velocity):
    velocity, expected = base_velocity, golden["velocity"]
    assert velocity.dtype == jnp.float32 and velocity.shape == expected.shape
    # float32 sums in another order
    assert np.abs(velocity - expected).max() <= 1e-4 * expected.std()


def test_bfloat16_is_near_float32(golden, published, inputs):
    model = wan_dit.load(published, dtype=jnp.bfloat16)
    assert model.blocks.attn1.to_q.kernel.dtype == jnp.bfloat16
    assert model.blocks.norm2.scale.dtype == jnp.float32
    velocity = run(model, *inputs)
    assert velocity.dtype == jnp.float32
    # 8 bits of mantissa through two layers
    assert np.sqrt(np.mean((velocity - golden["velocity"]) ** 2)) <= 0.03 * golden["velocity"].std()


@pytest.fixture(scope="module")
def plain_gradient(published, inputs):
    """That of the adapters, with nothing recomputed."""
    return gradient_with("none", published, inputs)


def gradient_with(remat, published, inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernels, "LONG", 1)  # so that "attention" has something to keep
        model = with_lora(published, remat=remat, implementation="blocks")
        graphdef, adapters, base = nnx.split(model, nnx.LoRAParam, ...)

        def loss(adapters, base):
            return jnp.square(nnx.merge(graphdef, adapters, base)(*inputs)).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(adapters, base))


@pytest.mark.parametrize(
    "remat",
    [
        name if name in ("attention", "whole") else pytest.param(name, marks=pytest.mark.slow)
        for name in layers.REMAT_POLICIES[1:]
    ],
)
def test_remat_changes_no_gradient(remat, published, inputs, plain_gradient):
    assert len(plain_gradient) == 16  # A and B of q, k, v, o, twice
    for got, want in zip(gradient_with(remat, published, inputs), plain_gradient, strict=True):
        # the same float32 sums, fused otherwise
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_fresh_adapters_change_nothing(published, inputs, base_velocity):
    model = lora.add(wan_dit.load(published), 4, 8.0, nnx.Rngs(0))
    np.testing.assert_array_equal(run(model, *inputs), base_velocity)
    _, adapters, _ = nnx.split(model, nnx.LoRAParam, ...)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert model.blocks.attn2.to_v.lora_a.shape == (2, 32, 4)
    assert model.blocks.ffn.linear_1.lora_a is None


def test_adapters_false_is_the_base_network(published, inputs, base_velocity, lora_velocity):
    without = run(with_lora(published), *inputs, adapters=False)
    np.testing.assert_array_equal(without, base_velocity)
    assert np.abs(lora_velocity - base_velocity).max() > 0.01


def test_merge_folds_the_adapters_in(published, inputs, lora_velocity, tmp_path):
    model = lora.merge(with_lora(published))
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    wan_dit.save(model, tmp_path)
    got = run(wan_dit.load(tmp_path), *inputs)
    # float32 sums in another order
    np.testing.assert_allclose(got, lora_velocity, atol=1e-4 * float(lora_velocity.std()))


def test_lora_targets(published):
    model = lora.add(wan_dit.load(published), 2, 2.0, nnx.Rngs(0), targets=[r".*attn1\.to_q"])
    assert len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == 2
    with pytest.raises(ValueError, match="already has LoRA"):
        lora.add(model, 2, 2.0, nnx.Rngs(0))
    with pytest.raises(ValueError, match="'nothing' matches no linear layer"):
        lora.add(model, 2, 2.0, nnx.Rngs(0), targets=["nothing"])
    with pytest.raises(ValueError, match="rank is 0"):
        lora.add(model, 0, 2.0, nnx.Rngs(0))


@pytest.mark.parametrize(
    "preset, parameters",
    # the counts of the published files
    [("wan_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584)],
)
def test_published_sizes_without_memory(preset, parameters):
    config = getattr(wan_dit.Config, preset)()
    model = nnx.eval_shape(lambda: wan_dit.WanDiT(config, nnx.Rngs(0), param_dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters
    names = [row[0] for row in wan_dit.table(config)]
    assert len(names) == len(set(names))
    out = jax.eval_shape(
        lambda m, *a: m(*a),
        model,
        jax.ShapeDtypeStruct((1, 21, 60, 104, 16), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32),
    )
    assert out.shape == (1, 21, 60, 104, 16)


def test_nano_starts_at_zero_and_learns():
    arguments = jnp.ones((1, 1, 4, 2, 16)), jnp.array([500.0]), jnp.ones((1, 3, 128))

    @jax.jit
    def loss_and_gradient():
        graphdef, state = nnx.split(wan_dit.WanDiT(wan_dit.Config.nano(), nnx.Rngs(0)))

        def loss(state):
            return jnp.square(nnx.merge(graphdef, state)(*arguments) - 1).mean()

        value, gradient = jax.value_and_grad(loss)(state)
        return value, gradient["proj_out"]["kernel"][...]

    loss, gradient = loss_and_gradient()
    assert loss == 1 and np.any(gradient)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents": (2, 3, 5, 6, 4)}, "multiples of the patch size"),
        ({"latents": (2, 3, 4, 6, 5)}, r"have to be \[B, f, h, w, 4\]"),
        ({"timestep": (2, 1)}, r"it has to be \[2\]"),
        ({"text": (2, 5, 11)}, r"it has to be \[2, N, 12\]"),
        ({"latents": (2, 1025, 2, 2, 4)}, "rope_max_seq_len = 1024"),
    ],
)
def test_shapes_that_do_not_fit(published, change, message):
    shapes = {"latents": (2, 3, 4, 6, 4), "timestep": (2,), "text": (2, 5, 12), **change}
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes.values()]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(wan_dit.load(published), *arguments)


def test_config_round_trip_and_refusals(golden):
    values = json.loads(str(golden["config"]))
    config = wan_dit.Config.from_dict(values)
    assert wan_dit.Config.from_dict(config.to_dict()) == config
    ours = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    assert ours == {k: v for k, v in values.items() if not k.startswith("_")}
    for field, value in (("image_dim", 1280), ("added_kv_proj_dim", 5120), ("qk_norm", "layer")):
        with pytest.raises(ValueError, match=field):
            wan_dit.Config.from_dict({**values, field: value})


def test_config_of_the_original_release():
    # config.json of Wan2.1-T2V-1.3B
    values = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": 1536,
        "eps": 1e-06,
        "ffn_dim": 8960,
        "freq_dim": 256,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": 12,
        "num_layers": 30,
        "out_dim": 16,
        "text_len": 512,
    }
    assert wan_dit.Config.from_dict(values) == wan_dit.Config.wan_1_3b()
    with pytest.raises(ValueError, match="'i2v'"):
        wan_dit.Config.from_dict({**values, "model_type": "i2v"})
    with pytest.raises(ValueError, match="'window'"):
        wan_dit.Config.from_dict({**values, "window": 3})


def test_unknown_names_are_refused(published):
    with pytest.raises(ValueError, match="remat is 'half'"):
        wan_dit.load(published, remat="half")
    q = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="'fast' is unknown"):
        attention(q, q, q, implementation="fast")


def test_attention_mask_bias_and_callable():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 4))
    mask = jnp.array([True, True, False, True, False])
    got = attention(q, k, v, mask)
    np.testing.assert_allclose(
        got, attention(q, k[:, mask], v[:, mask]), rtol=1e-5, atol=1e-6
    )  # float32 rounding
    bias = jnp.where(mask, 0.0, -jnp.inf)
    np.testing.assert_allclose(got, attention(q, k, v, bias=bias), rtol=1e-5, atol=1e-6)
    seen = attention(q, k, v, implementation=lambda q, k, v, mask, *, bias, scale: v * scale)
    np.testing.assert_array_equal(seen, v * 0.5)


def test_rotary_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 16))
    cos, sin = rotary.tables((4, 1, 5), 16)
    turned = [rotary.rotate(jnp.tile(x, (1, 20, 1, 1)), cos, sin).reshape(4, 5, 16) for x in (q, k)]
    scores = jnp.einsum("fwd,gxd->fwgx", *turned)
    # float32 rounding of sums of 16 terms
    np.testing.assert_allclose(scores[0, 1, 2, 4], scores[1, 0, 3, 3], atol=1e-5)
    np.testing.assert_allclose(scores[3, 3, 1, 1], scores[2, 4, 0, 2], atol=1e-5)
    np.testing.assert_allclose(scores[2, 2, 2, 2], q @ k, atol=1e-5)
    assert abs(scores[0, 0, 1, 0] - scores[0, 0, 0, 1]) > 1e-3


@pytest.mark.parametrize("videos", [1, 2])
def test_rows_scale_the_tokens_of_their_video(videos):
    x, grad = jax.random.normal(jax.random.key(0), (2, videos, 5, 4))
    row = jax.random.normal(jax.random.key(1), (videos, 1, 4))
    out, back = jax.vjp(layers.times_row, x, row)
    np.testing.assert_array_equal(out, x * row)
    d_x, d_row = back(grad)
    np.testing.assert_array_equal(d_x, grad * row)
    np.testing.assert_allclose(d_row, (grad * x).sum(1, keepdims=True), rtol=1e-6, atol=1e-6)


def test_tokens_are_rows_of_one_matrix_unless_a_mesh_divides_them():
    x = jnp.zeros((2, 3, 4))
    assert layers.as_matrix(x).shape == (6, 4)
    assert layers.as_matrix(x[0, 0]).shape == (4,)
    with arrays.on(make_mesh({"data": 1}, jax.devices()[:1])):
        assert layers.as_matrix(x).shape == (6, 4)
    with arrays.on(make_mesh({"data": 2}, jax.devices()[:2])):
        assert layers.as_matrix(x).shape == (2, 3, 4)
