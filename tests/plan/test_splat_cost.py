"""The cost model of the renderer: hand numbers, and what it has to grow with."""

import jax
import jax.numpy as jnp
import pytest

from worldr1_jax.plan import splat_cost
from worldr1_jax.splat import lists as tile_lists

FULL = {"gaussians": 12_002_256, "size": (294, 504), "views": 81, "rounds": 50}


def test_rows_by_hand():
    """A gather of 5 rows, a scatter of 4, and a gather of 3 in each of 6 turns."""

    def program(table, index):
        taken = table[index]
        table = table.at[jnp.arange(4)].add(1.0)
        turns = jax.lax.scan(lambda s, _: (s + table[index[:3]].sum(), None), 0.0, None, length=6)
        return taken.sum() + turns[0]

    jaxpr = jax.make_jaxpr(program)(jnp.ones((9, 2)), jnp.arange(5)).jaxpr
    assert splat_cost.moved_rows(jaxpr) == 5 + 4 + 6 * 3


def test_sorting_by_hand():
    """2^10 keys: one register, 55 stages."""
    assert splat_cost.sort_cycles(1024) == pytest.approx(55 * splat_cost.SORT_CYCLES)


def test_a_round_moves_its_gaussians_and_its_pairs():
    grid = tile_lists.make_grid(FULL["size"], 16, None, None, "pallas")
    rows, steps = splat_cost.round_counts(grid, FULL["gaussians"])
    assert steps == 608 + grid.pairs // 128
    # Rows, radii, and what a pair has to know of its Gaussian; chunks that every tile fills up.
    assert 4 * grid.pairs < rows < 20 * grid.pairs


def test_seconds_follow_views_and_gaussians():
    whole = splat_cost.video("v5e", **FULL)
    assert whole["total"] == pytest.approx(sum(v for k, v in whole.items() if k != "total"))
    half = splat_cost.video("v5e", **FULL | {"views": 40.5})
    assert half["total"] == pytest.approx(whole["total"] / 2)
    thinned = splat_cost.video("v5e", **FULL | {"gaussians": FULL["gaussians"] // 9, "rounds": 6})
    assert thinned["total"] < whole["total"] / 5
    bound = splat_cost.video("v5e", **FULL | {"rounds": None})
    # 12 million Gaussians, 1.72 tiles each, 155,648 pairs a round
    assert bound["kernel"] == pytest.approx(whole["kernel"] * 132.8 / 50, rel=1e-3)
    with pytest.raises(ValueError, match="chip is 'v9'"):
        splat_cost.video("v9", **FULL)
