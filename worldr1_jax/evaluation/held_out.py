"""The before/after report: held-out prompts, deterministic sampling, the same noise for both
policies."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from worldr1_jax import episode
from worldr1_jax.evaluation import epipolar
from worldr1_jax.evaluation.statistics import paired_bootstrap_ci95
from worldr1_jax.fields import each_in_range, in_range
from worldr1_jax.files import write_atomically
from worldr1_jax.media import contact_sheet, marked, sheet_frames
from worldr1_jax.mesh import arrays, placement
from worldr1_jax.policies.stages import Pipeline
from worldr1_jax.rewards import Scorer
from worldr1_jax.rewards.base import Evidence
from worldr1_jax.rewards.choice import Choice
from worldr1_jax.rollout.sample import Sampler, sample_keys
from worldr1_jax.workdir.metrics import Progress

Measures = dict[str, Float[np.ndarray, " N"]]
Measured = tuple[Measures, Float[np.ndarray, "n F H W 3"]]  # and frames of the first prompts
ENOUGH = 30  # pairs, for a bootstrap interval to be taken as it is
SHOWN = 8  # prompts of which the contact sheet has a video


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The before/after report; the fields are `evaluate` of the config.

    Attributes:
      prompts: held-out prompts; 0: no report.
      samples: videos per prompt, for the diversity.
      batch: prompts at a time, or so many more that the mesh divides their videos.
      guidances: at which the base is tried on the first `sweep` prompts; the report compares with
        the one that is best for it. Empty: it is compared at the guidance of the policy alone.
      sweep: see above.
    """

    prompts: int = 64
    samples: int = 2
    batch: int = 16
    guidances: tuple[float, ...] = ()
    sweep: int = 16

    def __post_init__(self) -> None:
        in_range(self, prompts=(0, 10**6), samples=(1, 10**4), batch=(1, 10**5), sweep=(1, 10**6))
        if self.prompts == 1:
            raise ValueError("prompts is 1: an interval needs 2 or more, and 0 is no report")
        each_in_range(self, guidances=(0, 1e3))


@dataclasses.dataclass(frozen=True)
class Exam:
    """What every policy of a report is asked, on the same noise.

    Attributes:
      prompts: held out.
      key: the noise of video s of prompt p depends on (key, p, s) alone, p counted from `first`.
      samples: videos per prompt; with two or more, their mean RMS difference is the "diversity" in
        [0, 1], and that of their first frames, where no camera has moved yet, "diversity_first".
      batch: prompts at a time, or so many more that the mesh can divide their videos; the last
        batch is filled up with repeats, which are not counted.
      at_once: videos that a device takes at a time, as pipeline and scorer have it; 0: all.
      first: place of the first prompt.
      whole: prompts of the exam that this is a part of, whose batches have one size; 0: it is none.
    """

    prompts: Sequence[str]
    key: jax.Array
    samples: int
    batch: int
    at_once: int = 0
    first: int = 0
    whole: int = 0

    def part(self, start: int, stop: int | None = None) -> Exam:
        """The same exam of some of the prompts."""
        return dataclasses.replace(
            self, prompts=self.prompts[start:stop], first=self.first + start,
            whole=self.whole or len(self.prompts),
        )  # fmt: skip


