"""Every implementation of attention against the plain one, forward and backward, on any mesh."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.mesh import arrays
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.nn import attention as attn
from worldr1_jax.nn import attention_context, attention_kernels, layers

TOKENS = 37  # divides nothing
HEADS, WIDTH = 4, 16
MESHES = {"context": {"data": 2, "context": 4}, "mixed": {"fsdp": 2, "context": 2, "tensor": 2}}
# float32, other orders of summation over 37 keys of values near 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _inputs(width=WIDTH):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, (2, TOKENS, HEADS, width)) for k in keys]


def _value_and_grads(implementation, inputs, mesh):
    q, k, v, target = inputs

    def loss(q, k, v):
        size = attn.padded(TOKENS, implementation)
        pad = ((0, 0), (0, size - TOKENS), (0, 0), (0, 0))
        # Padding that is not zero, so that one that is looked at shows.
        padded = [jnp.pad(x, pad, constant_values=2.0) for x in (q, k, v)]
        out = attn.attention(*padded, length=TOKENS, implementation=implementation)
        return jnp.sum(out[:, :TOKENS] * target), out[:, :TOKENS]

    with arrays.on(mesh):
        call = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (_, out), grads = call(q, k, v)
    return jax.tree.map(np.asarray, (out, *grads))


def _compare(implementation, mesh, width=WIDTH):
    inputs = _inputs(width)
    one = make_mesh({"data": 1}, jax.devices()[:1])
    want = _value_and_grads("xla", inputs, one)
    got = _value_and_grads(implementation, inputs, mesh)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", ["ulysses:blocks", "ring:blocks", "blocks"])
def test_exchanges_equal_the_reference(name, sizes):
    mesh = make_mesh(MESHES[sizes])
    implementation = attn.build(name, device_kind="cpu")
    if name.startswith("ulysses") or name == "ring:blocks":
        small = attention_kernels.Blocks(logits_bytes=4 * 2 * HEADS * 40 * 16)  # several blocks
        implementation = attention_context.Sharded(small, implementation.context)
    _compare(implementation, mesh)


@pytest.mark.parametrize("context", ["ulysses", "ring", None])
def test_blocks_of_one_head_equal_the_reference(context):
    """37 tokens in blocks of 16, the last one padded; heads over `tensor`, or no mesh at all."""
    kernel = attention_kernels.Blocks(rows=16)
    if context:
        mesh = make_mesh(MESHES["mixed"])
        return _compare(attention_context.Sharded(kernel, context), mesh)
    *inputs, target = _inputs()

    @functools.partial(jax.jit, static_argnums=0)
    def pull(implementation):
        call = functools.partial(attn.attention, length=TOKENS - 4, implementation=implementation)
        out, back = jax.vjp(call, *inputs)
        return out, *back(target)

    got, want = pull(attention_context.Sharded(kernel)), pull("xla")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)


def test_zeros_behind_the_last_block_of_keys_are_no_keys():
    """All 37 keys are real, and logits are so low that a zero key would overflow the softmax."""
    q, _, v, target = _inputs()
    q = jnp.abs(q)
    grads = []
    for kernel in (attention_context.Sharded(attention_kernels.Blocks(rows=16)), "xla"):
        call = functools.partial(attn.attention, implementation=kernel)
        grads.append(jax.jit(lambda *x, c=call: jax.vjp(c, *x)[1](target))(q, -100.0 * q, v))
    for a, b in zip(*grads, strict=True):
        # logits of hundreds, in float32: under jax 0.12 they differ by up to 5.7e-4
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_devices_loop_over_their_own_heads():
    """Heads over `tensor` are not gathered, and each device's loop is over its part of them."""
    q, k, v, _ = _inputs()
    mesh = make_mesh({"tensor": 4}, jax.devices()[:4])
    blocks = attention_context.Sharded(attention_kernels.Blocks(rows=16))
    with arrays.on(mesh):
        call = jax.jit(lambda *x: attn.attention(*x, implementation=blocks))
        text = call.lower(q, k, v).as_text()
    assert f"tensor<{2 * HEADS // 4}x{TOKENS}x{WIDTH}xf32>" in text
    assert f"tensor<{2 * HEADS}x{TOKENS}x{WIDTH}xf32>" not in text


@pytest.mark.parametrize("context", ["ulysses", "ring"])
def test_splash_equals_the_reference(context):
    kernel = attention_kernels.Splash(block=128, interpret=True)
    mesh = make_mesh({"context": 2}, jax.devices()[:2])
    _compare(attention_context.Sharded(kernel, context), mesh, width=128)


def test_text_keys_stay_whole():
    q, k, v, _ = _inputs()
    want = attn.attention(q, k[:, :5], v[:, :5])
    mesh = make_mesh({"data": 2, "context": 4})
    short = attn.for_short_keys(attn.build("ulysses:blocks", device_kind="cpu"))
    q = jnp.pad(q, ((0, 0), (0, 3), (0, 0), (0, 0)))
    with arrays.on(mesh):
        got = jax.jit(lambda *x: attn.attention(*x, implementation=short))(q, k[:, :5], v[:, :5])
    np.testing.assert_allclose(got[:, :TOKENS], want, **TOLERANCE)


