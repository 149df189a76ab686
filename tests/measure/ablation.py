"""The paper's ablation on nano: the whole method, and what it is without each of its parts.

python -m tests.measure.ablation --workdir=runs/ablation              # some hours on two cores
python -m tests.measure.ablation --workdir=runs/ablation --seeds 1    # beside it, another seed
python -m tests.measure.ablation --workdir=runs/ablation --print      # the table of what is there

Every row is a run of the README's recipe, with all of R_3D counted, and the fields of ARMS changed.
All are measured on the same held-out prompts and noise, at the guidance of the config. What has
been run is not run again. The table has the mean of every row over prompts and seeds, and a 95%
interval of its change from the whole method: of the prompts, each the mean over the seeds of both.
How trainings differ is not in it; the seeds one by one (--seeds) show that.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from configs.world import get_config
from worldr1_jax import settings, train
from worldr1_jax.evaluation import held_out
from worldr1_jax.evaluation.statistics import paired_bootstrap_ci95
from worldr1_jax.files import write_atomically
from worldr1_jax.mesh.make import make_mesh

WEIGHTS = "rewards.weights."
COUNTED = {f"{WEIGHTS}recon": 1.0, f"{WEIGHTS}meta_view": 1.0}
NO_RECON, NO_META = {f"{WEIGHTS}recon": 0.0}, {f"{WEIGHTS}meta_view": 0.0}
# What captions are contrasted by is S_traj.
NO_TRAJECTORY = {f"{WEIGHTS}trajectory": 0.0, "algorithm.contrast": 0.0}
NO_PHASE = {"dynamic.dynamic_updates": 0}
MEASURED = "measured.npz"
WHOLE, BASE = "the whole method", "base, untrained"
ARMS: Mapping[str, Mapping[str, Any]] = {
    WHOLE: {},
    "without S_recon": NO_RECON,
    "without S_meta": NO_META,
    "without S_traj": NO_TRAJECTORY,
    "without R_3D": NO_RECON | NO_META | NO_TRAJECTORY,
    "without R_gen, and so without the phase": {f"{WEIGHTS}general": 0.0} | NO_PHASE,
    "without the periodic phase": NO_PHASE,
    "without the warp": {"camera.mode": "none"},
    "without S_recon and S_meta: nano's default": NO_RECON | NO_META,
}
SHOWN = {
    "psnr": "PSNR, dB", "recon": "S_recon", "trajectory": "S_traj", "meta_view": "S_meta",
    "general": "R_gen", "change": "movement", "texture": "texture", "diversity": "diversity",
}  # fmt: skip


def config_of(arm: str, seed: int, updates: int) -> ml_collections.ConfigDict:
    """The config of a row."""
    config = get_config("nano")
    with config.unlocked():
        config.update_from_flattened_dict(COUNTED | ARMS.get(arm, {}))
        config.seed, config.num_updates, config.evaluate.prompts = seed, updates, 0
    return config


@dataclasses.dataclass(frozen=True)
class Size:
    """How long a run is, and on how many prompts it is measured."""

    updates: int
    prompts: int

    def place(self, folder: Path, arm: str, seed: int) -> Path:
        """The workdir of a row's run."""
        name = "-".join(arm.replace(":", "").replace(",", "").split())
        return folder / f"{self.updates}-updates-{self.prompts}-prompts" / f"{name}-{seed}"


def one(arm: str, seed: int, size: Size, workdir: Path) -> None:
    """Trains and measures one row, and writes its measures."""
    config = config_of(arm, seed, size.updates)
    found, mesh = settings.read(config), make_mesh({"data": 1}, jax.devices()[:1])
    adapters = None
    if arm != BASE:
        summary = train.run(config, str(workdir))
        if not summary:
            raise SystemExit("stopped; the same command goes on")
        if summary["updates"] < size.updates:
            print(f"ended after update {summary['updates']}: {summary['ended']}", flush=True)
        adapters = settings.load_adapters(found, [str(workdir)])
    pipeline = settings.build_pipeline(found, mesh, None, adapters)
    # Each row is measured by everything, whatever it learnt from.
    everything = settings.read(config_of(WHOLE, seed, size.updates))
    prompts = settings.load_prompts(found).test[: size.prompts]
    exam = held_out.Exam(prompts, jax.random.key(seed), samples=2, batch=16)
    measures, _ = held_out.measure(
        pipeline, settings.build_scorer(everything, mesh), pipeline.adapters, exam,
        guidance=found.sample.guidance, text_null=pipeline.negative(),
    )  # fmt: skip
    kept = io.BytesIO()
    np.savez(kept, **measures)  # type: ignore[arg-type]
    write_atomically(workdir / MEASURED, kept.getvalue())


def table(measured: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]) -> str:
    """Rows of {row: {seed: {measure: [N]}}}, as the module says."""
    lines = [f"| row | seeds | {' | '.join(SHOWN.values())} |", "| --- " * (len(SHOWN) + 2) + "|"]
    whole = measured[WHOLE]
    for arm, seeds in measured.items():
        common = sorted(seeds.keys() & whole.keys())
        if not common:
            continue
        cells = []
        for name in SHOWN:
            before, after = (np.mean([x[s][name] for s in common], axis=0) for x in (whole, seeds))
            both = np.isfinite(before) & np.isfinite(after)
            digits = 2 if name == "psnr" else 4 if name in ("texture", "change") else 3
            cell = f"{after[both].mean():.{digits}f}"
            if arm != WHOLE:
                low, high = paired_bootstrap_ci95(before[both], after[both], 0)
                cell += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(cell)
        lines.append(f"| {arm} | {', '.join(map(str, common))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what has not been run, and prints the table of all that has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[BASE, *ARMS], choices=[BASE, *ARMS])
    parser.add_argument("--updates", type=int, default=40, help="of a run")
    parser.add_argument("--prompts", type=int, default=96, help="held-out, two videos each")
    parser.add_argument("--print", action="store_true", help="the table alone; run nothing")
    args = parser.parse_args()
    size = Size(args.updates, args.prompts)
    measured: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for seed, arm in itertools.product(args.seeds, args.arms):
        workdir = size.place(args.workdir, arm, seed)
        if not (workdir / MEASURED).exists() and not args.print:
            print(f"== {arm}, seed {seed}", flush=True)
            one(arm, seed, size, workdir)
            jax.clear_caches()
        if (workdir / MEASURED).exists():
            with np.load(workdir / MEASURED) as data:
                measured.setdefault(arm, {})[seed] = dict(data)
    if WHOLE in measured:
        print(table(measured))


if __name__ == "__main__":
    main()