def measure(
    pipeline: Pipeline,
    scorer: Scorer,
    adapters: Any,
    exam: Exam,
    *,
    guidance: float,
    text_null: Array | None,
    on_batch: Callable[[int], object] | None = None,
) -> Measured:
    """Scores of every prompt, each the mean over its videos; and the frames that a contact sheet
    shows, of a video of each of the first SHOWN prompts.

    Videos are decoded as they are scored, and go to the host one by one; a prompt's wait there
    until all of them are made. `on_batch` is told how many more prompts are done.

    Returns:
      {every part of the reward, "total_3d", "change", "diversity", "diversity_first", "epipolar",
      "epipolar_asked"} -> [N]; NaN where a video could not be scored. "total_3d" is S_recon +
      S_traj; "change" how much a video changes, the mean RMS difference of its frames to its middle
      one. The last two are a witness that is no network: by how many pixels matches miss the
      epipolar lines of the recovered cameras and of those asked for.
    """
    # Without a negative prompt there is one branch; else one program serves every guidance.
    sampler, scale = Sampler(kind="none"), None if text_null is None else guidance
    prompts, samples = exam.prompts, exam.samples
    parts_of_mesh = placement.batch_parts(pipeline.mesh)
    most = min(exam.batch, exam.whole or len(prompts))
    batch = whole_batch(most, samples, parts_of_mesh, exam.at_once)
    collected: dict[str, list[np.ndarray]] = {}
    shown: list[np.ndarray] = []
    for first in range(0, len(prompts), batch):
        chosen = list(prompts[first : first + batch])
        filled = chosen + [chosen[-1]] * (batch - len(chosen))
        repeated = [p for p in filled for _ in range(samples)]
        keys = sample_keys(exam.key, len(repeated), first=(exam.first + first) * samples)
        rolled = pipeline.roll(
            adapters, repeated, keys, sampler=sampler, text_null=text_null, guidance=scale
        )
        videos, cameras = _Videos(len(chosen), samples, keep=SHOWN - len(shown)), _Cameras()
        scores = episode.judge(
            pipeline, scorer, rolled, wanted=range(len(chosen) * samples), seen=videos.add,
            witness=cameras.see,
        )  # fmt: skip
        shown += [videos.kept[prompt] for prompt in sorted(videos.kept)]
        found = {name: arrays.to_host(values) for name, values in scores.parts.items()}
        spatial = scorer.choice.spatial()
        if spatial:
            found["total_3d"] = np.sum([found[name] for name in spatial], axis=0)
        found |= cameras.errors(batch * samples)
        rows = {name: v.reshape(batch, samples).mean(1) for name, v in found.items()}
        rows["change"] = videos.change
        if samples > 1:
            rows["diversity"], rows["diversity_first"] = videos.diversity
        for name, values in rows.items():
            collected.setdefault(name, []).append(values[: len(chosen)])
        if on_batch is not None:
            on_batch(len(chosen))
    return {name: np.concatenate(values) for name, values in collected.items()}, np.stack(shown)


def whole_batch(prompts: int, samples: int, parts: int, at_once: int) -> int:
    """The next number of prompts whose videos, `samples` each, the mesh's `parts` divide, and of
    which a device takes `at_once` at a time (0: all)."""
    while True:
        mine, rest = divmod(prompts * samples, parts)
        if not rest and (not at_once or mine <= at_once or mine % at_once == 0):
            return prompts
        prompts += 1


class _Videos:
    """What is taken of a batch's videos while they exist: how much each changes, how much those of
    a prompt differ, and what a sheet shows of the first video of each of the first `keep`."""

    def __init__(self, count: int, samples: int, keep: int):
        self._samples, self._keep = samples, keep
        self._waiting: dict[int, np.ndarray] = {}
        self.kept: dict[int, np.ndarray] = {}
        self.change = np.full(count, np.nan, np.float32)
        self.diversity = np.full((2, count), np.nan, np.float32)  # of videos, of first frames

    def add(self, place: int, video: Float[np.ndarray, "F H W 3"]) -> None:
        """The video at this place of the batch; for `episode.judge`."""
        self._waiting[place] = video
        prompt = place // self._samples
        places = range(prompt * self._samples, (prompt + 1) * self._samples)
        if all(place in self._waiting for place in places):
            self._close(prompt, [self._waiting.pop(place) for place in places])

    def _close(self, prompt: int, videos: list[np.ndarray]) -> None:
        if prompt < self._keep:
            self.kept[prompt] = videos[0][sheet_frames(len(videos[0]))]
        self.change[prompt] = np.mean([_change(video) for video in videos])
        if self._samples > 1:
            pairs = [a - b for a, b in itertools.combinations(videos, 2)]
            self.diversity[:, prompt] = np.mean([(_rms(x), _rms(x[0])) for x in pairs], axis=0)


