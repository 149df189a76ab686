"""S_recon: do the 3D Gaussians found in a video, seen from its recovered cameras, look like it?

What the score cannot see, and what sees it instead:
  - A still or blurred video is easy to explain: on 16 nano scenes S_recon RISES from 0.875 to 0.926
    when they freeze and to 0.886 when they are half blurred, and shuffled frames pass, 0.871
    (tests/measure/truth_of_rewards.py). S_traj falls under all three, and so does the plain sum.
  - Three options, all off or low by default, make S_recon itself charge: `change_min` for
    stillness, `texture_min` for softness, and `change_floor`, which asks for more than standing
    still explains. They can be gamed in turn: a `change_min` above what the policy's videos have
    pays for movement as such. With 0.3 in a run of nano the gated score rose by 0.06 while the
    PSNR of the re-renders fell by 0.8 dB.
  - A blank video is explained perfectly by a blank scene (SSIM 1, LPIPS 0). `texture` gates it: the
    score is multiplied by min(1, texture / TEXTURE_MIN). Where a single frame is below BLANK, its
    camera would be made up (nano's network gives black videos a mean S_traj of 0.41): such a video
    gets no S_traj, and no total where S_traj counts.
  - Moving objects lower it; it is off in the dynamic phase.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from worldr1_jax.fields import in_range, of_kind, one_of
from worldr1_jax.mesh import placement
from worldr1_jax.mesh.arrays import each_device
from worldr1_jax.mesh.make import current
from worldr1_jax.models import lpips
from worldr1_jax.rewards import reconstruct
from worldr1_jax.rewards.base import GAUSSIANS, Evidence, Networks, Parts, Reward
from worldr1_jax.rewards.likeness import finite, psnr, ssim, texture
from worldr1_jax.rewards.reconstruct import frame_indices
from worldr1_jax.rewards.trajectory import moves
from worldr1_jax.splat import render as splat
from worldr1_jax.types import Reconstruction
from worldr1_jax.weights.needed import Needed

TEXTURE_MIN = 0.02  # mean local standard deviation of brightness; about 5 of 255 levels

Perceptual = Callable[[Float[Array, "N H W 3"], Float[Array, "N H W 3"]], Float[Array, " N"]]
Average = Callable[[Float[Array, "B v"]], Float[Array, " B"]]


def s_recon(
    video: Float[Array, "B F H W 3"],
    reconstruction: Reconstruction,
    *,
    views: int | None = None,
    perceptual: Perceptual | None = None,
    texture_min: float = TEXTURE_MIN,
    change_floor: float = 0.0,
    change_min: float = 0.0,
    moves: Bool[Array, " B"] | None = None,
    method: str = "tiled",
    shared: tuple[str, ...] = (),
) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
    """Renders the Gaussians at the recovered cameras and compares with the same frames.

        S_recon = clip(likeness, 0, 1) min(1, texture / texture_min) min(1, change / change_min)

    likeness is the mean over frames of SSIM, or of 1 - perceptual(render, frame) when a perceptual
    distance such as LPIPS is given (the paper's choice). Render k shows the instant and the camera
    of frame k, with the intrinsics of the image that the network was given, to which the video is
    resized: the released code compares other instants and squeezes its renders.

    change is the mean unlikeness of the middle frame to the others, and its gate is off by default.
    With a `change_floor` c > 0, likeness is instead 1 - (1 - likeness) / (change + c): the part of
    what happens in the video that the re-render explains. Where `moves` is False (the prompt asks
    for a fixed camera) neither of the two acts.

    Args:
        video: in [0, 1], exactly the frames that were reconstructed.
        reconstruction: of the same videos and frames.
        views: compare only so many frames, evenly spaced, ends included; None takes all.
        perceptual: distance of two batches of images in [0, 1], one number an image, 0 = same.
        texture_min: see above; 0 leaves the gate out.
        change_floor: see above; 0 leaves it out. Asks for a network that knows such footage.
        change_min: see above; 0 leaves it out. Choose it below what the base policy has.
        moves: see above; None takes all as moving.
        method: of `splat.render`.
        shared: axes of the mesh whose devices hold the same videos, inside `jax.shard_map`: each
            renders and compares its share of the views.

    Returns:
        The scores [B] in [0, 1], NaN where the video or its reconstruction is not finite; and
        psnr (dB, at most 100), ssim (-1 to 1), coverage (mean alpha), texture and texture_least
        (that of the frame that shows least, of all frames) beside them, and perceptual, the mean
        distance, where one is given.

    Raises:
        ValueError: shapes that do not belong together, or fewer than 1 or more than F views.
    """
    _check(video, reconstruction)
    size = (reconstruction.depth.shape[2], reconstruction.depth.shape[3])
    chosen = frame_indices(video.shape[1], views)
    mine, average = _views_of(chosen, shared)
    resized = reconstruct.resize_frames(video, size)
    frames = resized[:, mine]
    image, alpha = _rerendered(reconstruction, mine, size, method)
    similarity = average(ssim(image, frames))
    likeness = similarity if perceptual is None else average(_likeness(image, frames, perceptual))
    judged = likeness
    if change_floor > 0 or change_min > 0:
        middle = jnp.broadcast_to(resized[:, chosen[len(chosen) // 2], None], frames.shape)
        # 0 for a still video; the middle frame is like itself, and so does not count.
        others = len(chosen) / max(len(chosen) - 1, 1)
        change = others * (1.0 - average(_likeness(middle, frames, perceptual)))
        judged = _charged(likeness, change, change_floor, change_min, moves)
    shown = texture(resized)
    detail = jnp.mean(shown[:, chosen], axis=1)
    gate = jnp.minimum(1.0, detail / texture_min) if texture_min > 0 else 1.0
    parts = {
        "psnr": average(psnr(image, frames)),
        "ssim": similarity,
        "coverage": average(jnp.mean(alpha, axis=(2, 3))),
        "texture": detail,
        "texture_least": jnp.min(shown, axis=1),
        **({} if perceptual is None else {"perceptual": 1.0 - likeness}),
    }
    # The renderer leaves out a Gaussian that is not finite, which would hide the failure.
    sound = finite((video, reconstruction))
    score = jnp.clip(judged, 0.0, 1.0) * gate
    return jax.tree.map(lambda part: jnp.where(sound, part, jnp.nan), (score, parts))


def _check(video: Array, reconstruction: Reconstruction) -> None:
    if video.ndim != 5 or video.shape[:2] != reconstruction.camtoworld.shape[:2]:
        raise ValueError(
            f"video has shape {video.shape}, and the reconstruction is of "
            f"{reconstruction.camtoworld.shape[:2]} videos and frames: want (B, F, H, W, 3)"
        )


def _rerendered(
    reconstruction: Reconstruction, frames: Array | np.ndarray, size: tuple[int, int], method: str
) -> tuple[Float[Array, "B v H W 3"], Float[Array, "B v H W"]]:
    """The Gaussians seen by the cameras of some frames, in [0, 1], and how opaque they are."""
    rendered = splat.render(
        reconstruction.gaussians,
        reconstruction.camtoworld[:, frames],
        reconstruction.intrinsics[:, frames],
        size,
        method=method,
    )
    return jnp.clip(rendered.rgb, 0.0, 1.0), rendered.alpha


def _charged(
    likeness: Float[Array, " B"],
    change: Float[Array, " B"],
    change_floor: float,
    change_min: float,
    moves: Bool[Array, " B"] | None,
) -> Float[Array, " B"]:
    """The likeness as `s_recon`'s two options of change see it, where the path moves."""
    judged = likeness
    if change_floor > 0:
        judged = 1.0 - (1.0 - judged) / (change + change_floor)
    judged = jnp.clip(judged, 0.0, 1.0)
    if change_min > 0:
        judged = judged * jnp.minimum(1.0, change / change_min)
    return judged if moves is None else jnp.where(moves, judged, likeness)


def _views_of(chosen: np.ndarray, shared: tuple[str, ...]) -> tuple[Array | np.ndarray, Average]:
    """The frames that this device renders, and the mean over those of all devices.

    Where the devices do not divide the views, the last repeat one that does not count.
    """
    if not shared:
        return chosen, functools.partial(jnp.mean, axis=1)
    devices, index = jax.lax.axis_size(shared), jax.lax.axis_index(shared)
    each = -(-len(chosen) // devices)
    filled = jnp.asarray(np.pad(chosen, (0, devices * each - len(chosen)), mode="edge"))
    counts = index * each + jnp.arange(each) < len(chosen)

    def average(values: Float[Array, "B v"]) -> Float[Array, " B"]:
        total = jax.lax.psum(jnp.sum(jnp.where(counts, values, 0.0), axis=1), shared)
        return total / len(chosen)

    return jax.lax.dynamic_slice_in_dim(filled, index * each, each), average


def _likeness(
    image: Float[Array, "B V H W 3"],
    frames: Float[Array, "B V H W 3"],
    perceptual: Perceptual | None,
) -> Float[Array, "B V"]:
    """SSIM of each view, or 1 - a perceptual distance."""
    if perceptual is None:
        return ssim(image, frames)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (image, frames))
    return 1.0 - perceptual(*flat).reshape(image.shape[:2])


@dataclasses.dataclass(frozen=True)
class Recon(Reward):
    """S_recon as a reward; PSNR, SSIM, coverage, texture and what else `s_recon` finds beside it.

    Attributes:
      likeness: "lpips" [World-R1], or "ssim", for nano's 64 pixels.
      lpips: folder of LPIPS (AlexNet v0.1), see models/lpips.py.
      views: frames that are rendered again, evenly spaced; 0: all that were reconstructed.
      change_floor, change_min, texture_min: what is asked of a video besides likeness (see
        `s_recon`); 0 nothing. Try change_floor 0.1, and change_min below what the base's videos
        have.
    """

    needs = GAUSSIANS

    likeness: str = "lpips"
    lpips: str = ""
    views: int = 0
    change_floor: float = 0.0
    change_min: float = 0.0
    texture_min: float = TEXTURE_MIN

    def __post_init__(self) -> None:
        one_of(self, likeness=("lpips", "ssim"))
        of_kind(self, str, "lpips")
        in_range(
            self, views=(0, 10**6), change_floor=(0, 1e3), change_min=(0, 1), texture_min=(0, 1)
        )

    def needed(self) -> tuple[Needed, ...]:
        if self.likeness == "ssim":
            return ()
        what = "LPIPS, which python -m worldr1_jax.models.lpips_files makes of AlexNet's trunk"
        return (Needed("rewards.recon.lpips", self.lpips, what, "0.24 GB", "BSD-3-Clause"),)

    def networks(self, mesh: jax.sharding.Mesh, dtype: Any) -> Networks:
        self.check()
        return {} if self.likeness == "ssim" else {"lpips": lpips.load(self.lpips, mesh=mesh)}

    def described(self, mesh: jax.sharding.Mesh, dtype: Any) -> Networks:
        if self.likeness == "ssim":
            return {}
        network = nnx.eval_shape(lambda: lpips.LPIPS(nnx.Rngs(0)))
        return {"lpips": placement.describe(network, lpips.PLACES, mesh)}

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        found = evidence.found()
        views = min(self.views, found.camtoworld.shape[1]) or None
        mesh = current()
        # Devices that hold the same videos take some views each.
        sizes = {} if mesh is None else mesh.shape
        shared = tuple(name for name in ("context", "tensor") if sizes.get(name, 1) > 1)
        graph, state = nnx.split(networks.get("lpips", nnx.Dict()))

        def own(state: Any, videos: Array, found: Reconstruction, moving: Array) -> Any:
            return s_recon(
                videos, found, views=views,
                perceptual=nnx.merge(graph, state) if "lpips" in networks else None,
                moves=moving, method=evidence.renderer, shared=shared,
                texture_min=self.texture_min, change_floor=self.change_floor,
                change_min=self.change_min,
            )  # fmt: skip

        score, beside = each_device(own, whole=1)(state, evidence.seen, found, moves(evidence.path))
        return {"recon": score, **beside}
