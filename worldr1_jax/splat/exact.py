"""Composites projected Gaussians by the definition: the oracle that `tiles` is held against.

Every Gaussian in depth order against every pixel, one after the other, no lists: time is Gaussians
times pixels, memory the rows and a few numbers a pixel. Written apart from `tiles`, so that the two
do not share a mistake; they share the projection.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from worldr1_jax.splat import projection
from worldr1_jax.splat.tiles import RUNNING

STEPS_PER_CHECK = 32  # compositing steps between two looks at whether every pixel is finished


def pixel_centres(size: tuple[int, int]) -> Float[Array, "P 2"]:
    """x and y of every pixel centre, row by row."""
    y, x = jnp.meshgrid(jnp.arange(size[0]) + 0.5, jnp.arange(size[1]) + 0.5, indexing="ij")
    return jnp.stack([x.ravel(), y.ravel()], axis=-1)


def draw(view: projection.Projected, pixels: Float[Array, "P 2"]) -> Float[Array, "P 5"]:
    """r, g, b, depth times alpha, and alpha at any `pixels` (x, y) of a view."""
    depth = jnp.where(view.visible, lax.stop_gradient(view.rows[:, -1]), jnp.inf)
    rows = _clear(view.rows, ~view.visible)[jnp.argsort(depth, stable=True)]
    length = jnp.sum(view.visible)
    features, transmittance, _ = _blend(_whole_blocks(rows[:, None]), length, pixels)
    return jnp.concatenate([features[:, 0], 1.0 - transmittance]).T


class _Canvas(NamedTuple):
    """What compositing carries for each pixel of L tiles."""

    transmittance: Float[Array, "L P"]
    features: Float[Array, "4 L P"]  # sum of weight times r, g, b, depth
    stop: Int[Array, "L P"]  # list position at which the pixel stopped; `RUNNING` while it has not


def _alpha(row: Float[Array, "L C"], pixels: Float[Array, "P 2"]) -> Float[Array, "L P"]:
    """Opacity of one Gaussian per tile at each of its pixels, 0 where it is skipped."""
    dx = pixels[:, 0] - row[:, projection.MEAN_X, None]
    dy = pixels[:, 1] - row[:, projection.MEAN_Y, None]
    exponent = 0.5 * (
        row[:, projection.CONIC_XX, None] * dx * dx + row[:, projection.CONIC_YY, None] * dy * dy
    )
    exponent = exponent + row[:, projection.CONIC_XY, None] * dx * dy
    alpha = jnp.minimum(projection.ALPHA_MAX, row[:, projection.OPACITY, None] * jnp.exp(-exponent))
    return jnp.where((exponent >= 0) & (alpha >= projection.ALPHA_MIN), alpha, 0.0)


def _blank(tiles: int, pixels: int) -> _Canvas:
    return _Canvas(
        jnp.ones((tiles, pixels)),
        jnp.zeros((projection.NUM_FEATURES, tiles, pixels)),
        jnp.full((tiles, pixels), RUNNING, jnp.int32),
    )


def _step(
    canvas: _Canvas,
    row: Float[Array, "L 10"],
    position: Int[Array, ""],
    pixels: Float[Array, "P 2"],
) -> _Canvas:
    """Composites the Gaussian at `position` of every tile's list behind what is already there."""
    alpha = _alpha(row, pixels)
    behind = canvas.transmittance * (1.0 - alpha)
    running = canvas.stop == RUNNING
    drawn = running & (behind > projection.TRANSMITTANCE_MIN)
    weight = jnp.where(drawn, alpha * canvas.transmittance, 0.0)
    features = canvas.features + weight * row.T[projection.FEATURES :, :, None]
    return _Canvas(
        jnp.where(drawn, behind, canvas.transmittance),
        features,
        jnp.where(running & ~drawn, position, canvas.stop),
    )


