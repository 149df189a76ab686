"""The before/after report: held-out prompts, deterministic sampling, the same noise for both
policies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from worldr1_jax.evaluation.statistics import paired_bootstrap_ci95
from worldr1_jax.files import write_atomically
from worldr1_jax.media import contact_sheet
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.policies.stages import Pipeline
from worldr1_jax.rewards.scorer import NEEDS_3D, Reward
from worldr1_jax.rollout.sample import Sampler, sample_keys

Measures = dict[str, Float[np.ndarray, " N"]]
SHOWN = 8  # prompts of which the contact sheet has a video


def measure(
    pipeline: Pipeline,
    reward: Reward,
    adapters: Any,
    prompts: Sequence[str],
    *,
    key: jax.Array,
    samples: int,
    batch: int,
    at_once: int,
    guidance: float,
    text_null: Array | None,
) -> tuple[Measures, Float[np.ndarray, "n F H W 3"]]:
    """Scores of every prompt, each the mean over `samples` videos; and a video of each of the first
    SHOWN prompts.

    Videos are decoded as they are scored, and go to the host one by one; a prompt's wait there
    until all of them are made.

    Args:
      key: the noise of video s of prompt p depends on (key, p, s) alone, so that two calls with one
        key are paired.
      samples: videos per prompt; with two or more, their mean RMS difference is the "diversity" in
        [0, 1].
      batch: prompts at a time, or so many more that the mesh can divide their videos; the last
        batch is filled up with repeats, which are not counted.
      at_once: videos that a device takes at a time, as pipeline and reward have it; 0: all.
      guidance: of the classifier-free guidance.

    Returns:
      {"total_3d", every part of the reward, "mvcs", "diversity"} -> [N]; NaN where a video could
      not be scored.
    """
    sampler = Sampler(kind="none", guidance=guidance)
    batch = whole_batch(batch, samples, sharding.batch_parts(pipeline.mesh), at_once)
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
        seen = _Seen(pipeline, len(chosen), samples, keep=SHOWN - len(shown))
        scores = reward(
            trajectory.latents, repeated, paths, decode=seen.decode, consistency=True
        )  # fmt: skip
        shown += [seen.kept[prompt] for prompt in sorted(seen.kept)]
        parts = {name: arrays.to_host(values) for name, values in scores.parts.items()}
        parts["total_3d"] = np.sum([parts[name] for name in NEEDS_3D], axis=0)
        rows = {name: v.reshape(batch, samples).mean(1) for name, v in parts.items()}
        if samples > 1:
            rows["diversity"] = seen.diversity
        for name, values in rows.items():
            collected.setdefault(name, []).append(values[: len(chosen)])
    return {name: np.concatenate(values) for name, values in collected.items()}, np.stack(shown)


def whole_batch(prompts: int, samples: int, parts: int, at_once: int) -> int:
    """The next number of prompts whose videos, `samples` each, the mesh's `parts` divide, and of
    which a device takes `at_once` at a time (0: all)."""
    while True:
        mine, rest = divmod(prompts * samples, parts)
        if not rest and (not at_once or mine <= at_once or mine % at_once == 0):
            return prompts
        prompts += 1


class _Seen:
    """What is taken of a batch's videos while they exist: how much those of a prompt differ, and
    the first video of each of the first `keep` prompts. `count` prompts count."""

    def __init__(self, pipeline: Pipeline, count: int, samples: int, keep: int):
        self._pipeline, self._samples = pipeline, samples
        self._wanted = count * samples if samples > 1 else min(count, keep)
        self._waiting: dict[int, np.ndarray] = {}
        self.kept: dict[int, np.ndarray] = {}
        self._keep = keep
        self.diversity = np.full(count, np.nan, np.float32)

    def decode(
        self, latents: Float[Array, "B f h w C"], places: np.ndarray
    ) -> Float[Array, "B F H W 3"]:
        """Videos of the samples at these places of the batch; for `Reward.__call__`."""
        videos = self._pipeline.decode(latents)
        for row, place in enumerate(places.tolist()):
            if place < self._wanted:
                self._waiting[place] = arrays.to_host(videos[row])
                self._close(place // self._samples)
        return videos

    def _close(self, prompt: int) -> None:
        """Once all videos of the prompt are there."""
        places = range(prompt * self._samples, (prompt + 1) * self._samples)
        if all(place in self._waiting for place in places):
            videos = [self._waiting.pop(place) for place in places]
            if prompt < self._keep:
                self.kept[prompt] = videos[0]
            if self._samples > 1:
                self.diversity[prompt] = _diversity(videos)


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
        "at_once": config.sample.videos_at_once,
        "guidance": config.sample.guidance,
        "text_null": text_null,
    }
    before, old = measure(pipeline, reward, pipeline.adapters, held_out, **options)
    after, new = measure(pipeline, reward, adapters, held_out, **options)
    rows = report(before, after, config.seed)
    if jax.process_index() == 0:
        print(table(rows), flush=True)
        for name, videos in (("before", old), ("after", new)):
            sheet = contact_sheet(videos, held_out[: len(videos)])
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


def _diversity(videos: Sequence[Float[np.ndarray, "F H W 3"]]) -> float:
    pairs = itertools.combinations(videos, 2)
    return float(np.mean([np.sqrt(np.square(a - b).mean()) for a, b in pairs]))
