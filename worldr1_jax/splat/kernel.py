"""Composites a round of tiles on a TPU: `tiles.composite` as one Pallas kernel.

The grid is one step per chunk of 128 Gaussians, tile after tile, so that a tile's canvas stays on
the chip while its chunks stream in behind one another. A chunk whose tile is opaque is passed over.
All sums are matrix products: exponents from polynomial coefficients and monomials, the running
product of transmittances as the exponential of a triangular product of logarithms, and colours.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from worldr1_jax.splat import lists as tile_lists
from worldr1_jax.splat import tiles
from worldr1_jax.splat.projection import ALPHA_MAX, ALPHA_MIN, TRANSMITTANCE_MIN

NAME = "composite_tiles"
CHUNK = 128  # Gaussians of a step: the lanes of a register
# Rows of a tile's canvas: five features, transmittance, and the place where a pixel stopped.
_ROWS, _TRANSMITTANCE, _STOP = 8, tiles.CHANNELS, tiles.CHANNELS + 1
_RUNNING = -1.0  # a place in the round's list otherwise; exact in float32 below 2^24


def composite(
    grid: tile_lists.Grid,
    lists: tile_lists.Lists,
    canvas: tiles.Canvas,
    number: Int[Array, ""],
    record: bool,
) -> tiles.Canvas:
    """As `tiles.composite`; it always records."""
    del record
    pixels = grid.tile**2
    owner, chunk, blocks = _chunks(grid, lists)
    drawn = [
        canvas.features,
        jnp.abs(canvas.transmittance)[:, None],
        jnp.where(canvas.transmittance > 0, _RUNNING, 0.0)[:, None],
        jnp.zeros((grid.padded, 1, pixels)),
    ]
    basis = np.zeros((_ROWS, pixels), np.float32)
    basis[:6] = tiles.monomials(grid.pixels())
    out = _call(
        owner, chunk, blocks, jnp.asarray(basis), jnp.concatenate(drawn, axis=1),
        interpret=grid.kernel == "interpret",
    )  # fmt: skip
    place = out[:, _STOP].astype(jnp.int32)
    running = place < 0
    transmittance = jnp.where(running, out[:, _TRANSMITTANCE], -out[:, _TRANSMITTANCE])
    stopped_now = (canvas.transmittance > 0) & ~running
    stop = jnp.where(stopped_now, number * grid.pairs + place, canvas.stop)
    return tiles.Canvas(out[:, : tiles.CHANNELS], transmittance, stop)


def _chunks(
    grid: tile_lists.Grid, lists: tile_lists.Lists
) -> tuple[Int[Array, " W"], Int[Array, " W"], Float[Array, "W 16 128"]]:
    """Every list in chunks: the tile of each, its number within the tile (-1: none), and its rows,
    6 coefficients and 5 features a Gaussian.

    W is all that a round can need: a chunk begun by every tile, and its room in whole chunks.
    """
    many = grid.padded + grid.pairs // CHUNK
    count = -(-lists.length // CHUNK)
    ends = jnp.cumsum(count)
    owner = jnp.searchsorted(ends, jnp.arange(many), side="right").astype(jnp.int32)
    owner = jnp.minimum(owner, grid.padded - 1)
    chunk = jnp.arange(many, dtype=jnp.int32) - (ends - count)[owner]
    used = jnp.arange(many) < ends[-1]
    rows, _ = tiles.chunk_rows(grid, lists, owner, jnp.where(used, chunk, 0), CHUNK)
    columns = jnp.concatenate(
        [tiles.coefficients(rows), jnp.zeros_like(rows[..., :2]), tiles.features(rows)], axis=-1
    )
    columns = jnp.pad(columns, ((0, 0), (0, 0), (0, 16 - columns.shape[-1])))
    return owner, jnp.where(used, chunk, -1), columns.swapaxes(1, 2)


@partial(jax.jit, static_argnames="interpret")
def _call(
    owner: Int[Array, " W"],
    chunk: Int[Array, " W"],
    blocks: Float[Array, "W 16 128"],
    basis: Float[Array, "8 P"],
    canvas: Float[Array, "L 8 P"],
    *,
    interpret: bool,
) -> Float[Array, "L 8 P"]:
    _, rows, pixels = canvas.shape
    one_tile = pl.BlockSpec((1, rows, pixels), lambda step, owner, chunk: (owner[step], 0, 0))
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(canvas.shape, canvas.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=owner.shape,
            in_specs=[
                pl.BlockSpec((1, *blocks.shape[1:]), lambda step, owner, chunk: (step, 0, 0)),
                pl.BlockSpec(basis.shape, lambda step, owner, chunk: (0, 0)),
                one_tile,
            ],
            out_specs=one_tile,
        ),
        # Tiles without a chunk are never visited: they keep what was there.
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name=NAME,
    )(owner, chunk, blocks, basis, canvas)


def _kernel(owner, chunk, blocks, basis, before, canvas):
    """One chunk onto its tile's canvas [1 8 P]."""
    step = pl.program_id(0)
    new_tile = (step == 0) | (owner[step] != owner[jnp.maximum(step, 1) - 1])

    @pl.when(new_tile)
    def _():
        canvas[...] = before[...]

    @pl.when((chunk[step] >= 0) & (jnp.min(canvas[0, _STOP]) < 0))
    def _():
        exact = partial(
            jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        row = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0)
        column = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
        through = canvas[0, _TRANSMITTANCE : _TRANSMITTANCE + 1]
        stop = canvas[0, _STOP : _STOP + 1]
        alpha = jnp.minimum(ALPHA_MAX, jnp.exp(exact(blocks[0, :8].T, basis[...])))
        alpha = jnp.where(alpha >= ALPHA_MIN, alpha, 0.0)
        # The product over all Gaussians in front of each; logarithms of what is at least 1/1000.
        logs = jnp.log(1.0 - alpha)
        in_front = through * jnp.exp(exact((column < row).astype(jnp.float32), logs))
        behind = in_front * (1.0 - alpha)
        drawn = (behind > TRANSMITTANCE_MIN) & (stop < 0)
        weight = jnp.where(drawn, alpha * in_front, 0.0)
        canvas[0] = canvas[0] + exact(blocks[0, 8:], weight)  # rows 5 to 7 add nothing
        lowest = jnp.min(jnp.where(drawn, behind, 1.0), axis=0, keepdims=True)
        many = jnp.sum(drawn.astype(jnp.float32), axis=0, keepdims=True)
        first = (chunk[step] * CHUNK).astype(jnp.float32)
        stops = (stop < 0) & (many < CHUNK)
        canvas[0, _TRANSMITTANCE : _TRANSMITTANCE + 1] = jnp.minimum(through, lowest)
        canvas[0, _STOP : _STOP + 1] = jnp.where(stops, first + many, stop)
