"""Attention over a mesh: each device runs a kernel on its own videos and heads, and the tokens that
lie over the context axis are exchanged.

    ulysses  all-to-all: from a part of the tokens of all heads to all tokens of a part of the heads
    ring     keys and values travel around; each device merges what its queries find in each part
    whole    queries stay where they are and keys are short enough to be everywhere (text)
    alone    many short sequences, each on one device, over data, fsdp and context (frames)

Source: DeepSpeed-Ulysses, arXiv 2309.14509; Ring Attention, arXiv 2310.01889.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import current
from worldr1_jax.nn.attention_kernels import named

CONTEXTS = ("ulysses", "ring", "whole", "alone")


@dataclasses.dataclass(frozen=True)
class Sharded:
    """An implementation for `attention.attention`, to be called under `jax.set_mesh`.

    Attributes:
      kernel: what each device runs (attention_kernels.py).
      context: one of CONTEXTS; with a context axis of 1 they are the same.
    """

    kernel: Any
    context: str = "ulysses"

    def __call__(self, q, k, v, mask, *, bias, scale, length=None):
        """[B N H D]; N and M already multiples of `multiple(self)`, `length` keys of them real."""
        if mask is not None or bias is not None:
            raise ValueError("attention kernels take neither mask nor bias: use 'xla'")
        real = k.shape[1] if length is None else length
        mesh = current()
        if mesh is None:
            return self._local(q, k, v, scale, real)
        parts = mesh.shape["context"]
        axes: tuple[str | None, ...] = ("videos", "tokens", "heads", None)
        if self.context == "alone":
            axes = ("sequences", None, "heads", None)
        else:
            self._check(q, k, mesh)
        spec = sharding.spec_for(q.shape, axes, mesh)
        keys = spec
        if self.context == "whole":
            keys = PartitionSpec(spec[0], None, spec[2], None)
        body = functools.partial(self._on_device, scale=scale, length=real, parts=parts)
        # check_vma cannot see through a kernel's outputs.
        return jax.shard_map(
            body, in_specs=(spec, keys, keys), out_specs=spec, check_vma=False
        )(q, k, v)  # fmt: skip

    def _check(self, q, k, mesh) -> None:
        parts, heads = mesh.shape["context"], heads_of_a_device(q.shape[2], mesh.shape)
        if q.shape[1] % parts or (self.context != "whole" and k.shape[1] % parts):
            raise ValueError(
                f"{q.shape[1]} queries and {k.shape[1]} keys do not divide over context = {parts}: "
                "pad them and say how many are real (length)"
            )
        if self.context == "ulysses" and heads % parts:
            raise ValueError(
                f"{heads} heads a device do not divide over context = {parts}: use 'ring'"
            )

    def _local(self, q, k, v, scale, length):
        """A kernel may want more tokens than a caller without a mesh has padded to."""
        rows, columns = (-n % self.kernel.multiple for n in (q.shape[1], k.shape[1]))
        pad = functools.partial(_pad_tokens)
        out = self.kernel(
            pad(q, rows), pad(k, columns), pad(v, columns), scale=scale, length=length
        )
        return out[:, : q.shape[1]]

    def _on_device(self, q, k, v, *, scale, length, parts):
        if parts == 1 or self.context in ("whole", "alone"):
            return self._local(q, k, v, scale, length)
        if self.context == "ulysses":
            # Here the scale joins what made the queries; after the exchange it is a pass more.
            q = q * jnp.asarray(scale, q.dtype)
            q, k, v = (_to_heads(x, parts) for x in (q, k, v))
            return _to_tokens(self._local(q, k, v, 1.0, length), parts)
        rows, columns = (-n % self.kernel.multiple for n in (q.shape[1], k.shape[1]))
        out = ring(
            self.kernel, scale, length, k.shape[1], parts,
            _pad_tokens(q, rows), _pad_tokens(k, columns), _pad_tokens(v, columns),
        )  # fmt: skip
        return out[:, : q.shape[1]]


def heads_of_a_device(heads: int, sizes: Mapping[str, int]) -> int:
    """Of a network's heads, on a mesh of these sizes: all where tensor does not divide them."""
    return heads // sizes["tensor"] if heads % sizes["tensor"] == 0 else heads


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def ring(kernel, scale, length, share, parts, q, k, v):
    """Attention of this device's queries to the keys of all devices of the context axis.

    Args:
      kernel: with `forward` and `backward`.
      scale: factor on q k^T.
      length: keys that are real, over all devices.
      share: keys of one device before it padded them for its kernel.
      parts: devices of the axis.
      q, k, v: [B N H D], this device's.
    """
    return _ring_forward(kernel, scale, length, share, parts, q, k, v)[0]


