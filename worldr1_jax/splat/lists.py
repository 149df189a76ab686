"""A round's lists for `tiles`: which of the next Gaussians in depth order touch which tile.

A round takes as many Gaussians as make `pairs` pairs of a Gaussian and a tile that it touches, and
groups the pairs by tile: static shapes, whatever the scene, and no tile has a longest list.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from worldr1_jax.splat.projection import FEATURES, NUM_FEATURES, Projected

GROUP = 8  # tiles composited at once, of about equal lists
PAIRS_PER_TILE = 256  # default room of a round, per tile of the image
SLACK = 1e-3  # px added to a Gaussian's box, for rounding
ROW = FEATURES + NUM_FEATURES  # columns of a projected row


@dataclasses.dataclass(frozen=True)
class Grid:
    """The tiles of an image, and how much a round takes; hashable, so that it can be static."""

    size: tuple[int, int]  # height and width of the image, px
    tile: int  # side, px
    pairs: int  # room of a round
    rounds: int | None  # at most so many; None: until nothing is left
    kernel: str  # "xla", "pallas" or "interpret": who composites a round

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.size[0] // self.tile), -(-self.size[1] // self.tile)

    @property
    def tiles(self) -> int:
        """Tiles that cover the image."""
        return self.shape[0] * self.shape[1]

    @property
    def padded(self) -> int:
        """Tiles with those that fill up the last group; nothing ever touches these."""
        return -(-self.tiles // GROUP) * GROUP

    def most_rounds(self, count: int) -> int:
        """How many rounds `count` Gaussians can take: one touches no more than all tiles."""
        most = -(-count // max(1, min(count, self.pairs // self.tiles)))
        return most if self.rounds is None else min(most, self.rounds)

    def pixels(self) -> Float[np.ndarray, "P 2"]:
        """x and y of a tile's pixel centres, from the tile's centre; px."""
        y, x = np.mgrid[: self.tile, : self.tile] + 0.5 - self.tile / 2
        return np.stack([x.ravel(), y.ravel()], -1).astype(np.float32)

    def centres(self, tiles: Int[Array, "*b"]) -> Float[Array, "*b 2"]:
        """x and y of tiles' centres in the image; px."""
        corner = jnp.stack([tiles % self.shape[1], tiles // self.shape[1]], -1)
        return (corner.astype(jnp.float32) + 0.5) * self.tile


def make_grid(
    size: tuple[int, int], tile: int, pairs: int | None, rounds: int | None, kernel: str
) -> Grid:
    """A grid; raises ValueError for a round that could not hold one Gaussian over all tiles."""
    made = Grid((size[0], size[1]), tile, 0, rounds, kernel)
    wanted = PAIRS_PER_TILE * made.tiles if pairs is None else pairs
    if wanted < made.tiles:
        raise ValueError(
            f"pairs is {wanted}: a round has to hold one Gaussian over all {made.tiles} tiles"
        )
    return dataclasses.replace(made, pairs=wanted)


class Lists(NamedTuple):
    """One round: the Gaussians of every tile, in depth order."""

    rows: Float[Array, "S 10"]  # of the S Gaussians from the cursor on
    source: Int[Array, " S"]  # which Gaussians of the view these are
    member: Int[Array, " M"]  # into S, tile after tile
    start: Int[Array, " L"]  # first place of each tile in `member`
    length: Int[Array, " L"]
    taken: Int[Array, ""]  # Gaussians that this round covers; the rest of S waits


def boxes(
    grid: Grid, means: Float[Array, "S 2"], radii: Float[Array, "S 2"]
) -> tuple[Int[Array, "S 2"], Int[Array, "S 2"]]:
    """First and last tile (column, row) that holds a pixel centre within each Gaussian's box."""
    last = jnp.array([grid.shape[1] - 1, grid.shape[0] - 1], jnp.float32)
    reach = radii + SLACK
    low = jnp.ceil((means - reach + 0.5) / grid.tile - 1.0)
    high = jnp.floor((means + reach - 0.5) / grid.tile)
    return jnp.clip(low, 0, last + 1).astype(jnp.int32), jnp.clip(high, -1, last).astype(jnp.int32)


def touches(grid: Grid, open_tiles: Bool[Array, " L"], low: Array, high: Array) -> Array:
    """How many tiles each box covers; 0 where all of them are opaque."""
    counts = open_tiles[: grid.tiles].reshape(grid.shape).astype(jnp.int32)
    table = jnp.pad(jnp.cumsum(jnp.cumsum(counts, 0), 1), ((1, 0), (1, 0)))
    (x0, y0), (x1, y1) = low.T, high.T + 1
    at = partial(lax.platform_dependent, table, tpu=_entries_by_product, default=_entries)
    still_open = at(y1, x1) - at(y0, x1) - at(y1, x0) + at(y0, x0)
    area = jnp.maximum(x1 - x0, 0) * jnp.maximum(y1 - y0, 0)
    return jnp.where(still_open > 0, area, 0)


def _entries(table: Int[Array, "h w"], row: Int[Array, " S"], column: Int[Array, " S"]) -> Array:
    return table[row, column]


def _entries_by_product(table: Array, row: Array, column: Array) -> Array:
    """`_entries` for TPUs, where a gather costs by the row, and a small product nothing. Exact."""
    height, width = table.shape
    one = (jnp.arange(height)[:, None] == row).astype(jnp.float32)
    rows = jnp.matmul(table.T.astype(jnp.float32), one, precision=lax.Precision.HIGHEST)
    here = jnp.arange(width)[:, None] == column
    return jnp.sum(jnp.where(here, rows, 0.0), axis=0).astype(jnp.int32)


def table_of(view: Projected) -> Float[Array, "N 12"]:
    """Rows and radii beside each other, for one gather a round: on a TPU it costs by the row."""
    return jnp.concatenate([view.rows, view.radii], axis=-1)


def take(
    grid: Grid,
    table: Float[Array, "N 12"],
    order: Int[Array, " N+S"],
    visible: Int[Array, ""],
    cursor: Int[Array, ""],
    open_tiles: Bool[Array, " L"],
) -> Lists:
    """The next round's lists, from the Gaussian at `cursor` in depth order on, of a `table_of`."""
    slab = order.shape[0] - table.shape[0]
    source = lax.dynamic_slice_in_dim(order, cursor, slab)
    rows, radii = jnp.split(table[source], [ROW], axis=-1)
    low, high = boxes(grid, rows[:, :2], radii)
    exists = cursor + jnp.arange(slab) < visible
    count = jnp.where(exists, touches(grid, open_tiles, low, high), 0)
    ends = jnp.cumsum(count)
    begins, fits = ends - count, ends <= grid.pairs
    total = jnp.sum(jnp.where(fits, count, 0))
    # Pair m belongs to the last Gaussian that begins at or before m.
    mark = jnp.where(fits & (count > 0), begins, grid.pairs)
    owner = jnp.zeros(grid.pairs, jnp.int32)
    owner = owner.at[mark].max(jnp.arange(slab, dtype=jnp.int32), mode="drop")
    owner = lax.cummax(owner)
    # One gather of four numbers: on a TPU a gather costs by the row.
    width = jnp.maximum(high[:, 0] - low[:, 0] + 1, 1)
    begin, width, left, top = jnp.stack([begins, width, low[:, 0], low[:, 1]], axis=-1)[owner].T
    nth = jnp.arange(grid.pairs, dtype=jnp.int32) - begin
    tile = (top + nth // width) * grid.shape[1] + left + nth % width
    # Pairs that are not there belong to a tile behind the last one.
    tile = jnp.where(jnp.arange(grid.pairs) < total, tile, grid.padded).astype(jnp.int32)
    index, start, length = by_tile(tile, owner, slab, grid.padded)
    return Lists(rows, source, index, start, length, jnp.sum(fits))


def by_tile(
    tile: Int[Array, " M"], owner: Int[Array, " M"], slab: int, tiles: int
) -> tuple[Int[Array, " M"], Int[Array, " L"], Int[Array, " L"]]:
    """Owners sorted by tile, and where each tile begins and how many it has.

    Owners come and stay in ascending order. Sorted by XLA, except on CPUs, where its sort takes
    longer than all the rest of a round: there a place is counted in bit sets.
    """
    return lax.platform_dependent(
        tile, owner,
        cpu=partial(_count_into_tiles, slab=slab, tiles=tiles),
        default=partial(_sort_into_tiles, tiles=tiles),
    )  # fmt: skip


def _sort_into_tiles(tile: Array, owner: Array, *, tiles: int) -> tuple[Array, Array, Array]:
    tile, index = lax.sort((tile, owner), num_keys=1, is_stable=True)
    bounds = jnp.searchsorted(tile, jnp.arange(tiles + 1), side="left").astype(jnp.int32)
    return index, bounds[:-1], jnp.diff(bounds)


def _count_into_tiles(
    tile: Array, owner: Array, *, slab: int, tiles: int
) -> tuple[Array, Array, Array]:
    """A counting sort: one bit per tile and owner; bits before a pair's own are its place."""
    words = -(-slab // 32)
    word, bit = owner // 32, jnp.uint32(1) << (owner % 32).astype(jnp.uint32)
    sets = jnp.zeros((tiles, words), jnp.uint32).at[tile, word].add(bit, mode="drop")
    ones = lax.population_count(sets).astype(jnp.int32)
    before = jnp.cumsum(ones, axis=1) - ones
    length = jnp.sum(ones, axis=1)
    start = jnp.cumsum(length) - length
    at = jnp.minimum(tile, tiles - 1)
    place = start[at] + before[at, word]
    place = place + lax.population_count(sets[at, word] & (bit - 1)).astype(jnp.int32)
    place = jnp.where(tile < tiles, place, tile.shape[0])
    index = jnp.zeros(tile.shape, jnp.int32).at[place].set(owner, mode="drop")
    return index, start, length
