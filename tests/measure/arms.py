"""Rows of a comparison: runs of nano that differ in some fields, all measured on the same held-out
prompts and noise, by the same rewards, at the guidance of their config."""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from configs.world import get_config
from worldr1_jax import settings, train
from worldr1_jax.evaluation import held_out
from worldr1_jax.evaluation.statistics import paired_bootstrap_ci95
from worldr1_jax.files import write_atomically
from worldr1_jax.mesh.make import make_mesh

MEASURED = "measured.npz"
BASE = "base, untrained"
COUNTED = {"rewards.weights.recon": 1.0, "rewards.weights.meta_view": 1.0}
SHOWN = {
    "psnr": "PSNR, dB", "recon": "S_recon", "trajectory": "S_traj", "meta_view": "S_meta",
    "general": "R_gen", "change": "movement", "texture": "texture", "diversity": "diversity",
}  # fmt: skip
Measured = dict[str, dict[int, dict[str, np.ndarray]]]  # {row: {seed: {measure: [prompts]}}}
Configs = Callable[[str, int, int], ml_collections.ConfigDict]  # of (row, seed, updates)


@dataclasses.dataclass(frozen=True)
class Size:
    """How long a run is, and on how many prompts it is measured."""

    updates: int
    prompts: int

    def place(self, folder: Path, row: str, seed: int) -> Path:
        """The workdir of a row's run."""
        name = "-".join(row.replace(":", "").replace(",", "").split())
        return folder / f"{self.updates}-updates-{self.prompts}-prompts" / f"{name}-{seed}"


def one(config: ml_collections.ConfigDict, size: Size, workdir: Path, *, trained: bool) -> None:
    """Trains a row, unless it is the base, measures it, and writes its measures."""
    found, mesh = settings.read(config), make_mesh({"data": 1}, jax.devices()[:1])
    adapters = None
    if trained:
        summary = train.run(config, str(workdir))
        if not summary:
            raise SystemExit("stopped; the same command goes on")
        if summary["updates"] < size.updates:
            print(f"ended after update {summary['updates']}: {summary['ended']}", flush=True)
        adapters = settings.load_adapters(found, [str(workdir)])
    pipeline = settings.build_pipeline(found, mesh, None, adapters)
    # Each row is measured by everything, whatever it learnt from.
    everything = get_config("nano")
    everything.update_from_flattened_dict(COUNTED)
    prompts = settings.load_prompts(found).test[: size.prompts]
    exam = held_out.Exam(prompts, jax.random.key(found.run.seed), samples=2, batch=16)
    measures, _ = held_out.measure(
        pipeline, settings.build_scorer(settings.read(everything), mesh), pipeline.adapters, exam,
        guidance=found.sample.guidance, text_null=pipeline.negative(),
    )  # fmt: skip
    kept = io.BytesIO()
    np.savez(kept, **measures)  # type: ignore[arg-type]
    write_atomically(workdir / MEASURED, kept.getvalue())


def table(measured: Measured, reference: str, shown: Mapping[str, str] = SHOWN) -> list[str]:
    """Lines of means over prompts and seeds, with 95% intervals of the change from the reference
    row: of the prompts, each the mean over the seeds that both rows have."""
    lines = [f"| row | seeds | {' | '.join(shown.values())} |", "| --- " * (len(shown) + 2) + "|"]
    whole = measured[reference]
    for row, seeds in measured.items():
        common = sorted(seeds.keys() & whole.keys())
        if not common:
            continue
        cells = []
        for name in shown:
            before, after = (np.mean([x[s][name] for s in common], axis=0) for x in (whole, seeds))
            both = np.isfinite(before) & np.isfinite(after)
            digits = 2 if name == "psnr" else 4 if name in ("texture", "change") else 3
            cell = f"{after[both].mean():.{digits}f}"
            if row != reference:
                low, high = paired_bootstrap_ci95(before[both], after[both], 0)
                cell += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(cell)
        lines.append(f"| {row} | {', '.join(map(str, common))} | {' | '.join(cells)} |")
    return lines


def parser(description: str, rows: Sequence[str], updates: int) -> argparse.ArgumentParser:
    """Arguments of a command that runs rows."""
    asked = argparse.ArgumentParser(description=description)
    asked.add_argument("--workdir", type=Path, required=True)
    asked.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked.add_argument("--rows", nargs="+", default=[*rows], choices=[*rows])
    asked.add_argument("--updates", type=int, default=updates, help="of a run")
    asked.add_argument("--prompts", type=int, default=96, help="held-out, two videos each")
    asked.add_argument("--print", action="store_true", help="what is there alone; run nothing")
    return asked


def run(args: argparse.Namespace, config_of: Configs) -> Measured:
    """Runs the rows that have not been run; what all of them measured."""
    size, measured = Size(args.updates, args.prompts), {}
    for seed, row in itertools.product(args.seeds, args.rows):
        workdir = size.place(args.workdir, row, seed)
        if not (workdir / MEASURED).exists() and not args.print:
            print(f"== {row}, seed {seed}", flush=True)
            one(config_of(row, seed, size.updates), size, workdir, trained=row != BASE)
            jax.clear_caches()
        if (workdir / MEASURED).exists():
            with np.load(workdir / MEASURED) as data:
                measured.setdefault(row, {})[seed] = dict(data)
    return measured
