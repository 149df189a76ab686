"""What each algorithm gains on nano, and what it costs: in forwards of the policy and in seconds.

python -m tests.measure.algorithms --workdir=runs/algorithms              # hours on two cores
python -m tests.measure.algorithms --workdir=runs/algorithms --print --picture=cost.png

A row is `--config=configs/world.py:nano,NAME` as it is, but for its seed and its length, with the
same 32 videos in every update. Before the table of arms.py, which compares with the base, come
forward-equivalents for a video and update, and seconds an update of this machine, the median over
the updates. The picture has the reward that is learnt from, in the main phase, against both: the
mean over seeds and the last WINDOW updates.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import ml_collections
import numpy as np

from configs.world import get_config
from tests.measure import arms
from worldr1_jax import settings
from worldr1_jax.algorithms.base import ALGORITHMS, forward_equivalents

ROWS = (arms.BASE, "fast", *ALGORITHMS)
WINDOW = 8
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


def picture(args: argparse.Namespace, measured: arms.Measured, path: Path) -> None:
    """Reward against forwards and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = arms.Size(args.updates, args.prompts)
    _, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for row in (row for row in measured if row != arms.BASE):
        runs = [updates_of(size.place(args.workdir, row, seed)) for seed in measured[row]]
        length = min(map(len, runs))
        reward = np.mean([[u["reward"] for u in updates[:length]] for updates in runs], axis=0)
        mean = np.convolve(reward, np.full(WINDOW, 1 / WINDOW), "valid")
        done = np.arange(WINDOW, length + 1)
        each = statistics.mean(map(seconds, runs))
        for panel, unit in zip(panels, (forwards(row), each), strict=True):
            panel.plot(done * unit, mean, label=row)
    panels[0].set(xlabel="forward-equivalents a video", ylabel="reward that is learnt from")
    panels[1].set(xlabel="seconds")
    panels[1].legend()
    plt.savefig(path, dpi=100)


def main() -> None:
    """Runs what has not been run, and prints the table of all that has."""
    parser = arms.parser(__doc__.splitlines()[0], ROWS, updates=32)
    parser.add_argument("--picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    measured = arms.run(args, config_of)
    size = arms.Size(args.updates, args.prompts)
    print("| row | forwards a video and update | seconds an update |\n| --- | --- | --- |")
    for row in (row for row in measured if row != arms.BASE):
        taken = [seconds(updates_of(size.place(args.workdir, row, s))) for s in measured[row]]
        print(f"| {row} | {forwards(row)} | {statistics.mean(taken):.1f} |")
    if arms.BASE in measured:
        print("\n".join(["", *arms.table(measured, arms.BASE, SHOWN)]))
    if args.picture:
        picture(args, measured, args.picture)


if __name__ == "__main__":
    main()
