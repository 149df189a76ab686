"""S_meta without a judge: do the halves of a video agree on what the scene looks like from aside?

World-R1 shows a view from beside the path to a vision language model. Here nobody is asked. The
Gaussians of every other frame are seen from a place where no camera was, and so are those of the
frames between. A surface that is one surface looks the same in both; a card that turns with the
camera, a thing that floats before the lens, a shape that changes with time, or a depth that is
another in each frame does not. On the path itself all of these hide, which is why S_recon misses
them.

The exam is the same for all: the camera of the middle frame is turned about the point that it looks
at, at its mean depth, by a fixed angle, once to either side. So nothing depends on the unit of
length; and the axis follows from the path that was ASKED for, so that a group sits one exam and no
member can choose it. Pixels that a half does not show are left out, neither rewarded nor punished.

What it cannot see: whatever both halves do alike. A still video agrees with itself perfectly, a
blurred one well; S_traj and S_recon's gates see these.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from worldr1_jax.fields import in_range, one_of
from worldr1_jax.geometry import relative_to_first, rigid
from worldr1_jax.mesh.arrays import each_device
from worldr1_jax.rewards.base import GAUSSIANS, Evidence, Parts, Reward
from worldr1_jax.rewards.likeness import ssim_where, structure_where, where_shown
from worldr1_jax.splat import render as splat
from worldr1_jax.types import Reconstruction

ANGLE = 9.0  # degrees; on nano wider ones tell nothing better apart, and are covered less
COVER = 0.75  # share of pixels that both halves have to show in either view
OPAQUE = 0.5  # alpha above which a half shows a pixel
NEAR = 0.05  # of the mean depth: what is nearer is not seen, or a wall beside would fill the view
INSIDE = 0.3  # of the mean depth: a view whose own median is nearer stands inside something
RELIEF = 0.03  # spread of log depth in a window (SSIM's) below which differences count less
SPLITS = ("alternate", "halves")


class _Seen(NamedTuple):
    """The two views of each video, from one angle."""

    colour: Float[Array, " B"]  # SSIM
    depth: Float[Array, " B"]  # SSIM of its logarithm
    cover: Float[Array, " B"]  # of the view that shows less
    usable: Bool[Array, " B"]
    angle: Float[Array, " B"]  # degrees

    @property
    def mean(self) -> Float[Array, " B"]:
        """Of red, green, blue and depth."""
        return 0.75 * self.colour + 0.25 * self.depth


def agreement(
    reconstruction: Reconstruction,
    asked: Float[Array, "B F 4 4"],
    *,
    angle: float = ANGLE,
    split: str = "alternate",
    method: str = "tiled",
) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
    """How alike the two halves of each video look from two places beside the path.

    Where either half shows less than COVER of a view, or a view stands inside of something, the
    video is looked at again from half the angle, which is easier: what of the first look could be
    compared still counts where it was worse. If that fails too, it cannot be judged.

    The places count as given: no gradient flows through where the exam is held, or a video could
    be improved by moving it.

    Args:
        reconstruction: with Gaussians that come frame by frame.
        asked: the path asked for at the same frames; only its axis counts, see `elevates`.
        angle: by which the views turn from the middle camera, degrees.
        split: "alternate": even against odd frames; "halves": first against last ones, the middle
            one of an odd number left out, which asks more and is more often not covered.
        method: of `splat.render`.

    Returns:
        The scores [B], mean SSIM of red, green, blue and the logarithm of depth (of which the
        structure alone counts) where both halves are opaque, -1 to 1; NaN where a video could not
        be judged. Beside them colour and depth, the two apart; cover, the share of pixels judged of
        the view that has less; and angle.

    Raises:
        ValueError: a single frame, shapes that do not belong together, or an unknown split.
    """
    gaussians, frames = reconstruction.gaussians, reconstruction.depth.shape[1]
    if gaussians is None or asked.shape[:2] != reconstruction.depth.shape[:2]:
        raise ValueError(
            f"asked has shape {asked.shape}, and the reconstruction is of "
            f"{reconstruction.depth.shape[:2]} videos and frames"
            f"{' without Gaussians' if gaussians is None else ''}: want Gaussians and (B, F, 4, 4)"
        )
    halves = jnp.asarray(_halves(reconstruction.gaussian_frames or frames, split))
    look = functools.partial(_look, reconstruction, asked, halves, method=method)

    def again(seen: _Seen, turn: Array) -> tuple[_Seen, None]:
        narrower = lax.cond(jnp.all(seen.usable), lambda: seen, lambda: look(turn))
        worse = (seen.angle > 0) & (seen.cover > 0) & (seen.mean < narrower.mean)
        colour, depth = (
            jnp.where(worse, a, b)
            for a, b in ((seen.colour, narrower.colour), (seen.depth, narrower.depth))
        )
        narrower = narrower._replace(colour=colour, depth=depth)
        return jax.tree.map(functools.partial(jnp.where, seen.usable), seen, narrower), None

    nothing = jnp.zeros(len(asked))
    unseen = _Seen(nothing, nothing, nothing, nothing > 0, nothing)
    seen, _ = lax.scan(again, unseen, jnp.array([angle, angle / 2]))
    parts = {"meta_view": seen.mean, "colour": seen.colour, "depth": seen.depth}
    parts = {name: jnp.where(seen.usable, part, jnp.nan) for name, part in parts.items()}
    return parts.pop("meta_view"), parts | {"cover": seen.cover, "angle": seen.angle}


def _halves(frames: int, split: str) -> Float[np.ndarray, "2 F"]:
    """1 for the frames of either half."""
    if split not in SPLITS:
        raise ValueError(f"split is '{split}': it is {' or '.join(SPLITS)}")
    if frames < 2:
        raise ValueError(f"there are Gaussians of {frames} frame: two halves need 2 or more")
    number = np.arange(frames)
    if split == "alternate":
        halves = number % 2 == 0, number % 2 == 1
    else:
        halves = number < frames // 2, number >= frames - frames // 2
    return np.stack(halves).astype(np.float32)


# ---- The exam ------------------------------------------------------------------------------------


def focus(reconstruction: Reconstruction) -> Float[Array, " B"]:
    """Harmonic mean depth of the middle frame, every pixel weighted by its confidence.

    About a point at this depth, what is nearer and what is farther moves equally far across the
    view. (The median is the backdrop's wherever half of the view is sky: to turn by an angle about
    that takes the camera out of the scene.)
    """
    middle = reconstruction.depth.shape[1] // 2
    depth, weight = reconstruction.depth[:, middle], reconstruction.confidence[:, middle]
    return jnp.sum(weight, axis=(1, 2)) / jnp.sum(weight / depth, axis=(1, 2))


def elevates(asked: Float[Array, "B F 4 4"]) -> Bool[Array, " B"]:
    """Whether the views lie above and below the path, or to its left and right.

    Above and below where the path goes or looks sideways more than up or down (move, orbit and pan
    to the side); beside it where it goes ahead, back, up, down or nowhere. Going counts as the
    share of the longest way from the start, looking as the sine of the angle.
    """
    asked = relative_to_first(asked)  # a path of a user's own may start anywhere
    positions = asked[..., :3, 3]
    farthest = jnp.max(jnp.linalg.norm(positions, axis=-1), axis=1)
    goes = jnp.max(jnp.abs(positions[..., :2]), axis=1) / jnp.maximum(farthest, 1e-6)[:, None]
    aside = goes + jnp.max(jnp.abs(asked[..., :2, 2]), axis=1)
    return aside[:, 0] > aside[:, 1] + 1e-3  # no rounding decides


def offset_poses(
    middle: Float[Array, "B 4 4"],
    depth: Float[Array, " B"],
    elevate: Bool[Array, " B"],
    angles: Float[Array, " P"],
) -> Float[Array, "B P 4 4"]:
    """The middle camera turned about the point at `depth` on its axis, which it goes on looking at;
    up and down, or left and right. Angles in radians."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    zero, one = jnp.zeros_like(angles), jnp.ones_like(angles)
    rows = ((one, zero, zero), (zero, cos, -sin), (zero, sin, cos))
    about_x = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
    about_y = about_x[:, [1, 0, 2]][:, :, [1, 0, 2]]
    turn = jnp.where(elevate[:, None, None, None], about_x, about_y)
    centre = depth[:, None, None] * jnp.array([0.0, 0.0, 1.0])
    step = rigid(turn, centre - depth[:, None, None] * turn[..., 2])
    return jnp.einsum("bij,bpjk->bpik", middle, step, precision="highest")


