"""Composites projected Gaussians over square tiles, in rounds: static shapes, nothing dropped.

A round takes the next Gaussians in depth order, as many as make `pairs` pairs of a Gaussian and a
tile that it touches, groups the pairs by tile, and composites every tile's list front to back, a
chunk of CHUNK Gaussians at a time. A tile is left as soon as each of its pixels is opaque, and
rounds end when every tile is opaque or no Gaussian is left. So the memory is that of one round,
whatever the scene, and no tile has a longest list: a tile of real footage takes thousands of
Gaussians before it is opaque, and a list cut at a fixed length shows (FACTS: 10 to 12 dB at 4,096).

Within a chunk nothing is sequential but one product a pixel: exponents are a matrix product of six
numbers a pair with the six monomials of the pixel's position, and colours are a matrix product with
the weights. That is what makes it fast on CPUs and what the TPU kernel (`tile_kernel`) does too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from worldr1_jax.splat.lists import GROUP, Grid, Lists, boxes, table_of, take, touches
from worldr1_jax.splat.projection import (
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
)

CHUNK = 32  # Gaussians composited at once
CHANNELS = NUM_FEATURES + 1  # r, g, b, depth, 1: the sum of weights is alpha
RUNNING = jnp.iinfo(jnp.int32).max


class Canvas(NamedTuple):
    """What compositing carries for each pixel of L tiles."""

    features: Float[Array, "L 5 P"]  # sums of weight times r, g, b, depth, 1
    # Behind what is drawn, above TRANSMITTANCE_MIN; negative where the pixel has stopped.
    transmittance: Float[Array, "L P"]
    # round * pairs + place in the list where the pixel stopped, RUNNING before; kept for gradients.
    stop: Int[Array, "L P"]

    @property
    def open(self) -> Bool[Array, " L"]:
        """Tiles with a pixel that has not stopped."""
        return jnp.any(self.transmittance > 0, axis=-1)


# (grid, lists, canvas, number of the round, whether to record stops) -> canvas
Composite = Callable[[Grid, Lists, Canvas, Int[Array, ""], bool], Canvas]


def blank(tiles: int, pixels: int) -> Canvas:
    """Nothing drawn."""
    return Canvas(
        jnp.zeros((tiles, CHANNELS, pixels)),
        jnp.ones((tiles, pixels)),
        jnp.full((tiles, pixels), RUNNING, jnp.int32),
    )


# ---- A chunk -------------------------------------------------------------------------------------


def monomials(pixels: Float[np.ndarray, "P 2"]) -> Float[np.ndarray, "6 P"]:
    """1, x, y, x^2, xy, y^2 of each pixel."""
    x, y = pixels.T
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y])


def coefficients(rows: Float[Array, "*b 10"]) -> Float[Array, "*b 6"]:
    """log(opacity) minus the Gaussian's exponent, as a polynomial of the monomials.

    Means are relative to the tile's centre: the polynomial loses digits with the square of the
    distance.
    """
    x, y = rows[..., MEAN_X], rows[..., MEAN_Y]
    xx, xy, yy = rows[..., CONIC_XX], rows[..., CONIC_XY], rows[..., CONIC_YY]
    opacity = rows[..., OPACITY]
    log_opacity = jnp.log(jnp.maximum(opacity, 1e-30))
    constant = log_opacity - 0.5 * (xx * x * x + yy * y * y) - xy * x * y
    terms = [constant, xx * x + xy * y, yy * y + xy * x, -0.5 * xx, -xy, -0.5 * yy]
    return jnp.stack(terms, axis=-1)


def chunk_rows(
    grid: Grid, lists: Lists, tiles: Int[Array, " G"], chunk: Int[Array, " *c"], width: int
) -> tuple[Float[Array, "G C 10"], Int[Array, "G C"]]:
    """Rows of a chunk of each tile's list, means from the tile's centre, opacity 0 past its end;
    and which of the S Gaussians they are."""
    place = chunk[..., None] * width + jnp.arange(width)
    place = jnp.broadcast_to(place, (tiles.shape[0], width))
    inside = place < lists.length[tiles][:, None]
    index = lists.member[jnp.where(inside, lists.start[tiles][:, None] + place, 0)]
    rows = lists.rows[index]
    shift = jnp.pad(grid.centres(tiles), ((0, 0), (0, rows.shape[-1] - 2)))[:, None]
    hidden = ~inside[..., None] & (jnp.arange(rows.shape[-1]) == OPACITY)
    return jnp.where(hidden, 0.0, rows - shift), index


def features(rows: Float[Array, "G C 10"]) -> Float[Array, "G C 5"]:
    return jnp.concatenate([rows[..., FEATURES:], jnp.ones_like(rows[..., :1])], axis=-1)


def _alpha(rows: Float[Array, "G C 10"], basis: Float[Array, "6 P"]) -> Float[Array, "C G P"]:
    """Opacity of each Gaussian at each pixel of its tile, 0 where it is skipped."""
    exact = lax.Precision.HIGHEST
    power = jnp.einsum("gck,kp->cgp", coefficients(rows), basis, precision=exact)
    alpha = jnp.minimum(ALPHA_MAX, jnp.exp(power))
    return jnp.where(alpha >= ALPHA_MIN, alpha, 0.0)


def _before(
    transmittance: Float[Array, "G P"], alpha: Float[Array, "C G P"]
) -> tuple[Float[Array, "G P"], Float[Array, "C G P"]]:
    """Transmittance behind a chunk and in front of each Gaussian in it, given that in front of the
    first; see `Canvas` for the sign."""

    def step(before: Array, alpha: Array) -> tuple[Array, Array]:
        behind = before * (1.0 - alpha)
        return jnp.where(behind > TRANSMITTANCE_MIN, behind, -jnp.abs(before)), before

    return lax.scan(step, transmittance, alpha)


def _draw(
    canvas: Canvas, rows: Float[Array, "G C 10"], place: Int[Array, ""], basis: Array, record: bool
) -> Canvas:
    """Composites a chunk behind what is there; `place` is that of its first Gaussian."""
    alpha = _alpha(rows, basis)
    behind, before = _before(canvas.transmittance, alpha)
    drawn = before * (1.0 - alpha) > TRANSMITTANCE_MIN
    weight = jnp.where(drawn, alpha * before, 0.0)
    exact = lax.Precision.HIGHEST
    painted = jnp.einsum("gcf,cgp->gfp", features(rows), weight, precision=exact)
    stop = canvas.stop
    if record:
        many = jnp.sum(drawn, axis=0, dtype=jnp.int32)
        stops = (canvas.transmittance > 0) & (behind < 0)
        stop = jnp.where(stops, place + many, stop)
    return Canvas(canvas.features + painted, behind, stop)


# ---- A round -------------------------------------------------------------------------------------


def _in_groups(lists: Lists, arrays: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    """Tiles in groups of about equal lists, and arrays [L ...] split alike."""
    tiles = jnp.argsort(-lists.length).astype(jnp.int32)
    split = lambda array: array[tiles].reshape(-1, GROUP, *array.shape[1:])  # noqa: E731
    return tiles.reshape(-1, GROUP), tuple(split(array) for array in arrays)


def _out_of_groups(tiles: Array, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    back = jnp.argsort(tiles.ravel())
    return tuple(array.reshape(-1, *array.shape[2:])[back] for array in arrays)


def composite(
    grid: Grid, lists: Lists, canvas: Canvas, number: Int[Array, ""], record: bool
) -> Canvas:
    """Draws round `number` on the canvas; keeps `Canvas.stop` when asked to `record`."""
    basis = jnp.asarray(monomials(grid.pixels()))

    def one_group(item: tuple[Array, tuple[Array, ...]]) -> Canvas:
        tiles, part = item
        longest = jnp.max(lists.length[tiles])

        def one_chunk(state: tuple[Array, Canvas]) -> tuple[Array, Canvas]:
            chunk, canvas = state
            rows, _ = chunk_rows(grid, lists, tiles, chunk, CHUNK)
            place = number * grid.pairs + chunk * CHUNK
            return chunk + 1, _draw(canvas, rows, place, basis, record)

        def unfinished(state: tuple[Array, Canvas]) -> Array:
            return (state[0] * CHUNK < longest) & jnp.any(state[1].open)

        return lax.while_loop(unfinished, one_chunk, (jnp.int32(0), Canvas(*part)))[1]

    tiles, parts = _in_groups(lists, canvas)
    return Canvas(*_out_of_groups(tiles, tuple(lax.map(one_group, (tiles, parts)))))


def _draw_backward(
    state: tuple[Array, Array], rows: Array, cotangent: Array, drawn: Array, basis: Array
) -> tuple[tuple[Array, Array], Float[Array, "G C 10"]]:
    """A chunk's gradient. Takes and gives (transmittance behind, the loss's share behind)."""
    behind_all, later = state
    alpha, pull = jax.vjp(lambda rows: _alpha(rows, basis), rows)
    alpha = jnp.where(drawn, alpha, 0.0)
    first = behind_all / jnp.prod(1.0 - alpha, axis=0)
    before = lax.scan(lambda t, a: (t * (1.0 - a), t), first, alpha)[1]
    weight = alpha * before
    shown = features(rows)
    exact = lax.Precision.HIGHEST
    value = jnp.einsum("gcf,gfp->cgp", shown, cotangent, precision=exact)
    later, behind = lax.scan(lambda s, x: (s + x, s), later, weight * value, reverse=True)
    d_alpha = jnp.where(drawn, before * value - behind / (1.0 - alpha), 0.0)
    d_features = jnp.einsum("cgp,gfp->gcf", weight, cotangent, precision=exact)
    d_rows = pull(d_alpha)[0].at[..., FEATURES:].add(d_features[..., :-1])
    return (before[0], later), d_rows


def _composite_backward(
    grid: Grid, lists: Lists, number: Array, stop: Array, state: tuple[Array, ...]
) -> tuple[Float[Array, "S 10"], tuple[Array, ...]]:
    """Gradient of a round's rows; `state` is (transmittance, later, cotangent) of every tile, and
    comes back as it was before the round."""
    basis = jnp.asarray(monomials(grid.pixels()))
    first = number * grid.pairs

    def one_group(d_slab: Array, item: tuple[Array, tuple[Array, ...]]):
        tiles, (stop, transmittance, later, cotangent) = item
        # Nothing after the last pixel's stop has a gradient.
        last = jnp.minimum(jnp.max(lists.length[tiles]), jnp.max(stop) - first)

        def one_chunk(state):
            chunk, carry, d_slab = state
            rows, index = chunk_rows(grid, lists, tiles, chunk, CHUNK)
            place = first + chunk * CHUNK + jnp.arange(CHUNK)
            drawn = place[:, None, None] < stop
            carry, d_rows = _draw_backward(carry, rows, cotangent, drawn, basis)
            inside = chunk * CHUNK + jnp.arange(CHUNK) < lists.length[tiles][:, None]
            d_slab = d_slab.at[index].add(jnp.where(inside[..., None], d_rows, 0.0))
            return chunk - 1, carry, d_slab

        state = ((last + CHUNK - 1) // CHUNK - 1, (transmittance, later), d_slab)
        _, carry, d_slab = lax.while_loop(lambda state: state[0] >= 0, one_chunk, state)
        return d_slab, (*carry, cotangent)

    tiles, parts = _in_groups(lists, (stop, *state))
    d_slab, after = lax.scan(one_group, jnp.zeros_like(lists.rows), (tiles, parts))
    return d_slab, _out_of_groups(tiles, after)


# ---- All rounds ----------------------------------------------------------------------------------


class _Rounds(NamedTuple):
    """State of the loop over rounds."""

    canvas: Canvas
    cursor: Int[Array, ""]  # Gaussians done, in depth order
    number: Int[Array, ""]  # rounds done
    cursors: Int[Array, " R"]  # the cursor before each round


def _depth_order(view: Projected, slab: int) -> tuple[Array, Array]:
    """Gaussians front to back, the invisible ones last, then `slab` more; and how many can be
    seen."""
    depth = jnp.where(view.visible, view.rows[:, -1], jnp.inf)
    order = jnp.argsort(depth, stable=True).astype(jnp.int32)
    return jnp.pad(order, (0, slab)), jnp.sum(view.visible, dtype=jnp.int32)


def run(
    grid: Grid, draw: Composite, view: Projected, record: bool
) -> tuple[_Rounds, Int[Array, ""]]:
    """Every round of a view, and the pairs that were left out; see `blend`."""
    count = view.rows.shape[0]
    order, visible = _depth_order(view, min(count, grid.pairs))
    most, table = grid.most_rounds(count), table_of(view)

    def one_round(state: _Rounds) -> _Rounds:
        lists = take(grid, table, order, visible, state.cursor, state.canvas.open)
        canvas = draw(grid, lists, state.canvas, state.number, record)
        cursors = state.cursors.at[state.number].set(state.cursor)
        return _Rounds(canvas, state.cursor + lists.taken, state.number + 1, cursors)

    def unfinished(state: _Rounds) -> Array:
        is_open = jnp.any(state.canvas.open[: grid.tiles])
        return (state.cursor < visible) & (state.number < most) & is_open

    zero = jnp.int32(0)
    canvas = blank(grid.padded, grid.tile**2)
    start = _Rounds(canvas, zero, zero, jnp.zeros(most, jnp.int32))
    done = lax.while_loop(unfinished, one_round, start)
    if grid.rounds is None:
        return done, zero  # the loop ends when nothing is left
    low, high = boxes(grid, view.rows[:, :2], view.radii)
    touched = touches(grid, done.canvas.open, low, high)
    waiting = jnp.arange(count) >= done.cursor
    missed = jnp.sum(jnp.where(waiting & (jnp.arange(count) < visible), touched[order[:count]], 0))
    return done, missed.astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def blend(
    grid: Grid, draw: Composite, view: Projected
) -> tuple[Float[Array, "L 5 P"], Int[Array, ""]]:
    """Sums of weight times r, g, b, depth and 1 at every pixel of every tile, and the pairs that
    `grid.rounds` left out of tiles that were still transparent.

    `draw` composites a round: `composite`, or the kernel that does the same on a TPU. The gradient
    reaches `view.rows`. It walks the rounds back to front, makes each one's lists anew and recovers
    transmittances by division, so it stores two numbers a pixel.
    """
    done, missed = run(grid, draw, view, record=False)
    return done.canvas.features, missed


def _blend_forward(grid: Grid, draw: Composite, view: Projected):
    done, missed = run(grid, draw, view, record=True)
    return (done.canvas.features, missed), (view, done)


def _blend_backward(grid: Grid, _: Composite, residuals, cotangents):
    view, done = residuals
    slab = min(view.rows.shape[0], grid.pairs)
    order, visible = _depth_order(view, slab)
    stop, table = done.canvas.stop, table_of(view)

    def one_round(state):
        number, carry, d_rows = state
        is_open = jnp.any(stop >= number * grid.pairs, axis=-1)  # as it was before this round
        lists = take(grid, table, order, visible, done.cursors[number], is_open)
        d_slab, carry = _composite_backward(grid, lists, number, stop, carry)
        return number - 1, carry, d_rows.at[lists.source].add(d_slab)

    transmittance = jnp.abs(done.canvas.transmittance)
    carry = (transmittance, jnp.zeros_like(transmittance), cotangents[0])
    state = (done.number - 1, carry, jnp.zeros_like(view.rows))
    d_rows = lax.while_loop(lambda state: state[0] >= 0, one_round, state)[2]
    return (view._replace(rows=d_rows, radii=jnp.zeros_like(view.radii), visible=None),)


blend.defvjp(_blend_forward, _blend_backward)
