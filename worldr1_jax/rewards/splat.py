"""Renders 3D Gaussians: projection, depth order, front-to-back compositing.

The semantics are those of gsplat 1.5.3 (pinhole, EWA): `EPS2D` is added to the projected
covariance, an alpha is at most `ALPHA_MAX` and is skipped below `ALPHA_MIN`, a pixel stops before
its transmittance would reach `TRANSMITTANCE_MIN`, the background is black, and a colour is
max(SH + 0.5, 0). A Gaussian's extent, min(3.33, sqrt(2 ln(255 opacity))) sigma, is the boundary of
alpha >= 1/255, so lists that are cut by it lose nothing.

    render(..., method="tiled")    lists of the tiles, in rounds (`tiles`); the default
    render(..., method="pallas")   the same, with a kernel for TPUs (`tile_kernel`)
    render(..., method="exact")    the oracle: every Gaussian against every pixel, any size, slow

All are differentiable and share the projection. Depth is the expected depth,
sum(w z) / sum(w), and 0 where alpha is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from worldr1_jax.rewards import tiles
from worldr1_jax.rewards.projection import (
    ALPHA_MAX,
    ALPHA_MIN,
    CONIC_XX,
    CONIC_XY,
    CONIC_YY,
    FEATURES,
    MEAN_X,
    MEAN_Y,
    NUM_FEATURES,
    OPACITY,
    TRANSMITTANCE_MIN,
    Projected,
    project,
)
from worldr1_jax.types import Gaussians

STEPS_PER_CHECK = 32  # compositing steps between two looks at whether every pixel is finished


class Rendered(NamedTuple):
    """Images of V views."""

    rgb: Float[Array, "V H W 3"]  # >= 0, on black; not clipped at 1
    depth: Float[Array, "V H W"]  # expected, along the optical axis, world units; 0 if alpha is
    alpha: Float[Array, "V H W"]  # in [0, 1]
    overflow: Int[Array, " V"]  # what a bound on rounds left out of tiles not yet opaque


class _Canvas(NamedTuple):
    """What compositing carries for each pixel of L tiles."""

    transmittance: Float[Array, "L P"]
    features: Float[Array, "4 L P"]  # sum of weight times r, g, b, depth
    stop: Int[Array, "L P"]  # list position at which the pixel stopped; `_RUNNING` while it has not


_RUNNING = jnp.iinfo(jnp.int32).max


# ---- Compositing ---------------------------------------------------------------------------------


def _alpha(row: Float[Array, "L 6+"], pixels: Float[Array, "P 2"]) -> Float[Array, "L P"]:
    """Opacity of one Gaussian per tile at each of its pixels, 0 where it is skipped."""
    dx = pixels[:, 0] - row[:, MEAN_X, None]
    dy = pixels[:, 1] - row[:, MEAN_Y, None]
    exponent = 0.5 * (row[:, CONIC_XX, None] * dx * dx + row[:, CONIC_YY, None] * dy * dy)
    exponent = exponent + row[:, CONIC_XY, None] * dx * dy
    alpha = jnp.minimum(ALPHA_MAX, row[:, OPACITY, None] * jnp.exp(-exponent))
    return jnp.where((exponent >= 0) & (alpha >= ALPHA_MIN), alpha, 0.0)


def _blank(tiles: int, pixels: int) -> _Canvas:
    return _Canvas(
        jnp.ones((tiles, pixels)),
        jnp.zeros((NUM_FEATURES, tiles, pixels)),
        jnp.full((tiles, pixels), _RUNNING, jnp.int32),
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
    running = canvas.stop == _RUNNING
    drawn = running & (behind > TRANSMITTANCE_MIN)
    weight = jnp.where(drawn, alpha * canvas.transmittance, 0.0)
    features = canvas.features + weight * row.T[FEATURES:, :, None]
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
        return (state[0] < length) & jnp.any(state[1].stop == _RUNNING)

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
        alpha, pull = jax.vjp(lambda shape: _alpha(shape, pixels), row[:, :FEATURES])
        drawn = position < stop
        alpha = jnp.where(drawn, alpha, 0.0)
        passes = 1.0 / (1.0 - alpha)
        before = transmittance * passes
        weight = alpha * before
        value = jnp.sum(d_features * row.T[FEATURES:, :, None], axis=0)
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


# ---- Images --------------------------------------------------------------------------------------


def _pixels(size: tuple[int, int]) -> Float[Array, "P 2"]:
    """x and y of every pixel centre, row by row."""
    y, x = jnp.meshgrid(jnp.arange(size[0]) + 0.5, jnp.arange(size[1]) + 0.5, indexing="ij")
    return jnp.stack([x.ravel(), y.ravel()], axis=-1)


def _clear(
    rows: Float[Array, "*rows 10"], hidden: Bool[Array, "*rows"]
) -> Float[Array, "*rows 10"]:
    """Rows with opacity 0 where `hidden`."""
    return jnp.where(hidden[..., None] & (jnp.arange(rows.shape[-1]) == OPACITY), 0.0, rows)


def _whole_blocks(rows: Float[Array, "S L 10"]) -> Float[Array, "S L 10"]:
    return jnp.pad(rows, ((0, -rows.shape[0] % STEPS_PER_CHECK), (0, 0), (0, 0)))


def _untiled(features: Float[Array, "L 5 P"], grid: tiles.Grid) -> Float[Array, "H W 5"]:
    """r, g, b, depth times alpha, and alpha, from tiles."""
    (down, across), tile, (height, width) = grid.shape, grid.tile, grid.size
    image = features[: grid.tiles].reshape(down, across, features.shape[1], tile, tile)
    image = image.transpose(0, 3, 1, 4, 2).reshape(down * tile, across * tile, -1)
    return image[:height, :width]


# ---- Renderers -----------------------------------------------------------------------------------


def _each_view(
    one_view: Callable[[Projected], tuple[Array, Array]],
    gaussians: Gaussians,
    camtoworld: Array,
    intrinsics: Array,
    size: tuple[int, int],
) -> Rendered:
    """Projects every view of every scene and renders them one after the other.

    One at a time: memory stays that of one view, each leaves its loop when it is opaque, and on a
    CPU a step is too small to be split over threads, whose meeting costs more than the step. Where
    the batch is sharded, call it inside `jax.shard_map`, or every device renders every scene.
    """
    leading, batch = camtoworld.shape[:-2], gaussians.means.shape[:-2]
    if camtoworld.shape[-2:] != (4, 4) or len(leading) != len(batch) + 1 or leading[:-1] != batch:
        raise ValueError(
            f"camtoworld has shape {camtoworld.shape}, want {(*batch, 'V', 4, 4)}: "
            f"the Gaussians have the leading axes {batch}"
        )
    if intrinsics.shape != (*leading, 3, 3):
        raise ValueError(f"intrinsics has shape {intrinsics.shape}, want {(*leading, 3, 3)}")
    scenes = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(batch) :]), gaussians)

    def one_scene(item: tuple[Gaussians, Array, Array]) -> tuple[Array, Array]:
        scene, poses, matrices = item
        return lax.map(
            lambda view: one_view(project(scene, view[0], view[1], size)), (poses, matrices)
        )

    views = (camtoworld.reshape(-1, leading[-1], 4, 4), intrinsics.reshape(-1, leading[-1], 3, 3))
    image, overflow = lax.map(one_scene, (scenes, *views))
    image = image.reshape(*leading, *size, 5)
    depth, alpha = image[..., 3], image[..., 4]
    seen = alpha > 0
    depth = jnp.where(seen, depth / jnp.where(seen, alpha, 1.0), 0.0)
    return Rendered(image[..., :3], depth, alpha, overflow.reshape(leading))


METHODS = ("tiled", "pallas", "exact")


@partial(jax.jit, static_argnames=("size", "method", "tile", "pairs", "rounds", "interpret"))
def render(
    gaussians: Gaussians,
    camtoworld: Float[Array, "*batch V 4 4"],
    intrinsics: Float[Array, "*batch V 3 3"],
    size: tuple[int, int],
    *,
    method: str = "tiled",
    tile: int | None = None,
    pairs: int | None = None,
    rounds: int | None = None,
    interpret: bool = False,
) -> Rendered:
    """Images of every view of every scene; differentiable, whatever the method.

    Gradients reach means, scales, quaternions, opacities, sh, camtoworld and intrinsics. Which
    Gaussians a tile lists, the skip below 1/255 and the stop have none, as in gsplat.

    Args:
        gaussians: N Gaussians a scene, in world axes; any batch axes.
        camtoworld: OpenCV poses of V views a scene.
        intrinsics: px of the image rendered, pixel centres at +0.5. Skew moves the means only.
        size: height and width of the images, px.
        method: "tiled" on any device; "pallas", the same with a kernel for TPUs; "exact", every
            Gaussian against every pixel, the oracle: slow.
        tile: side of the square tiles, px; speed only. None: 8, and 16 with "pallas".
        pairs: room of a round, in Gaussians times the tiles that they touch; speed and memory only.
            None: `tiles.PAIRS_PER_TILE` a tile.
        rounds: at most so many rounds, for a bound on the time; what is then missing is counted in
            `overflow`. None: until nothing is left, and `overflow` is 0.
        interpret: run the TPU kernel without a TPU, slowly.

    Raises:
        ValueError: an unknown method, leading axes that disagree, spherical harmonics of degree
            above 2, or a room that is too small.
    """
    if method not in METHODS:
        raise ValueError(f"method is '{method}': it is {', '.join(METHODS)}")
    if method == "exact":
        one_view = partial(_exact_view, size=size)
    else:
        kernel = "xla" if method == "tiled" else "interpret" if interpret else "pallas"
        side = tile or (8 if method == "tiled" else 16)
        one_view = partial(_tiled_view, grid=tiles.make_grid(size, side, pairs, rounds, kernel))
    return _each_view(one_view, gaussians, camtoworld, intrinsics, size)


def _tiled_view(view: Projected, grid: tiles.Grid) -> tuple[Array, Array]:
    features, missed = tiles.blend(grid, view)
    return _untiled(features, grid), missed


def _exact_view(view: Projected, size: tuple[int, int]) -> tuple[Array, Array]:
    """By the definition: every Gaussian in depth order against every pixel, no lists.

    Memory for the rows and a few numbers a pixel, time N x H x W.
    """
    depth = jnp.where(view.visible, lax.stop_gradient(view.rows[:, -1]), jnp.inf)
    rows = _clear(view.rows, ~view.visible)[jnp.argsort(depth, stable=True)]
    length = jnp.sum(view.visible)
    features, transmittance, _ = _blend(_whole_blocks(rows[:, None]), length, _pixels(size))
    image = jnp.concatenate([features, 1.0 - transmittance[None]]).reshape(5, *size)
    return jnp.moveaxis(image, 0, -1), jnp.int32(0)