def test_names_that_do_not_exist_and_shapes_that_do_not_fit_are_refused():
    for name in ("flash", "ring:flash", "tree:xla"):
        with pytest.raises(ValueError, match="is unknown; give auto"):
            attn.build(name, device_kind="cpu")
    with pytest.raises(ValueError, match="is no TPU known here"):
        attn.build("splash", device_kind="TPU v2")
    q, k, v, _ = _inputs()
    mesh = make_mesh({"context": 8})
    with arrays.on(mesh), pytest.raises(ValueError, match="do not divide over context = 8"):
        attn.attention(q, k, v, implementation=attn.build("ring:blocks", device_kind="cpu"))


@pytest.mark.parametrize(
    ("platform", "kind", "dtype", "kernel"),
    [
        ("tpu", "TPU v5 lite", "bfloat16", attention_kernels.Splash),
        ("gpu", "NVIDIA H100", "bfloat16", attention_kernels.CuDnn),
        ("gpu", "NVIDIA H100", "float32", attention_kernels.Blocks),
    ],
)
def test_a_mesh_gets_the_kernel_of_its_devices(platform, kind, dtype, kernel):
    """Else training would hold matrices of scores that no plan has counted."""
    device = SimpleNamespace(platform=platform, device_kind=kind)
    sizes = {"data": 1, "fsdp": 2, "context": 4, "tensor": 1}
    mesh: Any = SimpleNamespace(devices=np.array([device]), shape=sizes, axis_names=tuple(sizes))
    found: Any = attn.for_mesh(mesh, 40, dtype)
    assert isinstance(found.kernel, kernel) and found.context == "ulysses"
    odd: Any = attn.for_mesh(mesh, 6, dtype)
    assert odd.context == "ring"
    assert attn.for_mesh(None, 40, dtype) == "auto"


@pytest.mark.parametrize(("mebibytes", "keys"), [(16, 2048), (32, 4096), (48, 8192)])
def test_a_block_of_keys_fits_into_the_cores_memory(mebibytes, keys):
    assert attention_kernels.keys_in(mebibytes << 20) == keys


def test_auto_takes_what_the_device_has():
    assert attn.build("auto", device_kind="cpu", keys=80) is attn.build("xla", device_kind="cpu")
    many = attn.build("auto", device_kind="cpu", keys=757)  # a frame of Depth Anything 3
    assert isinstance(many.kernel, attention_kernels.Blocks)
    assert isinstance(attn.build("auto", device_kind="TPU v5").kernel, attention_kernels.Splash)
    assert attn.build("ring", device_kind="TPU v6 lite").kernel.block == 2048
    assert isinstance(attn.build("auto", device_kind="NVIDIA H100").kernel, attention_kernels.CuDnn)


@pytest.mark.parametrize("keys", [attention_kernels.LONG, attention_kernels.LONG // 2])
@pytest.mark.parametrize("name", ["blocks", "splash", "ring:blocks"])
def test_a_remat_policy_keeps_what_long_attention_found(capsys, name, keys):
    context = 2 if name.startswith("ring") else 1
    mesh = make_mesh({"context": context}, jax.devices()[:context])
    implementation = attn.build(name, device_kind="cpu" if "blocks" in name else "TPU v5")
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), jnp.float32) for n in (256, keys))
    policy = jax.checkpoint_policies.save_only_these_names(layers.SAVED)

    @functools.partial(jax.checkpoint, policy=policy)
    def attend(q, k, v):
        return attn.attention(jnp.sin(q), k, v, implementation=implementation).sum()

    with arrays.on(mesh):
        jax.ad_checkpoint.print_saved_residuals(attend, q, k, k)
    lines = capsys.readouterr().out.splitlines()
    kept = [line for line in lines if "argument" not in line and "a constant" not in line]
    # The output, and the sum of the softmax; through a shard_map they lose their name.
    assert len(kept) == (2 if keys >= attention_kernels.LONG else 0), kept


@pytest.mark.parametrize(
    ("tokens", "keys", "context", "parts", "want", "block", "gradients"),
    [
        (75_600, 2048, "ulysses", 1, 75_776, 1024, 37),  # 81 frames of 720p; 75,648 has 197
        (75_600, 8192, "ulysses", 1, 76_800, 1024, 15),
        (75_600, 2048, "ulysses", 4, 75_776, 1024, 37),
        (75_600, 2048, "ring", 4, 77_824, 1024, 19),  # each device with its own quarter
        (57_600, 8192, "ulysses", 1, 58_368, 1024, 19),  # 58,752 has 9, and blocks of 384
        (32_760, 2048, "ulysses", 1, 32_768, 1024, 16),  # 81 frames of 480p
        (7_800, 2048, "ulysses", 1, 8_192, 1024, 4),  # 17 frames: 7,808 has 61, blocks of 128
        (65, 2048, "ulysses", 1, 128, 128, 1),
    ],
)
def test_sequences_are_padded_to_few_and_large_blocks(
    tokens, keys, context, parts, want, block, gradients
):
    kernel = attention_kernels.Splash(block=1024, keys=keys)
    implementation = attention_context.Sharded(kernel, context)
    with arrays.on(make_mesh({"context": parts}, jax.devices()[:parts])):
        assert attn.padded(tokens, implementation) == want
    seen = want // (parts if context == "ring" else 1)
    assert (kernel.block_of(seen), seen // kernel.keys_of(seen)) == (block, gradients)
