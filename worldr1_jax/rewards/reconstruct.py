"""Videos to 3D: resizes as Depth Anything 3 expects and returns its reconstruction."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.models.da3 import model as da3
from worldr1_jax.models.da3.backbone import bicubic_matrix
from worldr1_jax.models.da3.model import DA3
from worldr1_jax.types import Reconstruction


def processed_size(height: int, width: int, longest: int, patch: int) -> tuple[int, int]:
    """(H, W) that the network is given: longest side `longest`, then each side to the nearest
    multiple of `patch`.

    A tie goes up. 480x832 with 504 and 14 gives 294x504.
    """
    sides = _bounded(height, width, longest)
    rows, columns = (max(patch, (2 * side + patch) // (2 * patch) * patch) for side in sides)
    return rows, columns


def load(folder: str | Path, *, mesh: jax.sharding.Mesh, dtype: Any = "float32") -> DA3:
    """The network of a folder on a mesh, with the attention that fits device and length, to be
    called under `jax.set_mesh`. `dtype` is of the backbone's products, as in da3.DA3; the publisher
    runs it in half precision."""
    return da3.load(folder, dtype=jnp.dtype(dtype), mesh=mesh)


def reconstruct(
    network: DA3,
    video: Float[Array, "B F H W 3"],
    *,
    frame_stride: int = 1,
    process_size: tuple[int, int] | None = None,
) -> Reconstruction:
    """Depth, confidence, cameras and Gaussians of every `frame_stride`-th frame.

    Args:
      network: the network.
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
    patch = network.config.net.patch_size
    if process_size is None:
        process_size = processed_size(
            video.shape[2], video.shape[3], network.config.process_res, patch
        )
    if any(side < patch or side % patch for side in process_size):
        raise ValueError(
            f"process_size {process_size} has to be made of multiples of the patch size {patch}"
        )
    graphdef, state = nnx.split(network)
    return _reconstruct(graphdef, state, video[:, ::frame_stride], tuple(process_size))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _reconstruct(graphdef: Any, state: Any, video: Array, size: tuple[int, int]) -> Reconstruction:
    return nnx.merge(graphdef, state)(resize_frames(video, size))


def resize_frames(
    video: Float[Array, "B F H W 3"], size: tuple[int, int]
) -> Float[Array, "B F h w 3"]:
    """The published preprocessing: first the longest side to that of `size` with the sides' ratio
    kept, then to `size`; each time by area where no side grows, else cubic.

    A departure: the published code rounds to 8 bits after either step, which would end gradients.
    """
    video = video.astype(jnp.float32)
    between = _bounded(video.shape[2], video.shape[3], max(size))
    return _resample(_resample(video, between), size)


def _bounded(height: int, width: int, longest: int) -> tuple[int, int]:
    """(H, W) with the given longest side and the ratio kept, to whole pixels."""
    scale = longest / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resample(video: Float[Array, "B F H W 3"], size: tuple[int, int]) -> Array:
    source = video.shape[2:4]
    if source == tuple(size):
        return video
    grows = any(new > old for old, new in zip(source, size, strict=True))
    weights = functools.partial(bicubic_matrix, offset=0.0) if grows else area_matrix
    rows, columns = (weights(old, new) for old, new in zip(source, size, strict=True))
    video = jnp.einsum("yi,bfijc->bfyjc", rows, video, precision="highest")
    video = jnp.einsum("xj,bfyjc->bfyxc", columns, video, precision="highest")
    return jnp.clip(video, 0.0, 1.0)  # a cubic overshoots


def area_matrix(source: int, target: int) -> np.ndarray:
    """[target source] shares of the source pixels in each of fewer, larger pixels."""
    edges = np.arange(target + 1) * (source / target)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(source)
    overlap = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0.0, None)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


def frame_indices(frames: int, views: int | None) -> np.ndarray:
    """`views` frame numbers out of `frames`, evenly spaced, ends included; all when None."""
    if views is None:
        return np.arange(frames)
    if not 1 <= views <= frames:
        raise ValueError(f"views is {views}; a video of {frames} frames has 1 to {frames}")
    return np.round(np.linspace(0, frames - 1, views)).astype(int)
