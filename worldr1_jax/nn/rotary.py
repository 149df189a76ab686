"""Rotary position embedding (RoPE) over frames, rows and columns, as Wan2.1 has it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def tables(
    grid: tuple[int, int, int], head_dim: int
) -> tuple[Float[Array, "N 1 d"], Float[Array, "N 1 d"]]:
    """cos and sin of each token's angles, for `rotate`: [N 1 d / 2], float32.

    The d channels of a head are divided among frame, row and column as d - 4(d // 6), 2(d // 6) and
    2(d // 6); within each part the angle of pair i is position x 10000^(-2i / part). Angles are
    computed in float64 while tracing, one small table per axis.
    """
    side = 2 * (head_dim // 6)
    parts = []
    for axis, (count, part) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        angles = np.outer(np.arange(count), 10000.0 ** (-np.arange(0, part, 2) / part))
        shape = [1, 1, 1, part // 2]
        shape[axis] = count
        parts.append(
            np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32).reshape(2, *shape)
        )
    full = [jnp.broadcast_to(t, (2, *grid, t.shape[-1])) for t in parts]
    cos, sin = jnp.concatenate(full, axis=-1).reshape(2, -1, 1, head_dim // 2)
    return cos, sin


def rotate(
    x: Float[Array, "B N H D"], cos: Float[Array, "N 1 d"], sin: Float[Array, "N 1 d"]
) -> Float[Array, "B N H D"]:
    """Rotary embedding: turns the channel pairs (0, 1), (2, 3), ... by their angles, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def rotate_by_product(
    x: Float[Array, "B N H D"], cos: Float[Array, "N 1 d"], sin: Float[Array, "N 1 d"]
) -> Float[Array, "B N H D"]:
    """`rotate` for TPUs; equal up to rounding, and returns x.dtype.

    The other channel of each pair, with its sign, comes from a product with a matrix of 0, 1 and
    -1, which is exact: taking every second channel would cost a TPU more than the whole rotation.
    The turn itself is computed in float32.
    """
    width = x.shape[-1]
    swap = np.zeros((width, width), np.float32)
    even = np.arange(0, width, 2)
    swap[even + 1, even], swap[even, even + 1] = -1.0, 1.0
    other = jnp.matmul(x, jnp.asarray(swap, x.dtype), precision=jax.lax.Precision.HIGHEST)
    cos, sin = jnp.repeat(cos, 2, axis=-1), jnp.repeat(sin, 2, axis=-1)
    return (x.astype(jnp.float32) * cos + other.astype(jnp.float32) * sin).astype(x.dtype)


def rotate_halves(
    x: Float[Array, "B N H D"], cos: Float[Array, "*b N 1 d"], sin: Float[Array, "*b N 1 d"]
) -> Float[Array, "B N H D"]:
    """Rotary embedding of language models: turns the channel pairs (i, i + D / 2), in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
