"""What rendering a video costs on one TPU core: a stated model, not a measurement.

    splat_cost.video("v5e", gaussians=12_002_256, size=(294, 504), views=81)

A view projects all Gaussians, sorts them by depth, and then takes rounds (`tiles`): a round gathers
its Gaussians, lists them by tile and runs the kernel. What is counted, and how it becomes cycles:

  - Gaussians projected: PROJECT_CYCLES each, the TPU compiler's own estimate of that program;
  - rows gathered and scattered, counted in the traced programs: GATHER_CYCLES each, from the
    schedule that the compiler makes for such a gather, 680 bundles for 128 rows; waiting for memory
    is not in it;
  - keys sorted, by a sorting network, which is what XLA makes on TPUs: log2(n) (log2(n) + 1) / 2
    stages, each SORT_CYCLES for a register of 1,024 keys. An assumption;
  - steps of the kernel: KERNEL_CYCLES each, the bundles of its final schedule, all of them.

The bundles come out of LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true" in front
of tests/splat/test_splat_tpu.py. Elementwise work on a round's lists, and the products that look up
open tiles, are not counted. No figure of this has met a chip.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from worldr1_jax.mesh.chips import CHIPS
from worldr1_jax.plan.flops import sub_jaxprs
from worldr1_jax.splat import kernel as tile_kernel
from worldr1_jax.splat import lists as tile_lists
from worldr1_jax.splat import tiles

PROJECT_CYCLES = 8.3  # a Gaussian with harmonics of degree 2, v5e; a million of them: 5.5 ms
GATHER_CYCLES = 680 / 128  # a row, v5e
SORT_CYCLES = 8.0  # a stage and register: a rotation, two comparisons, selects of key and index
REGISTER = 1024  # keys of 32 bits
RADIUS = 2.5  # px, half a box: 3.33 deviations of a Gaussian as wide as a pixel, smoothed
KERNEL_CYCLES = 996.0  # a chunk of 128 Gaussians on a tile of 16x16, v5e


def video(
    chip: str,
    *,
    gaussians: int,
    size: tuple[int, int],
    views: int,
    rounds: float | None = None,
    tile: int = 16,
    pairs: int | None = None,
) -> dict[str, float]:
    """Seconds of `views` views of one scene on one core, by term, and their "total".

    Args:
      chip: of `chips.CHIPS`; its clock is used. Cycles are those of v5e.
      gaussians: of the scene, all of which every view projects and sorts.
      size: height and width of a view, px.
      rounds: that a view takes, as a run of the scene shows (tests/measure/splat.py); None takes
        `most_rounds`, where no tile is opaque before its last Gaussian.
      tile, pairs: as in `splat.render`.

    Raises:
      ValueError: a chip that is not known.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip is '{chip}': it knows {', '.join(CHIPS)}")
    grid = tile_lists.make_grid(size, tile, pairs, None, "pallas")
    rows, steps = round_counts(grid, gaussians)
    rounds = most_rounds(grid, gaussians) if rounds is None else rounds
    cycles = {
        "project": PROJECT_CYCLES * gaussians,
        "sort by depth": sort_cycles(gaussians),
        "gathers of rounds": rounds * GATHER_CYCLES * rows,
        "sorts of rounds": rounds * (sort_cycles(grid.pairs) + sort_cycles(grid.padded)),
        "kernel": rounds * KERNEL_CYCLES * (tile / 16) ** 2 * steps,
    }
    seconds = {name: views * count / CHIPS[chip].clock for name, count in cycles.items()}
    return seconds | {"total": sum(seconds.values())}


def most_rounds(grid: tile_lists.Grid, gaussians: int) -> float:
    """Rounds of a view that has every Gaussian inside and draws all of it; a bound for Gaussians
    of up to RADIUS, which touch (1 + 2 RADIUS / tile)^2 tiles on average.

    tests/measure/splat.py has counted 79 and 96 on a small scene, where the bound is 139.
    """
    return gaussians * (1 + 2 * RADIUS / grid.tile) ** 2 / grid.pairs


def sort_cycles(keys: int) -> float:
    """Cycles to sort `keys` with their indices."""
    stages = math.ceil(math.log2(max(keys, 2)))
    return SORT_CYCLES * keys / REGISTER * stages * (stages + 1) / 2


def round_counts(grid: tile_lists.Grid, gaussians: int) -> tuple[int, int]:
    """Rows gathered or scattered in a round, and steps of its kernel, from the traced programs."""

    def shape(*dims: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype)

    slab = min(gaussians, grid.pairs)
    table = shape(gaussians, tile_lists.ROW + 2)
    number, order = shape(dtype=jnp.int32), shape(gaussians + slab, dtype=jnp.int32)
    opened = shape(grid.padded, dtype=jnp.bool_)

    def listed(table, order, visible, cursor, opened):
        return tile_lists.take(grid, table, order, visible, cursor, opened)

    def drawn(lists, canvas, number):
        return tile_kernel.composite(grid, lists, canvas, number, False)

    arguments = (table, order, number, number, opened)
    lists = jax.eval_shape(listed, *arguments)
    canvas = jax.eval_shape(lambda: tiles.blank(grid.padded, grid.tile**2))
    traced = [jax.make_jaxpr(listed)(*arguments), jax.make_jaxpr(drawn)(lists, canvas, number)]
    rows = sum(moved_rows(one.jaxpr) for one in traced)
    return rows, grid.padded + grid.pairs // tile_kernel.CHUNK


def moved_rows(jaxpr: Any) -> int:
    """Rows that the gathers and scatters of a program move, loops multiplied out.

    What depends on the platform is left out: there TPUs sort, and CPUs count (see `by_tile`).
    """
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "gather" or name.startswith("scatter"):
            total += math.prod(equation.invars[1].aval.shape[:-1])
        elif name not in ("cond", "pallas_call"):
            times = equation.params["length"] if name == "scan" else 1
            total += times * sum(moved_rows(inner) for inner in sub_jaxprs(equation.params))
    return total