class _Cameras:
    """Epipolar errors of a batch's videos, under the cameras that were recovered and under those
    asked for, turn by turn; of reconstructed frames, on the host's own devices, one video after the
    other: a turn of a pod's is more than a device holds."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[float, float]] = {}

    def see(self, evidence: Evidence, places: np.ndarray) -> None:
        """Notes those of one turn; for `episode.judge`."""
        if evidence.reconstruction is None:
            return
        found = evidence.reconstruction
        size = found.depth.shape[-2:]  # that the intrinsics are of
        leaves = (evidence.seen, evidence.path, found.camtoworld, found.intrinsics)
        for row, place in enumerate(places.tolist()):
            frames, asked, recovered, matrices = (arrays.to_host(x[row : row + 1]) for x in leaves)
            scale = np.array([frames.shape[3] / size[1], frames.shape[2] / size[0], 1.0])
            matrices = (matrices * scale[:, None]).astype(np.float32)
            of_recovered, of_asked = (
                float(epipolar.errors(frames, path, matrices)["epipolar"][0])
                for path in (recovered, asked)
            )
            self._found[place] = of_recovered, of_asked

    def errors(self, count: int) -> Measures:
        """Of `count` videos; nothing where none was reconstructed."""
        if not self._found:
            return {}
        recovered, asked = np.array([self._found[place] for place in range(count)]).T
        return {"epipolar": recovered, "epipolar_asked": asked}


def compare(
    pipeline: Pipeline,
    scorer: Scorer,
    adapters: Any,
    exam: Exam,
    settings: Evaluate,
    *,
    seed: int,
    workdir: str | Path,
    start: str = "the base",
) -> dict[str, Any]:
    """Held-out prompts under the base policy at its best and under `adapters`, on the same noise.

    The base is what the pipeline has: with adapters to start from, it is no base, and `start` says
    so.

    The base is first tried at every one of `settings.guidances`: turning guidance on is a knob that
    costs nothing, and an improvement has to beat it. Prints the tables and writes
    videos/heldout_before.png and heldout_after.png.

    Returns:
      heldout: `report`'s table, before: the base at its best.
      heldout_same_guidance: the same, before: the base at the policy's guidance; missing where it
        is the best.
      heldout_guidance: before, after, and `swept`, {guidance: {metric: mean}}.
    """
    own = pipeline.sampling.guidance
    tried = sorted({*settings.guidances, own}) if settings.guidances else []
    few, rest = exam.part(0, settings.sweep), exam.part(settings.sweep)

    def measured(adapters: Any, guidance: float, exam: Exam, progress: Progress) -> Measured:
        null = pipeline.negative() if guidance != 1 or settings.guidances else None
        return measure(
            pipeline, scorer, adapters, exam, guidance=guidance, text_null=null,
            on_batch=progress.advance,
        )  # fmt: skip

    progress = Progress(len(tried) * len(few.prompts), unit="prompt of the sweep")
    swept = {g: measured(pipeline.adapters, g, few, progress) for g in tried}
    progress.close()
    found = {g: measures for g, (measures, _) in swept.items()}
    best = best_guidance(found, judged_by(scorer.choice)) if swept else own

    left = rest if swept else exam  # what the sweep has measured is not measured again
    compared = dict.fromkeys((best, own))
    progress = Progress(len(compared) * len(left.prompts) + len(exam.prompts), unit="prompt")

    def base(guidance: float) -> Measured:
        parts = [swept[guidance]] if swept else []
        if left.prompts:
            parts.append(measured(pipeline.adapters, guidance, left, progress))
        return joined(parts)

    bases = {guidance: base(guidance) for guidance in compared}
    after, new = measured(adapters, own, exam, progress)
    progress.close()
    before, old = bases[best]
    tables = {"heldout": report(before, after, seed)}
    if best != own:
        tables["heldout_same_guidance"] = report(bases[own][0], after, seed)
    guidance = {
        "before": best,
        "after": own,
        "swept": {
            f"{g:g}": {k: float(np.nanmean(v)) for k, v in m.items()} for g, (m, _) in swept.items()
        },
    }
    if jax.process_index() == 0:
        print(f"{start} at guidance {best:g}, its best of {tried or [own]}; the policy at {own:g}")
        print(table(tables["heldout"]), flush=True)
        for name, videos in (("before", old), ("after", new)):
            sheet = contact_sheet(marked(videos), exam.prompts[: len(videos)])
            write_atomically(Path(workdir) / "videos" / f"heldout_{name}.png", sheet)
    return {**tables, "heldout_guidance": guidance}


def joined(parts: Sequence[tuple[dict[str, np.ndarray], np.ndarray]]) -> Measured:
    """Of one exam, what was measured of parts of it that follow each other: each a `Measured`, of
    a number of prompts of its own, which that type would say is one."""
    measures = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    return measures, np.concatenate([part[1] for part in parts])[:SHOWN]


def judged_by(choice: Choice) -> tuple[str, ...]:
    """The measures of which the base has a best guidance: S_recon + S_traj, and R_gen; of a reward
    without either, all that counts."""
    known = {"total_3d": choice.spatial(), "general": choice.general}
    return tuple(name for name, parts in known.items() if parts) or choice.reported()


def best_guidance(measured: Mapping[float, Measures], by: Sequence[str]) -> float:
    """The guidance at which the measures `by`, summed, are highest on average over the prompts that
    were scored at all of them. One at which fewer than half as many could be scored as at another
    is not among them: it would leave few prompts to choose on."""
    sums = np.array([np.sum([found[name] for name in by], axis=0) for found in measured.values()])
    scored = np.isfinite(sums)
    counts = scored.sum(axis=1)
    tried = 2 * counts >= counts.max()
    common = scored[tried].all(axis=0)
    totals = sums[:, common].mean(axis=1) if common.any() else counts
    return list(measured)[int(np.argmax(np.where(tried, totals, -np.inf)))]


def report(before: Measures, after: Measures, seed: int) -> dict[str, dict[str, Any]]:
    """`{metric: {before, after, paired_ci95, pairs, prompts}}`: means over the pairs of which both
    could be scored; NaN where there are none, and no interval of fewer than two."""
    rows = {}
    for name in before:
        both = np.isfinite(before[name]) & np.isfinite(after[name])
        first, second, pairs = before[name][both], after[name][both], int(both.sum())
        rows[name] = {
            "before": float(first.mean()) if pairs else float("nan"),
            "after": float(second.mean()) if pairs else float("nan"),
            "paired_ci95": list(paired_bootstrap_ci95(first, second, seed))
            if pairs > 1
            else [float("nan")] * 2,
            "pairs": pairs,
            "prompts": len(both),
        }
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The report as lines of text; rows of fewer than all prompts are marked, for those that one
    policy fails at are missing, and few promise too much."""
    lines = [f"{'held-out metric':<22}{'before':>9}{'after':>9}   95% interval of the change"]
    for name, row in rows.items():
        low, high = row["paired_ci95"]
        pairs, prompts = row["pairs"], row["prompts"]
        few = f"   of {pairs} prompts" + (" only" if pairs < ENOUGH else f", not {prompts}")
        few = few if pairs < max(prompts, ENOUGH) else ""
        lines.append(
            f"{name:<22}{row['before']:>9.4f}{row['after']:>9.4f}   [{low:+.4f}, {high:+.4f}]{few}"
        )
    return "\n".join(lines)


def _change(video: Float[np.ndarray, "F H W 3"]) -> float:
    return _rms(video - video[len(video) // 2])


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))
