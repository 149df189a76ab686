"""Softmax attention: one function, behind which the implementations for each machine stand.

    xla      two einsums; logits in memory            any device, short sequences
    blocks   xla on blocks of queries                 any device, long sequences
    splash   jax's TPU kernel                         TPU
    cudnn    cuDNN's fused attention                  NVIDIA GPU, half precision
    auto     the one of these that fits the device and the number of tokens

With tokens over the mesh's context axis, "ulysses:NAME" and "ring:NAME" say how devices exchange
them, NAME being the kernel that each runs (attention_context.py); a bare "ulysses" or "ring" means
"auto". The same implementation serves rollout and update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from worldr1_jax.mesh import chips, compiler
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import AXES, current, ours
from worldr1_jax.nn import attention_context, attention_kernels

Implementation = str | Callable[..., jax.Array]

NAMES = ("auto", "xla", "blocks", "splash", "cudnn")
# Keys up to which "auto" on a CPU holds all logits. From 757 to 3,028 keys, blocks take 0.75 to
# 0.85 of the processor time, with the malloc that the launchers set.
SHORT = 512


def attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    mask: Bool[Array, ...] | None = None,
    *,
    bias: Float[Array, ...] | None = None,
    scale: float | None = None,
    length: int | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "B N H D"]:
    """softmax(scale q k^T + bias) v over M, with logits and softmax in float32; returns v.dtype.

    Args:
      q, k, v: queries, keys and values, heads before the head dimension.
      mask: True where a query may look; broadcasts to [B, H, N, M]. A query that may look nowhere
        gets the mean of all values. Only "xla" takes it.
      bias: added to the logits; broadcasts to [B, H, N, M]. Only "xla" takes it.
      scale: factor on q k^T; None means D ** -0.5.
      length: keys from here on are padding that nobody looks at; None means that all are real.
      implementation: a name as above, what `build` made of one, or a function with the arguments of
        this one (less `implementation`).

    Raises:
      ValueError: an unknown name.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(implementation, str):
        implementation = build(implementation, keys=k.shape[1])
    extra = {} if length is None else {"length": length}
    return implementation(q, k, v, mask, bias=bias, scale=scale, **extra)


def build(name: str, *, device_kind: str | None = None, keys: int | None = None) -> Callable:
    """The implementation of a name.

    Args:
      name: see the module's first lines.
      device_kind: what it will run on, such as "TPU v5" or "cpu"; None means the default device.
      keys: length of the sequences, if known, for "auto" on a CPU.

    Raises:
      ValueError: an unknown name.
    """
    context, _, local = name.rpartition(":")
    if local in ("ulysses", "ring") and not context:
        context, local = local, "auto"
    if local not in NAMES or context not in ("", "ulysses", "ring"):
        raise ValueError(
            f"attention implementation '{name}' is unknown; give {', '.join(NAMES)}, "
            "or ulysses:NAME or ring:NAME"
        )
    if device_kind is None:
        device_kind = jax.devices()[0].device_kind
    if local == "auto":
        local = _fitting(device_kind, keys)
    if local == "xla" and not context:
        return _xla
    if local in ("xla", "blocks"):
        rows = attention_kernels.CPU_ROWS if device_kind == "cpu" else None
        kernel: Any = attention_kernels.Blocks(rows)
    elif local == "cudnn":
        kernel = attention_kernels.CuDnn()
    else:
        chip = chips.generation(device_kind)
        kernel = attention_kernels.Splash(
            attention_kernels.BLOCKS[chip], attention_kernels.keys_in(compiler.scoped_memory(chip))
        )
    return attention_context.Sharded(kernel, context or "ulysses")


def for_mesh(mesh: Mesh | None, heads: int, dtype: Any) -> Implementation:
    """What a network of so many heads runs on the devices of a mesh: their kernel, and for tokens
    over the context axis all-to-all exchange, or a ring where it does not divide the heads.

    On CPUs "auto", which leaves a context axis to the compiler; the same without a mesh.
    """
    if mesh is None or not ours(mesh) or mesh.devices.flat[0].platform == "cpu":
        return "auto"
    device = mesh.devices.flat[0]
    local = "auto" if device.platform == "tpu" or jnp.dtype(dtype).itemsize == 2 else "blocks"
    here = attention_context.heads_of_a_device(heads, mesh.shape)
    context = "ring" if here % mesh.shape["context"] else "ulysses"
    return build(f"{context}:{local}", device_kind=device.device_kind)