def exam(
    reconstruction: Reconstruction, asked: Float[Array, "B F 4 4"], angle: float | Array
) -> tuple[Float[Array, "B 2 4 4"], Float[Array, " B"]]:
    """The two poses of each video, and its depth of focus. The axis is the one that the asked path
    leaves free, or the other one where an input camera is within half of `angle` (degrees) of a
    pose, seen from the point of focus, and is not on the other."""
    depth = focus(reconstruction)
    middle = reconstruction.camtoworld[:, reconstruction.depth.shape[1] // 2]
    centre = middle[:, :3, 3] + depth[:, None] * middle[:, :3, 2]
    radians = jnp.deg2rad(angle)
    first = elevates(asked)
    turns = jnp.stack([radians, -radians])
    choices = [offset_poses(middle, depth, axis, turns) for axis in (first, ~first)]

    def crowded(poses: Float[Array, "B 2 4 4"]) -> Bool[Array, " B"]:
        ours = poses[..., :3, 3] - centre[:, None]
        theirs = reconstruction.camtoworld[..., :3, 3] - centre[:, None]
        cosine = jnp.einsum("bpi,bfi->bpf", ours, theirs, precision="highest")
        lengths = [jnp.linalg.norm(each, axis=-1) for each in (ours, theirs)]
        near = jnp.cos(radians / 2) * lengths[0][:, :, None] * lengths[1][:, None]
        return jnp.any(cosine > near, axis=(1, 2))

    other = crowded(choices[0]) & ~crowded(choices[1])
    poses = jnp.where(other[:, None, None, None], choices[1], choices[0])
    return lax.stop_gradient((poses, depth))


def _look(
    reconstruction: Reconstruction,
    asked: Float[Array, "B F 4 4"],
    halves: Float[Array, "2 G"],
    angle: Array,
    method: str,
) -> _Seen:
    """Both halves, from both poses, and how alike they are."""
    poses, depth = exam(reconstruction, asked, angle)
    middle = reconstruction.depth.shape[1] // 2
    matrices = jnp.repeat(reconstruction.intrinsics[:, middle, None], 2, axis=1)
    gaussians = reconstruction.gaussians
    assert gaussians is not None  # `agreement` has looked
    opacities = gaussians.opacities

    def view(members: Float[Array, " G"]) -> splat.Rendered:
        shown = opacities.reshape(len(opacities), len(members), -1) * members[:, None]
        return splat.render(
            gaussians.replace(opacities=shown.reshape(opacities.shape)),  # type: ignore[attr-defined]
            poses,
            matrices,
            (reconstruction.depth.shape[2], reconstruction.depth.shape[3]),
            method=method,
            near=NEAR * depth,
        )

    images = lax.map(view, halves)  # one after the other: memory of one
    shown = jnp.all(images.alpha > OPAQUE, axis=0)
    solid = jnp.where(shown, images.alpha, 1.0)[..., None]
    colours = jnp.where(shown[..., None], jnp.clip(images.rgb / solid, 0.0, 1.0), 0.0)
    reliefs = jnp.log(jnp.where(shown, images.depth / depth[:, None, None, None], 1.0))[..., None]
    cover = jnp.min(jnp.mean(shown, axis=(2, 3)), axis=1)
    nearest = jnp.nanmedian(jnp.where(shown, images.depth, jnp.nan), axis=(0, 3, 4))
    outside = jnp.all(nearest > INSIDE * depth[:, None], axis=1)
    return _Seen(
        colour=jnp.mean(ssim_where(colours[0], colours[1], shown), axis=1),
        depth=jnp.mean(structure_where(reliefs[0], reliefs[1], shown, RELIEF), axis=1),
        cover=cover,
        usable=(cover >= COVER) & outside,
        angle=jnp.full_like(cover, angle),
    )


@dataclasses.dataclass(frozen=True)
class MetaView(Reward):
    """S_meta without a judge: `agreement`; NaN where a frame shows nothing (`likeness.BLANK`).

    Attributes:
      angle: by which the two views turn from the middle camera, degrees.
      split: of the frames into halves, "alternate" or "halves".
    """

    needs = GAUSSIANS

    angle: float = ANGLE
    split: str = "alternate"

    def __post_init__(self) -> None:
        in_range(self, angle=(0.1, 60))
        one_of(self, split=SPLITS)

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        def own(found: Reconstruction, path: Float[Array, "B F 4 4"]) -> Any:
            return agreement(
                found, path, angle=self.angle, split=self.split, method=evidence.renderer
            )

        score, beside = each_device(own)(evidence.found(), evidence.path)
        named = {f"meta_view_{name}": part for name, part in beside.items()}
        return where_shown({"meta_view": score}, evidence) | named
