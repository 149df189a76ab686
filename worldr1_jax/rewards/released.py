"""S_traj as World-R1's released code computes it, for comparisons; the default is `trajectory`.

Not a better measure: a perfect straight push-in scores 0.52, because a fit of a straight path
leaves its rotation open and the release then does not scale at all.

What mode "released" reproduces, tested on fixed paths against the released code itself: the motion
profile, to 1e-3; and all of S_traj, with the alignment, below six frames. What it does not:
  - S_traj of six frames and more is fitted to unseeded random halves of the frames there.
  - Where the path asked for is straight and the recovered one is not, rounding decides there
    whether the fit is refused; here it is refused.
  - S_recon stays the paper's. The release compares render k, of an interpolated path at time k/2,
    with frame k, and squeezes renders of 504x294 to 512x512. Its distance is the lpips package's,
    which `models.lpips` equals to 1e-4.
  - S_meta's judge has a mode of its own (`judge`). R_gen of the release is of random frames, not
    the same for a group; here (`preference`) they are evenly spaced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from worldr1_jax.geometry import length as length_of
from worldr1_jax.geometry import relative_to_first, rotation_angle

STILL_UNITS, STILL_DEGREES = 1e-4, 1e-3  # a path below these asks for no translation, no rotation
EPS = 1e-6


def s_traj(
    asked: Float[Array, "B F 4 4"], recovered: Float[Array, "B F 4 4"]
) -> Float[Array, " B"]:
    """`motion_profile` of the recovered path after a similarity fit to the one asked for; [0, 1].

    A departure: with six or more frames the release fits to random halves of the frames, unseeded,
    and keeps the best; here all frames are fitted, as the release does below six.

    Raises:
        ValueError: shapes that are not two equal [B F 4 4], or fewer than 2 frames.
    """
    if asked.ndim != 4 or asked.shape != recovered.shape or asked.shape[1] < 2:
        raise ValueError(
            f"asked has shape {asked.shape} and recovered {recovered.shape}, "
            "want two equal shapes (B, F, 4, 4) with 2 or more frames"
        )
    return jax.vmap(lambda a, r: motion_profile(a, _aligned(a, r)))(asked, recovered)


def _aligned(asked: Float[Array, "F 4 4"], recovered: Float[Array, "F 4 4"]) -> Array:
    """The recovered path under the similarity that fits its positions best (Umeyama 1991); as it
    came where the positions lie on a line, or nothing is asked for."""
    exact = lax.Precision.HIGHEST
    target, source = asked[:, :3, 3], recovered[:, :3, 3]
    target_mean, source_mean = target.mean(0), source.mean(0)
    centred = source - source_mean
    covariance = jnp.matmul((target - target_mean).T, centred, precision=exact) / len(target)
    # float32: the release tests its float64 covariance for a second direction above rounding.
    extents = jnp.linalg.svd(lax.stop_gradient(covariance), compute_uv=False)
    fits = (extents[1] > 1e-6 * extents[0]) & (_length(target) >= STILL_UNITS)
    # Singular values that are equal, as three zeros are, have a gradient of NaN.
    u, spread, vt = jnp.linalg.svd(jnp.where(fits, covariance, jnp.diag(jnp.arange(3.0, 0.0, -1))))
    signs = jnp.ones(3).at[2].set(jnp.sign(jnp.linalg.det(u) * jnp.linalg.det(vt)))
    turn = jnp.matmul(u * signs, vt, precision=exact)
    variance = jnp.mean(jnp.sum(centred**2, axis=-1))
    scale = jnp.sum(spread * signs) / jnp.where(variance > 0, variance, 1.0)
    position = scale * jnp.matmul(centred, turn.T, precision=exact) + target_mean
    rotation = jnp.matmul(turn, recovered[:, :3, :3], precision=exact)
    fitted = recovered.at[:, :3, :3].set(rotation).at[:, :3, 3].set(position)
    return jnp.where(fits, fitted, recovered)


def motion_profile(
    asked: Float[Array, "F 4 4"], recovered: Float[Array, "F 4 4"]
) -> Float[Array, ""]:
    """How alike two paths are in course and extent, in [0, 1]; both relative to their first camera.

    With L the length of a path, T its summed turning, e the mean distance of positions, a the mean
    and b the last angle between orientations, in degrees:

        translation = 0.4 (1 + cos) / 2 + 0.3 min(L / L', L' / L) + 0.3 exp(-e / (2 max(step, 1)))
        rotation    = 0.5 exp(-a / 6) + 0.3 exp(-b / 6) + 0.2 min(T / T', T' / T)

    or exp(-L / 3) and exp(-T / 5) where nothing of the kind is asked for. The score is their mean,
    or 0.8 and 0.2 where only one is asked for, or their product where none is.
    """
    path, found_path = relative_to_first(asked), relative_to_first(recovered)
    turns, positions = path[..., :3, :3], path[..., :3, 3]
    found_turns, found = found_path[..., :3, :3], found_path[..., :3, 3]
    length, found_length = _length(positions), _length(found)
    turning, found_turning = _turning(turns), _turning(found_turns)

    error = jnp.mean(length_of(found - positions))
    step = jnp.maximum(length / max(len(asked) - 1, 1), 1.0)
    translation = jnp.where(
        length < STILL_UNITS,
        jnp.exp(-found_length / 3.0),
        0.4 * _cosine(found, positions)
        + 0.3 * _ratio(found_length, length)
        + 0.3 * jnp.exp(-error / (2.0 * step)),
    )
    between = jnp.matmul(turns.swapaxes(-1, -2), found_turns, precision=lax.Precision.HIGHEST)
    angles = jnp.rad2deg(rotation_angle(between))
    rotation = jnp.where(
        turning < STILL_DEGREES,
        jnp.exp(-found_turning / 5.0),
        0.5 * jnp.exp(-jnp.mean(angles) / 6.0)
        + 0.3 * jnp.exp(-angles[-1] / 6.0)
        + 0.2 * _ratio(found_turning, turning),
    )
    no_move, no_turn = length < STILL_UNITS, turning < STILL_DEGREES
    score = jnp.where(no_move, 0.2 * translation + 0.8 * rotation, 0.5 * (translation + rotation))
    score = jnp.where(no_turn, 0.8 * translation + 0.2 * rotation, score)
    return jnp.clip(jnp.where(no_move & no_turn, translation * rotation, score), 0.0, 1.0)


def _length(positions: Float[Array, "F 3"]) -> Float[Array, ""]:
    return jnp.sum(length_of(jnp.diff(positions, axis=0)))


def _turning(rotations: Float[Array, "F 3 3"]) -> Float[Array, ""]:
    """Sum of the angles between neighbours; degrees."""
    steps = jnp.matmul(
        rotations[:-1].swapaxes(-1, -2), rotations[1:], precision=lax.Precision.HIGHEST
    )
    return jnp.sum(jnp.rad2deg(rotation_angle(steps)))


def _ratio(a: Array, b: Array) -> Array:
    return jnp.exp(-jnp.abs(jnp.log((a + EPS) / (b + EPS))))


def _cosine(a: Float[Array, "F 3"], b: Float[Array, "F 3"]) -> Array:
    """(1 + cosine) / 2 of all positions as one vector; 1 where both are 0, and 0 where one is."""
    norm_a, norm_b = length_of(a.ravel()), length_of(b.ravel())
    cosine = jnp.sum(a * b) / jnp.maximum(norm_a * norm_b, EPS**2)
    value = 0.5 * (jnp.clip(cosine, -1.0, 1.0) + 1.0)
    value = jnp.where((norm_a < EPS) | (norm_b < EPS), 0.0, value)
    return jnp.where((norm_a < EPS) & (norm_b < EPS), 1.0, value)
