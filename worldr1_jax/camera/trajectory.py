"""Camera commands -> camera path.

Axes are OpenCV's: x right, y down, z forward. A pose is camtoworld [4 4]; the first camera of a
path is the identity, so the world frame is the first camera's frame.

What each command does to the camera, in its own frame at the start of its segment:
  push_in +z, pull_out -z, move_right +x, move_left -x, move_up -y, move_down +y (translation);
  pan_right turns the view towards +x, pan_left towards -x; tilt_up towards -y, tilt_down +y;
  roll_right turns the camera clockwise as seen from behind it (the image turns anticlockwise);
  orbit_right carries the camera to the right (+x at first) around the point `orbit_radius` ahead
  while it faces that point; orbit_left to the left. fixed does nothing.

"slowly" and "quickly" change the rate at which a command moves, see `RATES`: as every command has
the same share of the frames, it goes half as far, or half as far again. Where an angle is given as
well, the angle holds and the share of the frames changes instead.

Departures from the released code, each deliberate:
  - Orbits look at their centre. The released ones circle a point BEHIND the start and do not face
    it, so a reconstruction cannot agree with what "orbit" means.
  - The path starts at the origin and is built in float64. The released one starts at
    (3390, 1380, 240) in float32 and six decimal digits, which leaves a pan no exact rotation.
  - A segment starts one step after the last pose of the one before. The released code repeats
    that pose, so its camera stalls for a frame at each joint.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float32, Float64

from worldr1_jax.camera import commands
from worldr1_jax.files import short

# Of the usual rate, by `commands.SPEEDS`. A quick push still ends before `scene_depth`.
RATES = {"": 1.0, "slowly": 0.5, "quickly": 1.5}


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """How far each command goes over its whole segment. Lengths in world units, angles in degrees.

    The defaults are the released ones, for a scene about `scene_depth` = 1000 units away; tilt and
    roll, which are not in the release, take the pan's angle, and vertical moves `move`.
    """

    push: float = 600.0
    move: float = 220.0
    pan: float = 14.0
    orbit: float = 24.0
    orbit_radius: float = 600.0
    scene_depth: float = 1000.0

    @classmethod
    def nano(
        cls,
        push: float = 1.2,
        move: float = 0.8,
        pan: float = 14.0,
        orbit: float = 24.0,
        orbit_radius: float = 4.0,
        scene_depth: float = 4.0,
    ) -> "Magnitudes":
        """For the nano world, whose scenes lie about four units ahead."""
        return cls(push, move, pan, orbit, orbit_radius, scene_depth)


def _rotation(axis: int, degrees: float) -> Float64[np.ndarray, "4 4"]:
    """Right-handed rotation about x (0), y (1) or z (2)."""
    radians = math.radians(degrees)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    pose = np.eye(4)
    pose[first, first] = pose[second, second] = math.cos(radians)
    pose[second, first] = math.sin(radians)
    pose[first, second] = -pose[second, first]
    return pose


def _translation(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Float64[np.ndarray, "4 4"]:
    pose = np.eye(4)
    pose[:3, 3] = x, y, z
    return pose


def _pose(name: str, progress: float, magnitudes: Magnitudes) -> Float64[np.ndarray, "4 4"]:
    """Pose of the camera in the frame of the segment's start, after `progress` in [0, 1]."""
    verb, _, direction = name.partition("_")
    sign = -1.0 if direction in ("left", "out", "up") else 1.0
    amount = sign * progress
    if verb in ("push", "pull"):
        return _translation(z=amount * magnitudes.push)
    if verb == "move":
        key = "y" if direction in ("up", "down") else "x"
        return _translation(**{key: amount * magnitudes.move})
    if verb == "pan":  # a right-handed turn about y (down) carries z towards x
        return _rotation(1, amount * magnitudes.pan)
    if verb == "tilt":  # a right-handed turn about x carries z towards -y, that is up
        return _rotation(0, -amount * magnitudes.pan)
    if verb == "roll":
        return _rotation(2, amount * magnitudes.pan)
    if verb == "orbit":
        # Turning about the centre ahead by a left turn moves the camera to the right of it.
        turn = _rotation(1, -amount * magnitudes.orbit)
        centre = magnitudes.orbit_radius
        return _translation(z=centre) @ turn @ _translation(z=-centre)
    return np.eye(4)


