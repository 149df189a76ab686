"""Every algorithm by its own config, through the whole loop."""

import json
import math
from pathlib import Path

import pytest

from tests import tiny
from worldr1_jax import train
from worldr1_jax.algorithms import base


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,changes",
    [
        *((name, {}) for name in base.ALGORITHMS),
        ("grpo", {"algorithm.share": "prefix", "algorithm.window_place": "group"}),
        ("nft", {"algorithm.solver": "unipc", "sample.guidance": 3.0, "algorithm.absorb": False}),
        ("awm", {"sample.guidance": 3.0, "advantage.rewards": "each"}),
        ("nft", {"algorithm.contrast": 4.0, "dynamic.main_updates": 1}),
    ],
)
def test_learns_from_two_rollouts(weights, one_device, tmp_path, name, changes):
    config = tiny.config(
        weights, f"nano,{name}", num_updates=2, **{"evaluate.prompts": 0}, **changes
    )  # fmt: skip
    train.run(config, str(tmp_path / "run"))
    lines = Path(tmp_path, "run", "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert row["grad_norm"] > 0 and row["skipped"] == 0
        assert all(math.isfinite(row[key]) for key in ("loss", "policy_loss", "eps_share"))
        assert ("kl" in row) == (config.algorithm.kl_weight > 0)  # not 0 where it is not measured
        assert row.get("ratio_deviation_first", 0.0) <= 1e-6
