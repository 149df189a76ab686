"""The before/after report: held-out prompts, deterministic sampling, the same noise for both
policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from worldr1_jax import sharding
from worldr1_jax.metrics import contact_sheet, paired_bootstrap_ci95, write_atomically
from worldr1_jax.pipeline import Pipeline
from worldr1_jax.rewards import NEEDS_3D, Reward
from worldr1_jax.rollout.sample import Sampler, sample_keys

Measures = dict[str, Float[np.ndarray, " N"]]


def measure(
    pipeline: Pipeline,
    reward: Reward,
    adapters: Any,
    prompts: Sequence[str],
    *,
    key: jax.Array,
    samples: int,
    batch: int,
    guidance: float,
    text_null: Array | None,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[Measures, Float[np.ndarray, "n F H W 3"]]:
    """Scores of every prompt, each the mean over `samples` videos; and the first batch's first
    videos.

    Args:
      key: the noise of video s of prompt p depends on (key, p, s) alone, so that two calls with one
        key are paired.
      samples: videos per prompt; with two or more, their mean RMS difference is the "diversity" in
        [0, 1].
      batch: prompts at a time; the last batch is filled up with repeats, which are not counted.
      guidance: of the classifier-free guidance.

    Returns:
      {"total_3d", every part of the reward, "mvcs", "diversity"} -> [N]; NaN where a video could
      not be scored.
    """
    sampler = Sampler(kind="none", guidance=guidance)
    collected: dict[str, list[np.ndarray]] = {}
    shown: list[np.ndarray] = []
    for first in range(0, len(prompts), batch):
        chosen = list(prompts[first : first + batch])
        filled = chosen + [chosen[-1]] * (batch - len(chosen))
        repeated = [p for p in filled for _ in range(samples)]
        keys = sample_keys(key, len(repeated), first=first * samples)
        paths = pipeline.paths(repeated)
        trajectory = pipeline.rollout(
            adapters, pipeline.encode(repeated), paths, keys, sampler=sampler, text_null=text_null
        )
        videos = pipeline.decode(trajectory.latents)
        scores = reward(videos, repeated, paths, consistency=True)
        parts = {name: sharding.to_host(values) for name, values in scores.parts.items()}
        parts["total_3d"] = np.sum([parts[name] for name in NEEDS_3D], axis=0)
        grouped = sharding.to_host(videos).reshape(batch, samples, *videos.shape[1:])
        shown.append(grouped[: len(chosen), 0])
        rows = {name: v.reshape(batch, samples).mean(1) for name, v in parts.items()}
        if samples > 1:
            rows["diversity"] = _diversity(grouped)
        for name, values in rows.items():
            collected.setdefault(name, []).append(values[: len(chosen)])
        progress(first + len(chosen))
    return {name: np.concatenate(values) for name, values in collected.items()}, shown[0]


def compare(
    pipeline: Pipeline,
    reward: Reward,
    adapters: Any,
    prompts: Sequence[str],
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    *,
    key: jax.Array,
    text_null: Array | None,
) -> dict[str, dict[str, Any]]:
    """Held-out prompts under the base policy and under `adapters`, on the same noise.

    Prints the table and writes videos/heldout_before.png and heldout_after.png.
    """
    held_out = list(prompts[: config.evaluate.prompts])
    options: dict[str, Any] = {
        "key": key,
        "samples": config.evaluate.samples,
        "batch": min(config.evaluate.batch, len(held_out)),
        "guidance": config.sample.guidance,
        "text_null": text_null,
    }
    before, old = measure(pipeline, reward, pipeline.adapters, held_out, **options)
    after, new = measure(pipeline, reward, adapters, held_out, **options)
    rows = report(before, after, config.seed)
    if jax.process_index() == 0:
        print(table(rows), flush=True)
        for name, videos in (("before", old), ("after", new)):
            sheet = contact_sheet(videos[:8], held_out[: len(videos)][:8])
            write_atomically(Path(workdir) / "videos" / f"heldout_{name}.png", sheet)
    return rows


def report(before: Measures, after: Measures, seed: int) -> dict[str, dict[str, Any]]:
    """`{metric: {before, after, paired_ci95, pairs}}`: means over the pairs that both could be
    scored."""
    rows = {}
    for name in before:
        both = np.isfinite(before[name]) & np.isfinite(after[name])
        first, second = before[name][both], after[name][both]
        rows[name] = {
            "before": float(first.mean()),
            "after": float(second.mean()),
            "paired_ci95": list(paired_bootstrap_ci95(first, second, seed)),
            "pairs": int(both.sum()),
        }
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The report as lines of text."""
    lines = [f"{'held-out metric':<16}{'before':>9}{'after':>9}   95% interval of the change"]
    for name, row in rows.items():
        low, high = row["paired_ci95"]
        lines.append(
            f"{name:<16}{row['before']:>9.4f}{row['after']:>9.4f}   [{low:+.4f}, {high:+.4f}]"
        )
    return "\n".join(lines)


def _diversity(videos: Float[np.ndarray, "N S F H W 3"]) -> Float[np.ndarray, " N"]:
    samples = videos.shape[1]
    pairs = [(i, j) for i in range(samples) for j in range(i)]
    axes = tuple(range(1, videos.ndim - 1))
    return np.mean([np.sqrt(((videos[:, i] - videos[:, j]) ** 2).mean(axes)) for i, j in pairs], 0)
