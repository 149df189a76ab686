"""MVCS: depth that neighbouring frames see alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from worldr1_jax.rewards.base import CAMERAS, Evidence, Parts, Reward
from worldr1_jax.rewards.likeness import where_shown


def mvcs(
    depth: Float[Array, "B F H W"],
    camtoworld: Float[Array, "B F 4 4"],
    intrinsics: Float[Array, "B F 3 3"],
) -> Float[Array, " B"]:
    """Multi-view consistency: do neighbouring frames agree on where the surfaces are? In (0, 1].

    Every pixel of a frame is lifted by its depth, moved into the next frame's camera and projected;
    there its depth z and that frame's own depth d at that place (bilinear) agree by
    min(z, d) / max(z, d). The score is the mean over all pixels that land inside the image, over
    all pairs of neighbours, in both directions. What the next frame hides counts as disagreement.
    NaN for a single frame, or when no pixel lands inside.

    World-R1 reports a number of this name (0.963 to 0.993) without a formula; this one is ours.
    """
    height, width = depth.shape[-2:]
    y, x = (jnp.asarray(a.ravel() + 0.5, jnp.float32) for a in np.mgrid[:height, :width])
    exact = jax.lax.Precision.HIGHEST

    def agreement(source: tuple[Array, ...], target: tuple[Array, ...]) -> tuple[Array, Array]:
        (depth, pose, matrix), (other_depth, other_pose, other_matrix) = source, target
        # By hand and not by linalg.solve: its LAPACK call is slow for a 3x3, and on a CPU hung when
        # another program was under way.
        ray_y = (y - matrix[1, 2]) / matrix[1, 1]
        ray_x = (x - matrix[0, 2] - matrix[0, 1] * ray_y) / matrix[0, 0]
        rays = jnp.stack([ray_x, ray_y, jnp.ones_like(x)])
        points = jnp.matmul(pose[:3, :3], rays * depth.ravel(), precision=exact)
        points = points + pose[:3, 3:] - other_pose[:3, 3:]
        points = jnp.matmul(other_pose[:3, :3].T, points, precision=exact)
        z = points[2]
        u, v, _ = jnp.matmul(other_matrix, points, precision=exact) / jnp.where(z > 0, z, 1.0)
        inside = (z > 0) & (u >= 0.5) & (u <= width - 0.5) & (v >= 0.5) & (v <= height - 0.5)
        found = jax.scipy.ndimage.map_coordinates(other_depth, [v - 0.5, u - 0.5], 1, "nearest")
        ratio = jnp.minimum(z, found) / jnp.maximum(jnp.maximum(z, found), 1e-9)
        return jnp.sum(jnp.where(inside, ratio, 0.0)), jnp.sum(inside)

    def one_video(frames: tuple[Array, ...]) -> Array:
        ahead = jax.tree.map(lambda leaf: leaf[1:], frames)
        back = jax.tree.map(lambda leaf: leaf[:-1], frames)
        pairs = [jax.vmap(agreement)(back, ahead), jax.vmap(agreement)(ahead, back)]
        total = sum(jnp.sum(pair[0]) for pair in pairs)
        count = sum(jnp.sum(pair[1]) for pair in pairs)
        return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)

    return jax.vmap(one_video)((depth, camtoworld, intrinsics))


@dataclasses.dataclass(frozen=True)
class Mvcs(Reward):
    """MVCS as a measure: it rises when a video freezes, and should not count."""

    needs = CAMERAS

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        found = evidence.found()
        score = mvcs(found.depth, found.camtoworld, found.intrinsics)
        return where_shown({"mvcs": score}, evidence)
