"""Softmax attention: one function, behind which the implementations for each machine stand."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Implementation = str | Callable[..., jax.Array]


def attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    mask: Bool[Array, ...] | None = None,
    *,
    bias: Float[Array, ...] | None = None,
    scale: float | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "B N H D"]:
    """softmax(scale q k^T + bias) v over M, with logits and softmax in float32; returns v.dtype.

    Args:
      q, k, v: queries, keys and values, heads before the head dimension.
      mask: True where a query may look; broadcasts to [B, H, N, M]. A query that may look nowhere
        gets the mean of all values.
      bias: added to the logits; broadcasts to [B, H, N, M].
      scale: factor on q k^T; None means D ** -0.5.
      implementation: a name in IMPLEMENTATIONS, or a function with the arguments of this one (less
        `implementation`), e.g. one that runs under shard_map.

    Raises:
      ValueError: an unknown name.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if callable(implementation):
        return implementation(q, k, v, mask, bias=bias, scale=scale)
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(sorted(IMPLEMENTATIONS))
        raise ValueError(f"attention implementation '{implementation}' is unknown; give {names}")
    return IMPLEMENTATIONS[implementation](q, k, v, mask, bias=bias, scale=scale)


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Two einsums. Logits of [B H N M] are held in memory: for short sequences."""
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * scale  # not on q, which may be bfloat16 and would be rounded once more
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def _blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    """`_xla` on blocks of queries, one after the other: logits of [B H block M] at a time.

    The backward pass computes them again. For long sequences where there is no kernel; a block's
    logits are about LOGITS_BYTES, so that they stay near the cores.
    """
    if mask is not None or bias is not None:
        raise ValueError("attention in blocks takes neither mask nor bias: use 'xla'")
    batch, length, heads, width = q.shape
    block = LOGITS_BYTES // (4 * batch * heads * k.shape[1]) // 8 * 8
    block = min(max(block, 8), length)
    count = -(-length // block)
    q = jnp.pad(q, ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
    q = q.reshape(batch, count, block, heads, width).swapaxes(0, 1)

    @jax.checkpoint
    def one(rows: jax.Array) -> jax.Array:
        return _xla(rows, k, v, None, bias=None, scale=scale)

    out = jax.lax.map(one, q).swapaxes(0, 1)
    return out.reshape(batch, count * block, heads, v.shape[-1])[:, :length]


LOGITS_BYTES = 32 << 20
IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"xla": _xla, "blocks": _blocks}
