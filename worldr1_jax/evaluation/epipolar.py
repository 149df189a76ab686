"""A witness that is no 3D network: do points that look alike lie where two cameras allow it?

Networks that give geometry in one pass give it confidently for noise, for repeated frames and for
unrelated pictures (2605.18754), and the rewards believe one of them. Here corners are found and
matched between two frames by how they look alone (Shi and Tomasi 1994; normalised
cross-correlation there and back), and each match is held against the epipolar line on which two
cameras, recovered or asked for, put it: Sampson's distance, in pixels. A video can be consistent
with a wrong path (small under the recovered one, large under the one asked for), or with none
(large under both).

What it cannot see: how far the camera went (an epipolar line does not know the length of a
translation; `behind` tells its sign), things that move along their epipolar lines, and anything in
a picture without corners. A still camera explains a still picture.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from worldr1_jax.geometry import rigid_inverse

PATCH = 3  # px, half a side of what is compared: 7 px, as SSIM's window
CORNER = 1e-4  # least smaller eigenvalue of a corner's gradients, mean over a patch
ALIKE = 0.9  # least correlation of a match
UNIQUE = 0.05  # by which a match has to beat every other place two pixels away or more
RETURN = 1.0  # px, within which a match leads back to where it came from
PARALLAX = 1.0  # px beyond what rotation explains, above which a match tells on which side it is
FEWEST = 8  # matches of a video, or its error is not known


class Matches(NamedTuple):
    """Places in two images that look alike; px, pixel centres at +0.5."""

    first: Float[Array, "N 2"]
    second: Float[Array, "N 2"]
    found: Bool[Array, " N"]


@functools.partial(jax.jit, static_argnames=("gap", "corners", "reach"))
def errors(
    videos: Float[Array, "B F H W 3"],
    camtoworld: Float[Array, "B F 4 4"],
    intrinsics: Float[Array, "B F 3 3"],
    *,
    gap: int = 1,
    corners: int = 128,
    reach: int | None = None,
) -> dict[str, Float[Array, " B"]]:
    """How far matches of frames k and k + gap lie from where the cameras allow them.

    Args:
        videos: in [0, 1], the frames of the poses.
        camtoworld: recovered, or asked for; any unit of length.
        intrinsics: px of `videos`.
        gap: frames between the two of a pair, >= 1. Larger ones see more parallax and match less.
        corners: at most so many a frame.
        reach: px to each side in which a match is looked for; None: a sixth of the longer side.

    Returns:
        epipolar: the mean over pairs of the median Sampson distance, px; where the cameras do not
            move apart at all, the distance from where the rotation takes a point, divided by
            sqrt(2), which is what Sampson's distance becomes there.
        behind: the share of matches with parallax that would lie behind a camera; 0 without any.
        matches: how many there are, over all pairs.
        The first two are NaN where there are fewer than 8 matches in all.

    Raises:
        ValueError: shapes that do not belong together, or a gap that no pair of frames has.
    """
    frames = videos.shape[1]
    if camtoworld.shape != (*videos.shape[:2], 4, 4) or intrinsics.shape[:2] != videos.shape[:2]:
        raise ValueError(
            f"videos has shape {videos.shape}, camtoworld {camtoworld.shape} and intrinsics "
            f"{intrinsics.shape}: want (B, F, H, W, 3), (B, F, 4, 4) and (B, F, 3, 3)"
        )
    if not 1 <= gap < frames:
        raise ValueError(f"gap is {gap}: pairs of {frames} frames are 1 to {frames - 1} apart")
    gray = jnp.mean(videos, axis=-1)
    radius = reach if reach is not None else -(-max(gray.shape[2:]) // 6)

    def pair(item: tuple[Array, ...]) -> tuple[Array, Array, Array, Array]:
        a, b, pose_a, pose_b, matrix_a, matrix_b = item
        matches = match(a, b, corners, radius)
        motion = jnp.matmul(rigid_inverse(pose_b), pose_a, precision="highest")
        distance, parallax, front = judge(matches, motion, matrix_a, matrix_b)
        telling = matches.found & (parallax > PARALLAX)
        return (
            _median(distance, matches.found),
            jnp.sum(matches.found),
            jnp.sum(telling & ~front),
            jnp.sum(telling),
        )

    def video(item: tuple[Array, Array, Array]) -> dict[str, Array]:
        pairs = tuple(part for leaf in item for part in (leaf[:-gap], leaf[gap:]))
        distance, count, behind, telling = lax.map(pair, pairs)
        total = jnp.sum(count)
        known = total >= FEWEST
        mean = jnp.sum(jnp.where(count > 0, distance, 0.0)) / jnp.maximum(jnp.sum(count > 0), 1)
        return {
            "epipolar": jnp.where(known, mean, jnp.nan),
            "behind": jnp.where(known, jnp.sum(behind) / jnp.maximum(jnp.sum(telling), 1), jnp.nan),
            "matches": total.astype(jnp.float32),
        }

    return lax.map(video, (gray, camtoworld, intrinsics))


# ---- Geometry ------------------------------------------------------------------------------------


def judge(
    matches: Matches,
    motion: Float[Array, "4 4"],
    first: Float[Array, "3 3"],
    second: Float[Array, "3 3"],
) -> tuple[Float[Array, " N"], Float[Array, " N"], Bool[Array, " N"]]:
    """Each match under two cameras: Sampson's distance (px), parallax (px beyond what rotation
    explains, in the second image), and whether it lies in front of both.

    Args:
        motion: from the first camera's axes to the second's.
        first, second: intrinsics, px.
    """
    exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    rotation, step = motion[:3, :3], motion[:3, 3]
    apart = jnp.linalg.norm(step)
    moved = apart > 0
    step = step / jnp.where(moved, apart, 1.0)
    rays, seen = _rays(matches.first, first), _rays(matches.second, second)
    turned = exact(rays, rotation.T)
    zero = jnp.zeros(())
    cross = jnp.stack(
        [
            jnp.stack([zero, -step[2], step[1]]),
            jnp.stack([step[2], zero, -step[0]]),
            jnp.stack([-step[1], step[0], zero]),
        ]
    )
    essential = exact(cross, rotation)
    # Lines in pixels: K^-T E K^-1, whose first two columns are those of the rays' K^-T.
    lines = exact(exact(rays, essential.T), jnp.linalg.inv(second))
    back = exact(exact(seen, essential), jnp.linalg.inv(first))
    off = jnp.sum(seen * exact(rays, essential.T), axis=-1)
    steepness = jnp.sum(lines[:, :2] ** 2, axis=-1) + jnp.sum(back[:, :2] ** 2, axis=-1)
    sampson = jnp.abs(off) / jnp.sqrt(jnp.maximum(steepness, 1e-20))
    infinite = exact(turned, second.T)
    infinite = infinite[:, :2] / jnp.where(infinite[:, 2:] > 1e-6, infinite[:, 2:], 1e-6)
    parallax = jnp.linalg.norm(matches.second - infinite, axis=-1)
    # z turned + step = z' seen, each z from the cross product with the other ray.
    normal = jnp.cross(turned, seen)
    z = -jnp.sum(normal * jnp.cross(jnp.broadcast_to(step, seen.shape), seen), axis=-1)
    z_second = -jnp.sum(normal * jnp.cross(jnp.broadcast_to(step, seen.shape), turned), axis=-1)
    return jnp.where(moved, sampson, parallax / 2**0.5), parallax, (z > 0) & (z_second > 0)


def _rays(points: Float[Array, "N 2"], matrix: Float[Array, "3 3"]) -> Float[Array, "N 3"]:
    whole = jnp.concatenate([points, jnp.ones_like(points[:, :1])], axis=-1)
    return jnp.matmul(whole, jnp.linalg.inv(matrix).T, precision=lax.Precision.HIGHEST)


def _median(values: Float[Array, " N"], counted: Bool[Array, " N"]) -> Float[Array, ""]:
    """Of the values that count; the lower one of two."""
    ordered = jnp.sort(jnp.where(counted, values, jnp.inf))
    return ordered[jnp.maximum(jnp.sum(counted) - 1, 0) // 2]


# ---- Matches -------------------------------------------------------------------------------------


def match(
    first: Float[Array, "H W"], second: Float[Array, "H W"], corners: int, reach: int
) -> Matches:
    """Corners of the first image that one place of the second looks like, and which that place in
    turn looks like."""
    places, sharp = find_corners(first, corners)
    there, alike = _search(first, second, places, reach)
    rounded = jnp.round(there).astype(jnp.int32)
    height, width = first.shape
    inside = (rounded >= PATCH) & (rounded < jnp.array([width, height]) - PATCH)
    sure = sharp & alike & jnp.all(inside, axis=-1)
    again, _ = _search(second, first, jnp.where(sure[:, None], rounded, PATCH), reach)
    # Both searches start at whole pixels, so the way back ends half a pixel off at most.
    returns = jnp.max(jnp.abs(again - places - (rounded - there)), axis=-1) < RETURN
    return Matches(places + 0.5, there + 0.5, sure & returns)


def find_corners(image: Float[Array, "H W"], count: int) -> tuple[Array, Bool[Array, " N"]]:
    """x and y (whole pixels, [N 2]) of the sharpest corners, and which of them are any."""
    across = jnp.zeros_like(image).at[:, 1:-1].set((image[:, 2:] - image[:, :-2]) / 2)
    down = jnp.zeros_like(image).at[1:-1].set((image[2:] - image[:-2]) / 2)
    xx, xy, yy = (_box(p) for p in (across * across, across * down, down * down))
    smaller = (xx + yy) / 2 - jnp.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    window = (2 * PATCH + 1, 2 * PATCH + 1)
    highest = lax.reduce_window(smaller, -jnp.inf, lax.max, window, (1, 1), "SAME")
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    edge = PATCH + 1
    kept = (smaller == highest) & (smaller > CORNER)
    kept &= (x >= edge) & (y >= edge)
    kept &= (x < image.shape[1] - edge) & (y < image.shape[0] - edge)
    count = min(count, image.size)
    sharpness, index = lax.top_k(jnp.where(kept, smaller, 0.0).ravel(), count)
    index = jnp.where(sharpness > 0, index, PATCH * image.shape[1] + PATCH)
    return jnp.stack([index % image.shape[1], index // image.shape[1]], -1), sharpness > 0


def _box(image: Float[Array, "H W"]) -> Float[Array, "H W"]:
    """Mean over a patch around each pixel; smaller than it is at the edges."""
    window = (2 * PATCH + 1, 2 * PATCH + 1)
    return lax.reduce_window(image, 0.0, lax.add, window, (1, 1), "SAME") / window[0] ** 2


def _search(
    first: Float[Array, "H W"], second: Float[Array, "H W"], places: Array, reach: int
) -> tuple[Float[Array, "N 2"], Bool[Array, " N"]]:
    """Where in the second image the patches around `places` (whole pixels [N 2]) of the first fit
    best, to a part of a pixel; and whether well, and nowhere else."""
    side, wide = 2 * PATCH + 1, 2 * reach + 1
    height, width = second.shape
    mean = _box(second)
    spread = jnp.sqrt(jnp.maximum(_box(second * second) - mean**2, 1e-8))
    padded = jnp.pad(second, reach + PATCH)
    spreads = jnp.pad(spread, reach, constant_values=1.0)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]

    def one(place: Array) -> tuple[Array, Array]:
        px, py = place
        patch = lax.dynamic_slice(first, (py - PATCH, px - PATCH), (side, side))
        patch = patch - jnp.mean(patch)
        patch = patch / jnp.sqrt(jnp.mean(patch * patch) + 1e-8)
        region = lax.dynamic_slice(padded, (py, px), (wide + side - 1, wide + side - 1))
        products = lax.conv_general_dilated(
            region[None, None], patch[None, None], (1, 1), "VALID", precision="highest"
        )[0, 0]
        fit = products / side**2 / lax.dynamic_slice(spreads, (py, px), (wide, wide))
        inside = (px + x >= PATCH) & (px + x < width - PATCH)
        inside &= (py + y >= PATCH) & (py + y < height - PATCH)
        fit = jnp.where(inside, fit, -1.0)
        best = jnp.argmax(fit)
        row, column = best // wide, best % wide
        away = jnp.maximum(abs(y + reach - row), abs(x + reach - column)) >= 2
        alike = (fit[row, column] > ALIKE) & (
            fit[row, column] > jnp.max(jnp.where(away, fit, -1.0)) + UNIQUE
        )
        part = jnp.stack([_peak(fit[row], column), _peak(fit[:, column], row)])
        return place + jnp.stack([column, row]) - reach + part, alike

    return lax.map(one, places, batch_size=min(64, len(places)))


def _peak(values: Float[Array, " n"], at: Array) -> Float[Array, ""]:
    """Where between its neighbours a parabola through three values is highest, -0.5 to 0.5."""
    inner = jnp.clip(at, 1, values.shape[0] - 2)
    low, middle, high = values[inner - 1], values[inner], values[inner + 1]
    bend = low - 2 * middle + high
    part = 0.5 * (low - high) / jnp.where(bend < 0, bend, -1.0)
    return jnp.where((inner == at) & (bend < 0), jnp.clip(part, -0.5, 0.5), 0.0)
