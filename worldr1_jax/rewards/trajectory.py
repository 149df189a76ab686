"""S_traj: does the recovered camera path follow the path that the prompt asked for?

Both paths start at the identity, which fixes the frame, so only the scale of the recovered one is
unknown. A full similarity fit is wrong here: a straight line leaves its rotation free, and a still
camera leaves everything free (the released code scores a perfect push-in 0.52 and a perfect pan
0.65).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from worldr1_jax.fields import in_range, one_of
from worldr1_jax.geometry import rotation_angle
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
    depth_scale: float | Float[Array, " B"] = 1.0,
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


def parts(
    asked: Float[Array, "B F 4 4"],
    recovered: Float[Array, "B F 4 4"],
    *,
    depth_scale: float | Float[Array, " B"] = 1.0,
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
    depth_scale: float | Float[Array, " B"] = 1.0,
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
    farthest = jnp.max(jnp.linalg.norm(paths.asked, axis=-1), axis=-1)
    on_path = (paths.aligned - paths.asked) / jnp.where(moves, farthest, 1.0)[:, None, None]
    drift = paths.recovered / depth[:, None, None]
    offsets = jnp.where(moves[:, None, None], on_path, drift)
    turns = paths.rotations[1] - paths.rotations[0]
    squared = jnp.sum(turns**2, axis=(-2, -1)) + jnp.sum(offsets**2, axis=-1)
    return {
        "rot_err": jnp.sum(paths.angles, axis=-1),
        "trans_err": jnp.sum(jnp.linalg.norm(offsets, axis=-1), axis=-1),
        "cam_mc": jnp.sum(jnp.sqrt(squared), axis=-1),
    }


def relative_to_first(
    camtoworld: Float[Array, "B F 4 4"],
) -> tuple[Float[Array, "B F 3 3"], Float[Array, "B F 3"]]:
    """Rotations and positions of a path in the frame of its first camera."""
    to_first = camtoworld[:, 0, :3, :3].swapaxes(-1, -2)
    exact = lax.Precision.HIGHEST
    rotations = jnp.einsum("bij,bfjk->bfik", to_first, camtoworld[..., :3, :3], precision=exact)
    offsets = camtoworld[..., :3, 3] - camtoworld[:, :1, :3, 3]
    return rotations, jnp.einsum("bij,bfj->bfi", to_first, offsets, precision=exact)


def _relative_errors(
    asked: Array, recovered: Array, depth_scale: float | Array
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """e_t and e_r of `s_traj`."""
    paths = _align(asked, recovered, depth_scale)
    depth = jnp.broadcast_to(jnp.asarray(depth_scale, jnp.float32), asked.shape[:1])
    length, moves = _length(paths)
    off_path = _rms(jnp.linalg.norm(paths.aligned - paths.asked, axis=-1)) / length
    drift = _rms(jnp.linalg.norm(paths.recovered, axis=-1)) / (TRANSLATION_TOLERANCE * depth)
    unit = jnp.maximum(_rms(paths.turned), jnp.deg2rad(ROTATION_TOLERANCE))
    return jnp.where(moves, off_path, drift), _rms(paths.angles) / unit


def moves(asked: Float[Array, "B F 4 4"]) -> Bool[Array, " B"]:
    """Whether a path asks for any movement; `camera.trajectory` gives exact identities for none."""
    return jnp.max(jnp.abs(asked - jnp.eye(4)), axis=(1, 2, 3)) > _NO_TRANSLATION


def aligned_positions(
    asked: Float[Array, "B F 4 4"],
    recovered: Float[Array, "B F 4 4"],
    *,
    depth_scale: float | Float[Array, " B"] = 1.0,
) -> tuple[Float[Array, "B F 3"], Float[Array, "B F 3"]]:
    """Positions asked for and recovered, relative to the first camera, in asked units; for
    pictures. A recovered path whose scale cannot be known (nothing is asked for) is in units of
    `depth_scale`."""
    paths = _align(asked, recovered, depth_scale)
    _, moves = _length(paths)
    depth = jnp.broadcast_to(jnp.asarray(depth_scale, jnp.float32), asked.shape[:1])
    alone = paths.recovered / depth[:, None, None]
    return paths.asked, jnp.where(moves[:, None, None], paths.aligned, alone)


def _align(asked: Array, recovered: Array, depth_scale: float | Array) -> _Alignment:
    if asked.ndim != 4 or asked.shape[-2:] != (4, 4) or asked.shape != recovered.shape:
        raise ValueError(
            f"asked has shape {asked.shape} and recovered {recovered.shape}, "
            "want two equal shapes (B, F, 4, 4)"
        )
    turns, positions = relative_to_first(jnp.asarray(asked, jnp.float32))
    found_turns, found = relative_to_first(jnp.asarray(recovered, jnp.float32))
    between = jnp.einsum("bfji,bfjk->bfik", turns, found_turns, precision=lax.Precision.HIGHEST)
    noise = asked.shape[1] * (STILL * jnp.asarray(depth_scale, jnp.float32)) ** 2
    scale = jnp.sum(found * positions, axis=(1, 2)) / (jnp.sum(found**2, axis=(1, 2)) + noise)
    aligned = jnp.maximum(scale, 0.0)[:, None, None] * found
    angles, turned = rotation_angle(between), rotation_angle(turns)
    return _Alignment(positions, aligned, found, angles, turned, (turns, found_turns))


def _length(paths: _Alignment) -> tuple[Float[Array, " B"], Array]:
    """rms displacement asked for (1 where there is none), and whether there is any."""
    length = _rms(jnp.linalg.norm(paths.asked, axis=-1))
    moves = length > _NO_TRANSLATION
    return jnp.where(moves, length, 1.0), moves


def _rms(values: Float[Array, "B F"]) -> Float[Array, " B"]:
    return jnp.sqrt(jnp.mean(values**2, axis=-1))


@dataclasses.dataclass(frozen=True)
class Trajectory(Reward):
    """S_traj as a reward, its two factors and its errors beside it; NaN where a frame shows nothing
    (`likeness.BLANK`), for the path that is recovered there would be made up.

    Attributes:
      depth_scale: typical depth in the 3D network's units; scales the tolerance on still cameras.
      mode: "paper", or "released" for the formula of World-R1's code.
    """

    needs = CAMERAS

    depth_scale: float = 1.0
    mode: str = "paper"

    def __post_init__(self) -> None:
        in_range(self, depth_scale=(1e-6, 1e6))
        one_of(self, mode=("paper", "released"))

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        path, found = evidence.path, evidence.found().camtoworld
        if self.mode == "released":
            from worldr1_jax.rewards import released  # which builds on this module

            score = released.s_traj(path, found)
        else:
            score = s_traj(path, found, depth_scale=self.depth_scale)
        factors = parts(path, found, depth_scale=self.depth_scale)
        measured = {
            "trajectory": score,
            **{f"trajectory_{name}": value for name, value in factors.items()},
            **errors(path, found, depth_scale=self.depth_scale),
        }
        return where_shown(measured, evidence)