def for_short_keys(implementation: Implementation) -> Implementation:
    """The same for keys that every device holds whole, such as the text's."""
    if isinstance(implementation, attention_context.Sharded):
        return dataclasses.replace(implementation, context="whole")
    return "xla" if isinstance(implementation, str) else implementation


def for_frames(implementation: Implementation) -> Implementation:
    """The same for sequences that are each on one device: frames of videos, on the first axis."""
    if isinstance(implementation, attention_context.Sharded):
        return dataclasses.replace(implementation, context="alone")
    return implementation


def for_long_sequences(implementation: Implementation, tokens: int, heads: int) -> Implementation:
    """The same for `tokens` over the context axis: keys travel (ring) where it does not divide a
    device's heads, and the kernel's blocks are whole whatever the number of tokens is."""
    if not isinstance(implementation, attention_context.Sharded):
        return implementation
    mesh, kernel, context = current(), implementation.kernel, "ulysses"
    sizes = dict.fromkeys(AXES, 1) if mesh is None else mesh.shape
    here = attention_context.heads_of_a_device(heads, sizes)
    if implementation.context == "ring" or here % sizes["context"]:
        context = "ring"
        tokens //= sizes["context"]
    # Splash divides a sequence into equal blocks; 128 x 521 tokens would get no larger one than
    # 128. Frames, which are not padded by `padded`, come to whole blocks, at most an eighth more.
    if isinstance(kernel, attention_kernels.Splash) and tokens >= 8 * kernel.block:
        kernel = dataclasses.replace(kernel, multiple=kernel.block)
    return attention_context.Sharded(kernel, context)


def laid_out(
    x: jax.Array,
    major_to_minor: tuple[int, ...],
    axes: Sequence[str | None],
    implementation: Implementation,
) -> jax.Array:
    """`x`, whose axes are `axes` (sharding.spec_for), with them in this order in memory, where a
    kernel will read it so.

    Left alone, the TPU compiler keeps the tokens of the residual stream minor, and pays for a
    transposition before and after every kernel. Each device lays out its own part: the compiler
    would gather the whole for an operation that it cannot split.
    """
    if not isinstance(implementation, attention_context.Sharded):
        return x

    def lay(part: jax.Array) -> jax.Array:
        return with_layout_constraint(part, Layout(major_to_minor))

    mesh = current()
    if mesh is None:
        return lay(x)
    spec = sharding.spec_for(x.shape, axes, mesh)
    return jax.shard_map(lay, in_specs=spec, out_specs=spec, check_vma=False)(x)


def padded(tokens: int, implementation: Implementation) -> int:
    """To how many tokens this implementation needs a sequence padded on the current mesh.

    Splash divides what a device attends to into equal blocks, so that the number decides how large
    they are: 75,600 tokens (81 frames of 720p) would be 591 lanes of 128, with no block above 384,
    and a backward pass that holds 197 gradients of the queries, one for each block of keys. Of all
    numbers up to a sixteenth more, the one that costs least is taken (`Splash.cost`).
    """
    if not isinstance(implementation, attention_context.Sharded):
        return tokens
    mesh, kernel = current(), implementation.kernel
    parts = 1 if mesh is None else mesh.shape["context"]
    unit = kernel.multiple * parts
    least = -(-tokens // unit) * unit
    if not isinstance(kernel, attention_kernels.Splash):
        return least
    share = parts if implementation.context == "ring" else 1  # of the tokens, in one call
    fitting = range(least, max(least, tokens + tokens // 16) + 1, unit)
    return min(fitting, key=lambda padded: kernel.cost(padded // share))


def _fitting(device_kind: str, keys: int | None) -> str:
    if device_kind.startswith("TPU"):
        return "splash"
    if device_kind == "cpu":
        return "xla" if keys is not None and keys <= SHORT else "blocks"
    return "cudnn"


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    bias: jax.Array | None,
    scale: float,
    length: int | None = None,
) -> jax.Array:
    """Two einsums. Logits of [B H N M] are held in memory: for short sequences."""
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * scale  # not on q, which may be bfloat16 and would be rounded once more
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, attention_kernels.NOWHERE)
    if length is not None:
        logits = jnp.where(jnp.arange(k.shape[1]) < length, logits, attention_kernels.NOWHERE)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)
