"""Ways to make a video, or what a 3D network found in it, worse; strength 0 changes nothing.

VIDEO: of pixels alone, (video, strength, rng). WITH_TRUTH: of pixels, but they need the scene's
depth and cameras too. SPATIAL: of a reconstruction, whose Gaussians are moved along the rays of
their own frame's camera, so that no frame's own Gaussians look any different from there.
"""

import jax.numpy as jnp
import numpy as np

from worldr1_jax.nano import world


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


def bad_frame(video, strength, rng):
    """The middle frame, one that the 3D network sees, is shifted by up to 8 px."""
    out, middle = video.copy(), len(video) // 2
    angle = rng.uniform(0, 2 * np.pi)
    out[middle] = _shift(video[middle], 8 * strength * np.cos(angle), 8 * strength * np.sin(angle))
    return out


def jump(video, strength, rng):
    """From the middle on, everything is shifted by up to 8 px."""
    angle, middle = rng.uniform(0, 2 * np.pi), len(video) // 2
    step = 8 * strength * np.cos(angle), 8 * strength * np.sin(angle)
    later = [_shift(frame, *step) for frame in video[middle:]]
    return np.concatenate([video[:middle], np.stack(later)])


def card(frame, camtoworld, distance):
    """A video of one picture on a flat card, seen along a path; no corruption, for it needs no
    video."""
    at = [_on_cloth(pose, distance, len(frame)) - 0.5 for pose in camtoworld]
    return np.stack([_sample(frame, y, x) for x, y in (np.moveaxis(each, -1, 0) for each in at)])


def _on_cloth(pose, distance, side):
    """Where the pixels of a camera see a cloth that faces the first one, in the first one's pixels
    [side side 2]."""
    matrix = world.intrinsics(side, side)
    focal, centre = matrix[0, 0], matrix[:2, 2]
    pixels = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1) + 0.5
    rays = np.concatenate([(pixels - centre) / focal, np.ones((side, side, 1))], -1)
    position, along = pose[:3, 3].astype(np.float64), rays @ pose[:3, :3].astype(np.float64).T
    points = position + along * ((distance - position[2]) / along[..., 2])[..., None]
    return points[..., :2] / points[..., 2:] * focal + centre


def painted(video, strength, rng, depth, camtoworld):
    """The scene turns into the first frame's picture on a flat cloth at its median depth.

    What a flat cloth would show at a pixel is somewhere else in the true frame; it is fetched from
    that far along the way there.
    """
    del rng
    side = video.shape[1]
    matrix = world.intrinsics(side, side)
    focal, centre = matrix[0, 0], matrix[:2, 2]
    first = depth[0].astype(np.float64)
    cloth = float(np.median(first))
    pixels = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1) + 0.5
    out = []
    for frame, pose in zip(video, camtoworld, strict=True):
        turn, position = pose[:3, :3].astype(np.float64), pose[:3, 3].astype(np.float64)
        painting = _on_cloth(pose, cloth, side)
        x, y = np.moveaxis(painting.astype(int).clip(0, side - 1), -1, 0)
        there = np.concatenate([(painting - centre) / focal, np.ones((side, side, 1))], -1)
        seen = (there * first[y, x][..., None] - position) @ turn
        source = seen[..., :2] / np.maximum(seen[..., 2:], 1e-2) * focal + centre
        x, y = np.moveaxis(pixels + strength * (source - pixels) - 0.5, -1, 0)
        out.append(_sample(frame, y, x))
    return np.stack(out)


# ---- Reconstructions -----------------------------------------------------------------------------


def _along_rays(found, factor):
    """Gaussians of each frame [B F n] as many times farther from its camera, and as many times as
    large."""
    batch, frames = found.depth.shape[:2]
    gaussians = found.gaussians
    each = gaussians.means.shape[1] // frames
    factor = np.broadcast_to(factor, (batch, frames, each)).reshape(batch, -1, 1)
    factor = jnp.asarray(factor, jnp.float32)
    cameras = jnp.repeat(found.camtoworld[:, :, :3, 3], each, axis=1)
    means = cameras + (gaussians.means - cameras) * factor
    return found.replace(gaussians=gaussians.replace(means=means, scales=gaussians.scales * factor))


def _depths(found):
    """Of each Gaussian along the axis of its own frame's camera [B F n]."""
    batch, frames = found.depth.shape[:2]
    means = found.gaussians.means.reshape(batch, frames, -1, 3)
    offsets = means - found.camtoworld[:, :, None, :3, 3]
    return np.asarray(jnp.einsum("bfnj,bfj->bfn", offsets, found.camtoworld[:, :, :3, 2]))


def billboards(found, strength, rng):
    """The depths of each frame move onto three cards that face its own camera."""
    del rng
    depth = np.maximum(_depths(found), 1e-3)
    near, far = np.quantile(depth, [1 / 3, 2 / 3], axis=-1)[..., None]
    cards = np.moveaxis(np.quantile(depth, [1 / 6, 1 / 2, 5 / 6], axis=-1), 0, -1)
    card = (depth > near).astype(int) + (depth > far)
    return _along_rays(found, (np.take_along_axis(cards, card, -1) / depth) ** strength)


def floaters(found, strength, rng):
    """Up to a fifth of each frame's Gaussians come nearer, to 0.4 to 0.8 of their distance."""
    shape = _depths(found).shape
    floats = rng.uniform(size=shape) < 0.2 * strength
    return _along_rays(found, np.where(floats, rng.uniform(0.4, 0.8, shape), 1.0))


def depth_jitter(found, strength, rng):
    """Each frame's depth is multiplied by a number of its own, up to 22% (one sigma) off."""
    factor = np.exp(0.2 * strength * rng.normal(size=found.depth.shape[:2]))[..., None]
    depth = found.depth * jnp.asarray(factor[..., None], jnp.float32)
    return _along_rays(found, factor).replace(depth=depth)


VIDEO = (jitter, morph, shuffle, freeze_half, reverse, sharpen, still, blur, bad_frame, jump)
WITH_TRUTH = (painted,)
SPATIAL = (billboards, floaters, depth_jitter)
