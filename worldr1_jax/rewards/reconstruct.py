"""Videos to 3D: resizes as Depth Anything 3 expects and returns its reconstruction."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.fields import in_range, of_kind
from worldr1_jax.mesh import placement
from worldr1_jax.models.da3 import model as da3
from worldr1_jax.models.da3.backbone import bicubic_matrix
from worldr1_jax.models.da3.config import Config, flops
from worldr1_jax.nn.attention import for_mesh
from worldr1_jax.rewards.base import GAUSSIANS, Evidence, Networks
from worldr1_jax.rewards.likeness import texture
from worldr1_jax.types import Reconstruction
from worldr1_jax.weights.convert import read_config
from worldr1_jax.weights.needed import Needed
from worldr1_jax.weights.shipped import resolve


def processed_size(height: int, width: int, longest: int, patch: int) -> tuple[int, int]:
    """(H, W) that the network is given: longest side `longest`, then each side to the nearest
    multiple of `patch`.

    A tie goes up. 480x832 with 504 and 14 gives 294x504.
    """
    sides = _bounded(height, width, longest)
    rows, columns = (max(patch, (2 * side + patch) // (2 * patch) * patch) for side in sides)
    return rows, columns


@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """The 3D network that rewards look through; its fields are `rewards.reconstruct` of the config.

    Attributes:
      da3: folder of a Depth Anything 3, or "nano" for the one that ships with the package.
      frame_stride: the network sees every so many frames, the first always.
      gaussian_frames: render the Gaussians of at most so many frames (see `thinned`); 0 for all.
    """

    da3: str = ""
    frame_stride: int = 1
    gaussian_frames: int = 0

    def __post_init__(self) -> None:
        in_range(self, frame_stride=(1, 10**6), gaussian_frames=(0, 10**6))
        of_kind(self, str, "da3")

    def needed(self) -> tuple[Needed, ...]:
        """Files of weights that it reads."""
        what = "depth-anything/DA3-GIANT-1.1, the only size with Gaussians"
        licence = "CC BY-NC 4.0: not for commercial use"
        return (Needed("rewards.reconstruct.da3", self.da3, what, "5.4 GB", licence, ("da3",)),)

    def check(self, needs: str) -> None:
        """Raises ValueError where there is no such network, or none with what rewards need."""
        config = Config.from_dict(read_config(self._folder))
        if needs == GAUSSIANS and config.gs_head is None:
            raise ValueError(
                f"rewards.reconstruct.da3 is '{self.da3}', a {config.model_name} without Gaussian "
                "head: S_recon and S_meta need one, as da3-giant has"
            )

    def networks(self, mesh: jax.sharding.Mesh, dtype: Any) -> Networks:
        """The network on a mesh, with the attention that fits device and length. `dtype` is of the
        backbone's products; the publisher runs it in half precision."""
        return {"da3": da3.load(self._folder, dtype=jnp.dtype(dtype), mesh=mesh)}

    def described(
        self, mesh: jax.sharding.Mesh, dtype: Any, config: Config | None = None
    ) -> Networks:
        """The same as shapes that lie on the mesh; by default of the published giant, the only size
        with Gaussians."""
        config = config or Config.giant()
        kernel = for_mesh(mesh, config.net.num_heads, jnp.dtype(dtype))

        def make() -> da3.DA3:
            return da3.DA3(config, nnx.Rngs(0), dtype=jnp.dtype(dtype), attention=kernel)

        return {"da3": placement.describe(nnx.eval_shape(make), da3.PLACES, mesh)}

    def flops(self, videos: Any) -> float:
        """That the published giant needs for videos of this shape."""
        giant = Config.giant()
        count, frames, height, width = videos.shape[:4]
        size = processed_size(height, width, giant.process_res, giant.net.patch_size)
        return count * flops(giant, -(-frames // self.frame_stride), size)

    def evidence(
        self,
        networks: Any,
        videos: Float[Array, "B F H W 3"],
        asked: Float[Array, "B F 4 4"],
        *,
        needs: str,
        renderer: str,
    ) -> Evidence:
        """What rewards of these needs may look at; pure."""
        found, shown = None, None
        if needs:
            found = reconstruct(
                networks["da3"], videos, frame_stride=self.frame_stride,
                gaussians=needs == GAUSSIANS,
            )  # fmt: skip
            found = thinned(found, self.gaussian_frames or None)
            height, width = found.depth.shape[2:]
            shown = texture(resize_frames(videos[:, :: self.frame_stride], (height, width)))
        return Evidence(videos, asked, found, shown, self.frame_stride, renderer)

    @property
    def _folder(self) -> Path:
        return resolve(self.da3, "da3", field="rewards.reconstruct.da3")


def thinned(reconstruction: Reconstruction, keep: int | None) -> Reconstruction:
    """The reconstruction with the Gaussians of at most `keep` frames, evenly spaced, the first and
    the last among them; None keeps all.

    A network that predicts a Gaussian for each pixel of each frame covers a surface as often as
    frames see it: 81 frames of 294x504 are 12 million Gaussians, and every view sorts and projects
    them all. Depth, cameras and the frames that are compared stay those of all frames.

    It is not free, and it is not only a loss: a frame whose own Gaussians are gone is drawn from
    its neighbours', which is what consistency means, and the score is stricter for it. On 81 frames
    of a ray-cast scene at 48x80 with 1% of noise in depth, two views between the frames kept
    (`tests/measure/splat.py full --size 48 80`): the Gaussians of 21 frames draw within 35.0 and
    35.3 dB of what all 81 draw, those of 6 within 29.2 and 29.6; the PSNR to the frame itself
    rises, from 23.0 to 24.5 and 26.6 dB, for there is less noise to average.

    Gaussians have to come frame by frame, equally many a frame, as Depth Anything 3 gives them.

    Raises:
      ValueError: a `keep` below 1, or Gaussians that the frames do not divide.
    """
    gaussians = reconstruction.gaussians
    if keep is None or gaussians is None:
        return reconstruction
    frames, count = reconstruction.depth.shape[1], gaussians.means.shape[1]
    if keep < 1:
        raise ValueError(f"gaussian_frames is {keep}: it has to be 1 or more")
    if count % frames:
        raise ValueError(f"{count} Gaussians of {frames} frames: want equally many a frame")
    chosen = frame_indices(frames, min(keep, frames))

    def kept(leaf: Array) -> Array:
        framed = leaf.reshape(leaf.shape[0], frames, count // frames, *leaf.shape[2:])
        return framed[:, chosen].reshape(leaf.shape[0], -1, *leaf.shape[2:])

    return dataclasses.replace(
        reconstruction, gaussians=jax.tree.map(kept, gaussians), gaussian_frames=len(chosen)
    )


def reconstruct(
    network: da3.DA3,
    video: Float[Array, "*shape"],  # [B F H W 3]; what is not is refused in words
    *,
    frame_stride: int = 1,
    process_size: tuple[int, int] | None = None,
    gaussians: bool = True,
) -> Reconstruction:
    """Depth, confidence, cameras and Gaussians of every `frame_stride`-th frame.

    Args:
      network: the network.
      video: in [0, 1], any size.
      frame_stride: 1 uses all frames; the first one is always used.
      process_size: (H, W) given to the network, multiples of its patch size; None resizes the
        longest side to the network's `process_res`.
      gaussians: False leaves their head out, where cameras and depth are enough.

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
    return _reconstruct(graphdef, state, video[:, ::frame_stride], tuple(process_size), gaussians)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _reconstruct(
    graphdef: Any, state: Any, video: Array, size: tuple[int, int], gaussians: bool
) -> Reconstruction:
    return nnx.merge(graphdef, state)(resize_frames(video, size), gaussians=gaussians)


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