def segments(commands_count: int, frames: int) -> tuple[int, ...]:
    """Frames of each command: ceil(frames / n) for the first ones, one less for the others where
    n does not divide (81 frames, 2 commands: 41 and 40; 3 commands: 27 each). The released code
    gives every command ceil(frames / n) and resamples the surplus away.
    """
    short, longer = divmod(frames, commands_count)
    return tuple(short + (index < longer) for index in range(commands_count))


def _shares(moves: Sequence[commands.Move], frames: int) -> tuple[int, ...]:
    """Frames of each move: `segments`, unless an angle at another speed asks for more or fewer."""
    weights = [1.0 if move.degrees is None else 1.0 / RATES[move.speed] for move in moves]
    if len(set(weights)) == 1:
        return segments(len(moves), frames)
    ends = np.rint(np.cumsum(weights) / sum(weights) * frames).astype(int)
    return tuple(int(n) for n in np.diff(ends, prepend=0))


def _extent(move: commands.Move, magnitudes: Magnitudes) -> float:
    """How far a move goes, in units of the command's own magnitude."""
    if move.degrees is None:
        return RATES[move.speed]
    usual = magnitudes.orbit if move.name.startswith("orbit") else magnitudes.pan
    return move.degrees / usual


def check_fit(prompts: Iterable[str], frames: int) -> None:
    """Raises ValueError, with the prompt, for one that asks for more movements than frames show."""
    seen = set[tuple[commands.Move, ...]]()
    for prompt in prompts:
        moves = commands.moves(prompt)
        if moves not in seen:
            try:
                path(moves, frames)
            except ValueError as error:
                raise ValueError(f"prompt '{short(prompt)}': {error}") from error
            seen.add(moves)


def path(
    names: Sequence[str | commands.Move], frames: int, *, magnitudes: Magnitudes | None = None
) -> Float32[np.ndarray, "F 4 4"]:
    """Builds the camera path that the commands ask for.

    Args:
      names: commands in order, out of `commands.NAMES`, or moves as `commands.moves` reads them.
        None at all is the same as "fixed".
      frames: F, video frames. Each command reaches its full extent on its last frame.
      magnitudes: how far each command goes; the released ones when None.

    Returns:
      camtoworld, float32, computed in float64. The first pose is exactly the identity, and a
      fixed path is the identity throughout.

    Raises:
      ValueError: what `commands.check` refuses, or fewer frames than the commands need to move at
        all.
    """
    moves = commands.check(names) or (commands.Move("fixed"),)
    magnitudes = magnitudes or Magnitudes()
    if frames < 1:
        raise ValueError(f"A path needs at least 1 frame, and {frames} were asked for")
    still = all(move.name == "fixed" for move in moves)
    lengths = segments(len(moves), frames) if still else _shares(moves, frames)
    # The first movement spends a frame on the identity.
    least = 1 if moves[0].name == "fixed" else 2
    if not still and (frames <= len(moves) or min(lengths) < 1 or lengths[0] < least):
        raise ValueError(
            f"{frames} frames are too few for {len(moves)} camera commands, at the share that each "
            "has of them: each has to move in one, and the first spends one on the start"
        )
    poses, start = [np.eye(4)], np.eye(4)
    for index, (move, length) in enumerate(zip(moves, lengths, strict=True)):
        steps = length - (index == 0)  # the first segment spends a frame on the identity
        extent = _extent(move, magnitudes)
        for step in range(1, steps + 1):
            poses.append(start @ _pose(move.name, step / steps * extent, magnitudes))
        start = poses[-1]
    return np.stack(poses).astype(np.float32)
