"""The paper's ablation on nano: the whole method, and what it is without each of its parts.

python -m tests.measure.ablation --workdir=runs/ablation              # some hours on two cores
python -m tests.measure.ablation --workdir=runs/ablation --seeds 1    # beside it, another seed
python -m tests.measure.ablation --workdir=runs/ablation --updates=0  # the table of what is there

Every row is a run of the README's recipe, with all of R_3D counted, and the fields of ARMS changed.
All are measured on the same held-out prompts and noise, at the guidance of the config. What has
been run is not run again. The table has, for every row, the change from the whole method, over
prompts and seeds, with a 95% interval; the base is what all of them start from.
"""

from __future__ import annotations

import argparse
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
from worldr1_jax.mesh.make import make_mesh

WEIGHTS = "rewards.weights."
COUNTED = {f"{WEIGHTS}recon": 1.0, f"{WEIGHTS}meta_view": 1.0}
NO_RECON, NO_META = {f"{WEIGHTS}recon": 0.0}, {f"{WEIGHTS}meta_view": 0.0}
# What captions are contrasted by is S_traj.
NO_TRAJECTORY = {f"{WEIGHTS}trajectory": 0.0, "algorithm.contrast": 0.0}
NO_PHASE = {"dynamic.dynamic_updates": 0}
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


def place(folder: Path, arm: str, seed: int) -> Path:
    """The workdir of a row's run."""
    return folder / f"{'-'.join(arm.replace(':', '').replace(',', '').split())}-{seed}"


def one(arm: str, seed: int, workdir: Path, updates: int, prompts: int) -> None:
    """Trains and measures one row, and writes its measures."""
    config = config_of(arm, seed, updates)
    found, mesh = settings.read(config), make_mesh({"data": 1}, jax.devices()[:1])
    adapters = None
    if arm != BASE:
        train.run(config, str(workdir))
        adapters = settings.load_adapters(found, [str(workdir)])
    pipeline = settings.build_pipeline(found, mesh, None, adapters)
    # Each row is measured by everything, whatever it learnt from.
    everything = settings.read(config_of(WHOLE, seed, updates))
    exam = held_out.Exam(
        settings.load_prompts(found).test[:prompts], jax.random.key(seed), samples=2, batch=16
    )
    measures, _ = held_out.measure(
        pipeline, settings.build_scorer(everything, mesh), pipeline.adapters, exam,
        guidance=found.sample.guidance, text_null=pipeline.negative(),
    )  # fmt: skip
    workdir.mkdir(parents=True, exist_ok=True)
    np.savez(workdir / "measured.npz", **measures)


def table(measured: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]) -> str:
    """Of every row, the means, and the changes from the whole method over the seeds of both."""
    lines = [f"| row | seeds | {' | '.join(SHOWN.values())} |", "| --- " * (len(SHOWN) + 2) + "|"]
    whole = measured[WHOLE]
    for arm, seeds in measured.items():
        common = sorted(seeds.keys() & whole.keys())
        if not common:
            continue
        cells = []
        for name in SHOWN:
            before, after = (np.concatenate([x[s][name] for s in common]) for x in (whole, seeds))
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
    parser.add_argument("--updates", type=int, default=40, help="of a run; 0: run nothing")
    parser.add_argument("--prompts", type=int, default=96, help="held-out, two videos each")
    args = parser.parse_args()
    for seed in args.seeds if args.updates else ():
        for arm in args.arms:
            workdir = place(args.workdir, arm, seed)
            if not (workdir / "measured.npz").exists():
                print(f"== {arm}, seed {seed}", flush=True)
                one(arm, seed, workdir, args.updates, args.prompts)
                jax.clear_caches()
    measured: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for arm in (BASE, *ARMS):
        for path in sorted(args.workdir.glob("*/measured.npz")):
            seed = int(path.parent.name.rpartition("-")[2])
            if path.parent == place(args.workdir, arm, seed):
                with np.load(path) as data:
                    measured.setdefault(arm, {})[seed] = dict(data)
    if WHOLE in measured:
        print(table(measured))


if __name__ == "__main__":
    main()
