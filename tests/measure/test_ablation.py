"""The table of the ablation, by hand."""

import numpy as np
import pytest

from tests.measure import ablation
from worldr1_jax import settings


def measures(value):
    return dict.fromkeys(ablation.SHOWN, np.full(40, value, np.float32))


def test_rows_are_compared_over_the_seeds_that_both_have():
    rows = {
        ablation.WHOLE: {0: measures(0.5), 1: measures(0.3)},
        "without S_traj": {1: measures(0.2), 2: measures(9.0)},
        "without the warp": {2: measures(1.0)},
    }
    _, _, whole, changed = ablation.table(rows).splitlines()
    assert whole.startswith(f"| {ablation.WHOLE} | 0, 1 | 0.40 | 0.400 |")
    assert changed.startswith("| without S_traj | 1 | 0.20 [-0.10, -0.10] | 0.200 [-0.100, -0.100]")


@pytest.mark.parametrize("arm", [ablation.BASE, *ablation.ARMS])
def test_every_row_has_a_config_that_is_right(arm):
    found = settings.read(ablation.config_of(arm, seed=3, updates=2))
    assert found.run.seed == 3 and found.run.num_updates == 2
