"""What each algorithm gains on nano, and what it costs: in forwards of the policy and in seconds.

python -m tests.measure.algorithms --workdir=runs/algorithms              # hours on two cores
python -m tests.measure.algorithms --workdir=runs/algorithms --print --picture=cost.png

A row is `--config=configs/world.py:nano,NAME` as it is, but for its seed and its length, with the
same 32 videos in every update. Before the table of arms.py, which compares with the base, come
forward-equivalents for a video and update, and seconds an update of this machine, the median over
the updates. The picture (it takes matplotlib) has what the weighted reward of held-out prompts has
gained at the end, with its 95% interval, against both. The reward of the training videos would not
tell: it is of other prompts in every update, which differ by more than any algorithm gains.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import ml_collections
import numpy as np

from configs.world import get_config
from tests.measure import arms
from worldr1_jax import settings
from worldr1_jax.algorithms.base import ALGORITHMS, forward_equivalents
from worldr1_jax.evaluation.statistics import paired_bootstrap_ci95

ROWS = (arms.BASE, "fast", *ALGORITHMS)
SHOWN = {
    name: arms.SHOWN[name] for name in ("trajectory", "recon", "general", "change", "diversity")
}


def config_of(row: str, seed: int, updates: int) -> ml_collections.ConfigDict:
    """The config of a row."""
    config = get_config("nano" if row == arms.BASE else f"nano,{row}")
    config.seed, config.num_updates, config.evaluate.prompts = seed, updates, 0
    return config


def forwards(row: str) -> int:
    """For a video and update."""
    found = settings.read(config_of(row, 0, 1))
    return forward_equivalents(found.algorithm, found.sample.steps, found.sample.guidance)


def updates_of(workdir: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of each update of the main phase."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [found for found in map(json.loads, lines) if not found["dynamic"]]


def seconds(updates: list[dict[str, float]]) -> float:
    """Of one update, without those that compile."""
    taken = [sum(v for k, v in u.items() if k.startswith("seconds/")) for u in updates]
    return statistics.median(taken)


def rewarded(row: str, measures: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the row learns from, weighted, of each prompt."""
    weights = settings.read(config_of(row, 0, 1)).rewards.weights
    return np.sum([weight * measures[name] for name, weight in weights.items() if weight], axis=0)


def gain(row: str, measured: arms.Measured) -> tuple[float, float, float]:
    """Of a row over the base, and its 95% interval over prompts, of seeds that both have."""
    seeds = measured[row].keys() & measured[arms.BASE].keys()
    before, after = (
        np.mean([rewarded(row, measured[x][seed]) for seed in seeds], axis=0)
        for x in (arms.BASE, row)
    )
    both = np.isfinite(before) & np.isfinite(after)
    return np.mean((after - before)[both]), *paired_bootstrap_ci95(before[both], after[both], 0)


def picture(costs: Mapping[str, tuple[float, float]], measured: arms.Measured, path: Path) -> None:
    """Gains against forwards and against seconds, of whole runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for number, (row, cost) in enumerate(costs.items()):
        middle, low, high = gain(row, measured)
        for panel, spent in zip(panels, cost, strict=True):
            panel.plot([0, spent], [0, middle], color=f"C{number}", alpha=0.3)
            panel.errorbar(
                spent, middle, [[middle - low], [high - middle]], color=f"C{number}", fmt="o",
                capsize=4, label=row,
            )  # fmt: skip
    panels[0].set(xlabel="forward-equivalents a video", ylabel="gain of the held-out reward")
    panels[1].set(xlabel="seconds of training")
    panels[1].legend()
    for panel in panels:
        panel.axhline(0, color="grey", linewidth=0.8)
    plt.savefig(path, dpi=100)


def main() -> None:
    """Runs what has not been run, and prints the table of all that has."""
    parser = arms.parser(__doc__.splitlines()[0], ROWS, updates=32)
    parser.add_argument("--picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    measured = arms.run(args, config_of)
    size = arms.Size(args.updates, args.prompts)
    costs = {}
    print("| row | forwards a video and update | seconds an update |\n| --- | --- | --- |")
    for row in (row for row in measured if row != arms.BASE):
        taken = [seconds(updates_of(size.place(args.workdir, row, s))) for s in measured[row]]
        each = forwards(row), statistics.mean(taken)
        costs[row] = each[0] * args.updates, each[1] * args.updates
        print(f"| {row} | {each[0]} | {each[1]:.1f} |")
    if arms.BASE not in measured:
        return
    print("\n".join(["", *arms.table(measured, arms.BASE, SHOWN)]))
    if args.picture:
        picture(costs, measured, args.picture)


if __name__ == "__main__":
    main()
