"""S_traj: does the recovered camera path follow the path that the prompt asked for?

Both paths start at the identity, which fixes the frame, so only the scale of the recovered one is
unknown. A full similarity fit is wrong here: a straight line leaves its rotation free, and a still
camera leaves everything free (the released code scores a perfect push-in 0.52).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from worldr1_jax.fields import in_range, one_of
from worldr1_jax.geometry import length as length_of
from worldr1_jax.geometry import relative_to_first, root, rotation_angle
from worldr1_jax.rewards import released
from worldr1_jax.rewards.base import CAMERAS, Evidence, Parts, Reward
from worldr1_jax.rewards.likeness import where_shown

SHARPNESS = 1.5  # score = exp(-SHARPNESS * squared relative error): a still camera gets 0.22
ROTATION_TOLERANCE = 6.0  # degrees; the unit of rotation errors on paths that turn less than this
TRANSLATION_TOLERANCE = 0.1  # of the scene's depth; the same for paths without translation
STILL = 0.01  # of the scene's depth; displacements below it are noise and are not scaled up
_NO_TRANSLATION = 1e-6  # rms displacement, asked units; `camera.trajectory` gives exact zeros


class _Alignment(NamedTuple):
    """Two paths in one frame. F frames each, the first camera at the identity."""

    asked: Float[Array, "B F 3"]  # positions, asked units
    aligned: Float[Array, "B F 3"]  # recovered positions, scaled to asked units
    recovered: Float[Array, "B F 3"]  # recovered positions, their own units
    angles: Float[Array, "B F"]  # between asked and recovered orientation, radians
    turned: Float[Array, "B F"]  # between asked and first orientation, radians
    rotations: tuple[Float[Array, "B F 3 3"], Float[Array, "B F 3 3"]]  # asked, recovered


def s_traj(
    asked: Float[Array, "B F 4 4"],
    recovered: Float[Array, "B F 4 4"],
    *,
    depth_scale: float | Float[Array, ""] | Float[Array, " B"] = 1.0,
    sharpness: float = SHARPNESS,
) -> Float[Array, " B"]:
    """Agreement of two camera paths, in [0, 1]; 1 is exact.

        score = exp(-sharpness (e_t^2 + e_r^2))

    with rms over frames, positions t and rotations relative to the first camera, and

        s   = max(0, sum t_rec . t_ask / (sum |t_rec|^2 + F (STILL depth_scale)^2))
        e_t = rms |s t_rec - t_ask| / rms |t_ask|                      when the path asked moves,
              rms |t_rec| / (TRANSLATION_TOLERANCE depth_scale)        when it does not
        e_r = rms angle(R_rec, R_ask) / max(rms angle(R_ask, I), ROTATION_TOLERANCE)

    A still camera and the opposite movement have e_t or e_r of 1 or more. Errors are relative, so
    the score does not depend on how far a command goes; the length of a recovered translation
    cannot be judged, because its unit is the network's own.

    Args:
        asked: camtoworld of the path asked for, any units.
        recovered: camtoworld from the video, same instants.
        depth_scale: typical depth of the scene in the units of `recovered`: what counts as still.
        sharpness: see the formula.

    Returns:
        The scores; NaN where a pose is not finite.

    Raises:
        ValueError: shapes that are not two equal [B F 4 4].
    """
    translation, rotation = _relative_errors(asked, recovered, depth_scale)
    return jnp.exp(-sharpness * (translation**2 + rotation**2))


def s_traj_segments(
    asked: Float[Array, "B F 4 4"],
    recovered: Float[Array, "B F 4 4"],
    *,
    frames: int = 3,
    depth_scale: float | Float[Array, ""] | Float[Array, " B"] = 1.0,
    sharpness: float = SHARPNESS,
) -> Float[Array, " B"]:
    """`s_traj` of every run of `frames` neighbouring frames, each from its own first one; the mean.

    A jump of the camera condemns the runs that contain it, and not all that follows, and a path
    that drifts off is judged by how it moves. All runs share one scale, the median of those that
    fit each alone, or a video could move at any speed at any time. Tolerances are those of the
    whole path, times the run's share of it; a run in which less is asked for than half of what the
    others are asked for is judged as if it were half.

    Args:
        asked, recovered, depth_scale, sharpness: as in `s_traj`.
        frames: of a run, 2 to F. Short runs are dense, and noisy: a network's error of a pose does
            not shrink with the distance. F gives `s_traj`.

    Raises:
        ValueError: shapes that are not two equal [B F 4 4], or a number of frames that F lacks.
    """
    _check(asked, recovered)
    count = asked.shape[1]
    if not 2 <= frames <= count:
        raise ValueError(f"segments are of {frames} frames: a path of {count} has 2 to {count}")
    runs = np.arange(count - frames + 1)[:, None] + np.arange(frames)
    share = (frames - 1) / (count - 1)
    depth = share * jnp.broadcast_to(jnp.asarray(depth_scale, jnp.float32), asked.shape[:1])
    path, found = (
        relative_to_first(jnp.asarray(x, jnp.float32)[:, runs]) for x in (asked, recovered)
    )
    wanted, seen = path[..., :3, 3], found[..., :3, 3]
    unit = _rms(length_of(wanted))
    scale, moves = _shared_scale(wanted, seen, unit, frames * (STILL * depth[:, None]) ** 2)
    typical = jnp.sum(unit, axis=1) / jnp.maximum(jnp.sum(unit > _NO_TRANSLATION, axis=1), 1)
    unit = jnp.where(moves[:, None], jnp.maximum(unit, 0.5 * typical[:, None]), 1.0)
    off_path = _rms(length_of(scale[:, None, None, None] * seen - wanted)) / unit
    drift = _rms(length_of(seen)) / (TRANSLATION_TOLERANCE * depth[:, None])
    translation = jnp.where(moves[:, None], off_path, drift)
    between = jnp.einsum(
        "bsfji,bsfjk->bsfik", path[..., :3, :3], found[..., :3, :3], precision=lax.Precision.HIGHEST
    )
    turned = _rms(rotation_angle(path[..., :3, :3]))
    rotation = _rms(rotation_angle(between))
    rotation = rotation / jnp.maximum(turned, share * jnp.deg2rad(ROTATION_TOLERANCE))
    return jnp.mean(jnp.exp(-sharpness * (translation**2 + rotation**2)), axis=1)


def _shared_scale(
    wanted: Float[Array, "B S F 3"],
    seen: Float[Array, "B S F 3"],
    unit: Float[Array, "B S"],
    noise: Float[Array, "B 1"],
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """The median (the lower one of two) over runs that are asked to move of the scale that fits
    each, and whether any is."""
    moving = unit > _NO_TRANSLATION
    fit = jnp.sum(seen * wanted, axis=(2, 3)) / (jnp.sum(seen**2, axis=(2, 3)) + noise)
    ordered = jnp.sort(jnp.where(moving, jnp.maximum(fit, 0.0), jnp.inf), axis=1)
    count = jnp.sum(moving, axis=1)
    middle = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0)[:, None] // 2, axis=1)[:, 0]
    return jnp.where(count > 0, middle, 0.0), count > 0


def parts(
    asked: Float[Array, "B F 4 4"],
    recovered: Float[Array, "B F 4 4"],
    *,
    depth_scale: float | Float[Array, ""] | Float[Array, " B"] = 1.0,
    sharpness: float = SHARPNESS,
) -> dict[str, Float[Array, " B"]]:
    """The two factors of `s_traj`: translation exp(-sharpness e_t^2), rotation exp(-sharpness
    e_r^2)."""
    translation, rotation = _relative_errors(asked, recovered, depth_scale)
    return {
        "translation": jnp.exp(-sharpness * translation**2),
        "rotation": jnp.exp(-sharpness * rotation**2),
    }


def errors(
    asked: Float[Array, "B F 4 4"],
    recovered: Float[Array, "B F 4 4"],
    *,
    depth_scale: float | Float[Array, ""] | Float[Array, " B"] = 1.0,
) -> dict[str, Float[Array, " B"]]:
    """rot_err, trans_err and cam_mc, each a sum over frames, as CameraCtrl and CamI2V define them.

    rot_err: angle between the orientations, radians. trans_err: distance between the positions,
    in units of the farthest distance that the path asked for gets from its start (of `depth_scale`
    when it goes nowhere). cam_mc: Frobenius norm of the difference of [R | t], t in those units.

    A departure: CamI2V divides each path by its own farthest distance, which blows up noise when
    one of them stands still; here the recovered one is scaled by least squares, as in `s_traj`.
    """
    paths = _align(asked, recovered, depth_scale)
    depth = jnp.broadcast_to(jnp.asarray(depth_scale, jnp.float32), asked.shape[:1])
    _, moves = _length(paths)
    farthest = jnp.max(length_of(paths.asked), axis=-1)
    on_path = (paths.aligned - paths.asked) / jnp.where(moves, farthest, 1.0)[:, None, None]
    drift = paths.recovered / depth[:, None, None]
    offsets = jnp.where(moves[:, None, None], on_path, drift)
    turns = paths.rotations[1] - paths.rotations[0]
    squared = jnp.sum(turns**2, axis=(-2, -1)) + jnp.sum(offsets**2, axis=-1)
    return {
        "rot_err": jnp.sum(paths.angles, axis=-1),
        "trans_err": jnp.sum(length_of(offsets), axis=-1),
        "cam_mc": jnp.sum(root(squared), axis=-1),
    }


def _relative_errors(
    asked: Array, recovered: Array, depth_scale: float | Array
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """e_t and e_r of `s_traj`."""
    paths = _align(asked, recovered, depth_scale)
    depth = jnp.broadcast_to(jnp.asarray(depth_scale, jnp.float32), asked.shape[:1])
    length, moves = _length(paths)
    off_path = _rms(length_of(paths.aligned - paths.asked)) / length
    drift = _rms(length_of(paths.recovered)) / (TRANSLATION_TOLERANCE * depth)
    unit = jnp.maximum(_rms(paths.turned), jnp.deg2rad(ROTATION_TOLERANCE))
    return jnp.where(moves, off_path, drift), _rms(paths.angles) / unit


def moves(asked: Float[Array, "B F 4 4"]) -> Bool[Array, " B"]:
    """Whether a path asks for any movement; `camera.trajectory` gives exact identities for none."""
    return jnp.max(jnp.abs(asked - asked[:, :1]), axis=(1, 2, 3)) > _NO_TRANSLATION


def aligned_positions(
    asked: Float[Array, "B F 4 4"],
    recovered: Float[Array, "B F 4 4"],
    *,
    depth_scale: float | Float[Array, ""] | Float[Array, " B"] = 1.0,
) -> tuple[Float[Array, "B F 3"], Float[Array, "B F 3"]]:
    """Positions asked for and recovered, relative to the first camera, in asked units; for
    pictures. A recovered path whose scale cannot be known (nothing is asked for) is in units of
    `depth_scale`."""
    paths = _align(asked, recovered, depth_scale)
    _, moves = _length(paths)
    depth = jnp.broadcast_to(jnp.asarray(depth_scale, jnp.float32), asked.shape[:1])
    alone = paths.recovered / depth[:, None, None]
    return paths.asked, jnp.where(moves[:, None, None], paths.aligned, alone)


def _check(asked: Array, recovered: Array) -> None:
    if asked.ndim != 4 or asked.shape[-2:] != (4, 4) or asked.shape != recovered.shape:
        raise ValueError(
            f"asked has shape {asked.shape} and recovered {recovered.shape}, "
            "want two equal shapes (B, F, 4, 4)"
        )


def _align(asked: Array, recovered: Array, depth_scale: float | Array) -> _Alignment:
    _check(asked, recovered)
    path, found_path = (relative_to_first(jnp.asarray(x, jnp.float32)) for x in (asked, recovered))
    turns, positions = path[..., :3, :3], path[..., :3, 3]
    found_turns, found = found_path[..., :3, :3], found_path[..., :3, 3]
    between = jnp.einsum("bfji,bfjk->bfik", turns, found_turns, precision=lax.Precision.HIGHEST)
    noise = asked.shape[1] * (STILL * jnp.asarray(depth_scale, jnp.float32)) ** 2
    scale = jnp.sum(found * positions, axis=(1, 2)) / (jnp.sum(found**2, axis=(1, 2)) + noise)
    aligned = jnp.maximum(scale, 0.0)[:, None, None] * found
    angles, turned = rotation_angle(between), rotation_angle(turns)
    return _Alignment(positions, aligned, found, angles, turned, (turns, found_turns))


def _length(paths: _Alignment) -> tuple[Float[Array, " B"], Array]:
    """rms displacement asked for (1 where there is none), and whether there is any."""
    length = _rms(length_of(paths.asked))
    moves = length > _NO_TRANSLATION
    return jnp.where(moves, length, 1.0), moves


def _rms(values: Float[Array, "*b F"]) -> Float[Array, "*b"]:
    return root(jnp.mean(values**2, axis=-1))


@dataclasses.dataclass(frozen=True)
class Trajectory(Reward):
    """S_traj as a reward, its two factors and its errors beside it; NaN where a frame shows nothing
    (`likeness.BLANK`), for the path that is recovered there would be made up.

    Attributes:
      depth_scale: typical depth in the 3D network's units; scales the tolerance on still cameras.
      mode: "paper"; "segments", run by run (`s_traj_segments`); or "released", by the formula of
        World-R1's code.
      segment: frames of a run, of those that are reconstructed; at most all are taken.
    """

    needs = CAMERAS

    depth_scale: float = 1.0
    mode: str = "paper"
    segment: int = 3

    def __post_init__(self) -> None:
        in_range(self, depth_scale=(1e-6, 1e6), segment=(2, 10_000))
        one_of(self, mode=("paper", "segments", "released"))

    def compare(
        self, asked: Float[Array, "B F 4 4"], recovered: Float[Array, "B F 4 4"]
    ) -> Float[Array, " B"]:
        """S_traj of recovered paths, in [0, 1], by `mode`."""
        if self.mode == "released":
            return released.s_traj(asked, recovered)
        if self.mode == "segments":
            frames = min(self.segment, asked.shape[1])
            return s_traj_segments(asked, recovered, frames=frames, depth_scale=self.depth_scale)
        return s_traj(asked, recovered, depth_scale=self.depth_scale)

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        path, found = evidence.path, evidence.found().camtoworld
        factors = parts(path, found, depth_scale=self.depth_scale)
        measured = {
            "trajectory": self.compare(path, found),
            **{f"trajectory_{name}": value for name, value in factors.items()},
            **errors(path, found, depth_scale=self.depth_scale),
        }
        return where_shown(measured, evidence)