def _composite(
    rows: Float[Array, "S L 10"],
    length: Int[Array, ""],
    pixels: Float[Array, "P 2"],
    canvas: _Canvas,
) -> _Canvas:
    """Front to back over list positions 0..length-1; leaves when every pixel has stopped.

    S is a multiple of STEPS_PER_CHECK.
    """

    def block(state: tuple[Int[Array, ""], _Canvas]) -> tuple[Int[Array, ""], _Canvas]:
        start, canvas = state
        part = lax.dynamic_slice_in_dim(rows, start, STEPS_PER_CHECK)

        def body(canvas: _Canvas, item: tuple[Array, Array]) -> tuple[_Canvas, None]:
            return _step(canvas, item[0], item[1], pixels), None

        positions = start + jnp.arange(STEPS_PER_CHECK, dtype=jnp.int32)
        return start + STEPS_PER_CHECK, lax.scan(body, canvas, (part, positions), unroll=4)[0]

    def unfinished(state: tuple[Int[Array, ""], _Canvas]) -> Bool[Array, ""]:
        return (state[0] < length) & jnp.any(state[1].stop == RUNNING)

    return lax.while_loop(unfinished, block, (jnp.int32(0), canvas))[1]


@jax.custom_vjp
def _blend(
    rows: Float[Array, "S L 10"], length: Int[Array, ""], pixels: Float[Array, "P 2"]
) -> tuple[Float[Array, "4 L P"], Float[Array, "L P"], Int[Array, "L P"]]:
    """Features, final transmittance and stopping position of L tiles from their lists.

    Reverse mode walks the lists back to front and recovers each transmittance by division, so it
    stores the rows and two numbers a pixel. JAX's own derivative of the scan would store about ten
    numbers a pixel and step.
    """
    canvas = _composite(rows, length, pixels, _blank(rows.shape[1], pixels.shape[0]))
    return canvas.features, canvas.transmittance, canvas.stop


def _blend_forward(rows: Array, length: Array, pixels: Array):
    canvas = _composite(rows, length, pixels, _blank(rows.shape[1], pixels.shape[0]))
    outputs = (canvas.features, canvas.transmittance, canvas.stop)
    return outputs, (rows, length, pixels, canvas.transmittance, canvas.stop)


def _blend_backward(residuals, cotangents):
    rows, length, pixels, transmittance, stop = residuals
    d_features, d_transmittance, _ = cotangents

    def body(state, item):
        # transmittance: behind this Gaussian. later: the loss's share in all that lies behind it.
        transmittance, later = state
        row, position = item
        alpha, pull = jax.vjp(lambda shape: _alpha(shape, pixels), row[:, : projection.FEATURES])
        drawn = position < stop
        alpha = jnp.where(drawn, alpha, 0.0)
        passes = 1.0 / (1.0 - alpha)
        before = transmittance * passes
        weight = alpha * before
        value = jnp.sum(d_features * row.T[projection.FEATURES :, :, None], axis=0)
        d_shape = pull(jnp.where(drawn, before * value - later * passes, 0.0))[0]
        d_row = jnp.concatenate([d_shape, jnp.sum(weight * d_features, axis=-1).T], axis=-1)
        return (before, later + weight * value), d_row

    def block(state):
        start, carry, d_rows = state
        part = lax.dynamic_slice_in_dim(rows, start, STEPS_PER_CHECK)
        positions = start + jnp.arange(STEPS_PER_CHECK, dtype=jnp.int32)
        carry, d_part = lax.scan(body, carry, (part, positions), reverse=True, unroll=2)
        d_rows = lax.dynamic_update_slice_in_dim(d_rows, d_part, start, 0)
        return start - STEPS_PER_CHECK, carry, d_rows

    # Nothing after the last pixel's stop has a gradient.
    last = jnp.minimum(length, jnp.max(stop))
    start = jnp.maximum(last - 1, 0) // STEPS_PER_CHECK * STEPS_PER_CHECK
    carry = (transmittance, d_transmittance * transmittance)
    state = (start.astype(jnp.int32), carry, jnp.zeros_like(rows))
    return lax.while_loop(lambda state: state[0] >= 0, block, state)[2], None, None


_blend.defvjp(_blend_forward, _blend_backward)


def _clear(
    rows: Float[Array, "*rows 10"], hidden: Bool[Array, "*rows"]
) -> Float[Array, "*rows 10"]:
    """Rows with opacity 0 where `hidden`."""
    return jnp.where(
        hidden[..., None] & (jnp.arange(rows.shape[-1]) == projection.OPACITY), 0.0, rows
    )


def _whole_blocks(rows: Float[Array, "S L 10"]) -> Float[Array, "_ L 10"]:
    return jnp.pad(rows, ((0, -rows.shape[0] % STEPS_PER_CHECK), (0, 0), (0, 0)))