def _ring_forward(kernel, scale, length, share, parts, q, k, v):
    def step(carry, turn):
        out, lse, keys = carry
        part, part_lse = kernel.forward(
            q, *keys, scale=scale, length=_real(turn, length, share, parts)
        )
        merged = jnp.logaddexp(lse, part_lse)
        old, new = (_per_query(jnp.exp(x - merged)) for x in (lse, part_lse))
        out = out * old + part.astype(jnp.float32) * new
        return (out, merged, _pass_on(keys, parts)), None

    batch, rows, heads, _ = q.shape
    start = (
        jnp.zeros((*q.shape[:3], v.shape[-1]), jnp.float32),
        jnp.full((batch, heads, rows), -1e30, jnp.float32),
        (k, v),
    )
    (out, lse, _), _ = jax.lax.scan(step, start, jnp.arange(parts))
    out, lse = named(out.astype(v.dtype), lse, keys=parts * share)
    return out, (q, k, v, out, lse)


def _ring_backward(kernel, scale, length, share, parts, saved, grad):
    """Gradients of keys and values travel with them, and are home after a full turn."""
    q, k, v, out, lse = saved

    def step(carry, turn):
        dq, keys, sums = carry
        real = _real(turn, length, share, parts)
        more, dk, dv = kernel.backward(q, *keys, out, lse, grad, scale=scale, length=real)
        sums = (sums[0] + dk, sums[1] + dv)
        return (dq + more, _pass_on(keys, parts), _pass_on(sums, parts)), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    start = (zeros[0], (k, v), (zeros[1], zeros[2]))
    (dq, _, (dk, dv)), _ = jax.lax.scan(step, start, jnp.arange(parts))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


ring.defvjp(_ring_forward, _ring_backward)


def _real(turn, length, share, parts):
    """How many of the keys that are here at this turn are real."""
    owner = (jax.lax.axis_index("context") - turn) % parts
    return jnp.clip(length - owner * share, 0, share)


def _pass_on(tree, parts):
    ahead = [(i, (i + 1) % parts) for i in range(parts)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", ahead), tree)


def _per_query(x):
    """[B H N] -> [B N H 1]."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def _to_heads(x, parts):
    """[B n H D], a part of the tokens, to [B N h D], a part of the heads.

    Heads lie before tokens in memory, for the kernel and, so that only whole blocks are exchanged
    and moved, on the way to it.
    """
    batch, rows, heads, width = x.shape
    x = jnp.swapaxes(x, 1, 2).reshape(batch, parts, heads // parts, rows, width)
    x = _exchange(jnp.moveaxis(x, 1, 0))
    x = jnp.moveaxis(x, 0, 2).reshape(batch, heads // parts, parts * rows, width)
    return jnp.swapaxes(x, 1, 2)


def _to_tokens(x, parts):
    """The inverse of `_to_heads`."""
    batch, rows, heads, width = x.shape
    x = jnp.swapaxes(x, 1, 2).reshape(batch, heads, parts, rows // parts, width)
    x = _exchange(jnp.moveaxis(x, 2, 0))
    x = jnp.moveaxis(x, 0, 1).reshape(batch, parts * heads, rows // parts, width)
    return jnp.swapaxes(x, 1, 2)


def _exchange(x):
    return jax.lax.all_to_all(x, "context", split_axis=0, concat_axis=0, tiled=True)


def _pad_tokens(x, count):
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x
