"""Videos to 3D: resizes as Depth Anything 3 expects and returns its reconstruction."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.models.da3 import DA3
from worldr1_jax.types import Reconstruction


def processed_size(height: int, width: int, longest: int, patch: int) -> tuple[int, int]:
    """(H, W) that the network is given: longest side `longest`, then each side to the nearest
    multiple of `patch`.

    A tie goes up. 480x832 with 504 and 14 gives 294x504.
    """
    scale = longest / max(height, width)
    sides = (max(1, round(side * scale)) for side in (height, width))
    rows, columns = (max(patch, (2 * side + patch) // (2 * patch) * patch) for side in sides)
    return rows, columns


def reconstruct(
    da3: DA3,
    video: Float[Array, "B F H W 3"],
    *,
    frame_stride: int = 1,
    process_size: tuple[int, int] | None = None,
) -> Reconstruction:
    """Depth, confidence, cameras and Gaussians of every `frame_stride`-th frame.

    Args:
      da3: the network.
      video: in [0, 1], any size.
      frame_stride: 1 uses all frames; the first one is always used.
      process_size: (H, W) given to the network, multiples of its patch size; None resizes the
        longest side to the network's `process_res`.

    Returns:
      The reconstruction. Its first camera is the identity; its lengths are in units of the
      network's own, one per video, so that only ratios of lengths within a video mean something.
      Intrinsics are in pixels of the resized frames. Differentiable with respect to `video`.

    Raises:
      ValueError: a video that is not [B F H W 3], a stride below 1, or a size that is no multiple
        of the patch size.
    """
    if video.ndim != 5 or video.shape[-1] != 3:
        raise ValueError(f"video has the shape {list(video.shape)}; it has to be [B F H W 3]")
    if frame_stride < 1:
        raise ValueError(f"frame_stride is {frame_stride}; it has to be 1 or more")
    patch = da3.config.net.patch_size
    if process_size is None:
        process_size = processed_size(video.shape[2], video.shape[3], da3.config.process_res, patch)
    if any(side < patch or side % patch for side in process_size):
        raise ValueError(
            f"process_size {process_size} has to be made of multiples of the patch size {patch}"
        )
    graphdef, state = nnx.split(da3)
    return _reconstruct(graphdef, state, video[:, ::frame_stride], tuple(process_size))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _reconstruct(graphdef: Any, state: Any, video: Array, size: tuple[int, int]) -> Reconstruction:
    return nnx.merge(graphdef, state)(resize_frames(video, size))


def resize_frames(
    video: Float[Array, "B F H W 3"], size: tuple[int, int]
) -> Float[Array, "B F h w 3"]:
    """Antialiased going down, cubic going up.

    A departure: the published code resizes 8-bit images twice with OpenCV (to the longest side,
    then to multiples of the patch), by area or cubic. One float resize keeps gradients and runs on
    the accelerator; frames differ by less than the 8-bit rounding of a smooth image, more at sharp
    edges.
    """
    video = video.astype(jnp.float32)
    if video.shape[2:4] == size:
        return video
    method = "cubic" if size[0] > video.shape[2] or size[1] > video.shape[3] else "linear"
    out = jax.image.resize(video, (*video.shape[:2], *size, 3), method, antialias=True)
    return jnp.clip(out, 0.0, 1.0)
