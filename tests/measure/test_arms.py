"""Tables of comparisons, by hand; and the configs of their rows."""

import json

import numpy as np
import pytest

from tests.measure import ablation, algorithms, arms
from worldr1_jax import settings


def measures(value):
    return dict.fromkeys(arms.SHOWN, np.full(40, value, np.float32))


def test_rows_are_compared_over_the_seeds_that_both_have():
    rows = {
        ablation.WHOLE: {0: measures(0.5), 1: measures(0.3)},
        "without S_traj": {1: measures(0.2), 2: measures(9.0)},
        "without the warp": {2: measures(1.0)},
    }
    _, _, whole, changed = arms.table(rows, ablation.WHOLE)
    assert whole.startswith(f"| {ablation.WHOLE} | 0, 1 | 0.40 | 0.400 |")
    assert changed.startswith("| without S_traj | 1 | 0.20 [-0.10, -0.10] | 0.200 [-0.100, -0.100]")


@pytest.mark.parametrize(
    ("rows", "row"), [(c, row) for c in (ablation, algorithms) for row in c.ROWS]
)
def test_every_row_has_a_config_that_is_right(rows, row):
    found = settings.read(rows.config_of(row, seed=3, updates=2))
    assert found.run.seed == 3 and found.run.num_updates == 2
    assert found.run.groups * found.run.group_size == 32


def test_what_an_update_takes_is_that_of_the_main_phase(tmp_path):
    lines = [
        {"dynamic": 0, "seconds/rollout": 90.0, "seconds/update": 9.0},  # compiles
        {"dynamic": 0, "seconds/rollout": 1.0, "seconds/update": 2.0},
        {"dynamic": 1, "seconds/rollout": 0.1, "seconds/update": 0.2},
        {"dynamic": 0, "seconds/rollout": 1.0, "seconds/update": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    updates = algorithms.updates_of(tmp_path)
    assert len(updates) == 3 and algorithms.seconds(updates) == 3.5


def test_a_gain_is_of_the_weighted_reward_and_of_seeds_that_the_base_has():
    def of(trajectory, hps):
        found = {"trajectory": trajectory, "hps": hps}  # hps is the R_gen of nano
        return measures(9.0) | {k: np.full(40, v, np.float32) for k, v in found.items()}

    rows = {arms.BASE: {0: of(0.3, 0.8)}, "fast": {0: of(0.4, 0.9), 1: of(0.9, 0.9)}}
    np.testing.assert_allclose(algorithms.gain("fast", rows), [0.15] * 3, rtol=1e-5)
