"""Depth Anything 3 geometry: pose encodings to cameras, raw channels to Gaussians in world axes.

Facts from ByteDance-Seed/Depth-Anything-3 (depth_anything_3 0.1.1). Cameras are OpenCV camtoworld;
pixel centres at +0.5.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from worldr1_jax.geometry import (
    matrix_to_quaternion,
    multiply,
    quaternion_to_matrix,
    rigid,
    sh_band,
)
from worldr1_jax.types import Gaussians

SCALE_MULTIPLIER = 0.1  # scales are fractions of a tenth of a pixel's footprint at that depth


@dataclasses.dataclass(frozen=True)
class GaussianConfig:
    """How raw channels become Gaussians."""

    sh_degree: int = 2
    pred_offset_depth: bool = True
    pred_offset_xy: bool = True
    gaussian_scale_min: float = 1e-5
    gaussian_scale_max: float = 30.0
    # Published: Gaussians lie at `depth` along UNIT rays although the depth head gives depth along
    # the optical axis; the depth offset has learnt the difference. False (ours, for networks
    # trained here) puts them at that depth exactly.
    unit_rays: bool = True
    # Published: a quaternion's parts are one place off while the camera's rotation is applied,
    # which is right for an unrotated camera only. The pretrained head has learnt with it. False
    # (ours) applies the rotation properly.
    slipped_quaternions: bool = True

    def __post_init__(self) -> None:
        if self.sh_degree not in (0, 1, 2):
            raise ValueError(f"sh_degree is {self.sh_degree}; it has to be 0, 1 or 2")

    @property
    def sh_count(self) -> int:
        """Spherical harmonics per colour channel."""
        return (self.sh_degree + 1) ** 2

    @property
    def raw_dim(self) -> int:
        """Raw channels, without the confidence."""
        return 2 * self.pred_offset_xy + 7 + 3 * self.sh_count + self.pred_offset_depth

    def initial_bias(self) -> tuple[float, ...]:
        """Bias of a fresh head: pixel-sized, unrotated, grey, opaque enough to be seen."""
        xy = (0.0,) * (2 * self.pred_offset_xy)
        offset = (0.0,) * int(self.pred_offset_depth)
        return (
            *xy,
            -3.0,
            -3.0,
            -3.0,
            0.0,
            0.0,
            0.0,
            1.0,
            *(0.0,) * (3 * self.sh_count),
            *offset,
            0.0,
        )


def decode_cameras(
    translation: Float[Array, "*b 3"],
    quaternion: Float[Array, "*b 4"],
    fov: Float[Array, "*b 2"],
    size: tuple[int, int],
) -> tuple[Float[Array, "*b 4 4"], Float[Array, "*b 3 3"]]:
    """Camera decoder's outputs to camtoworld and intrinsics.

    Args:
      translation: camera position in the network's own units, in the axes of its reference view.
      quaternion: xyzw, camera axes to world axes, any length.
      fov: (vertical, horizontal), radians.
      size: (H, W) of the image in pixels.
    """
    height, width = size
    rotation = quaternion_to_matrix(jnp.roll(quaternion, 1, axis=-1))
    focal = jnp.array([height / 2, width / 2]) / jnp.maximum(jnp.tan(fov / 2), 1e-6)
    zero, one = jnp.zeros_like(focal[..., 0]), jnp.ones_like(focal[..., 0])
    rows = [
        [focal[..., 1], zero, one * (width / 2)],
        [zero, focal[..., 0], one * (height / 2)],
        [zero, zero, one],
    ]
    intrinsics = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
    return rigid(rotation, translation), intrinsics


def resample_depth(
    depth: Float[Array, "B F H W"], size: tuple[int, int]
) -> Float[Array, "B F h w"]:
    """Depth at another size: the nearest surface of each cell going down, linear going up.

    The minimum keeps a cell that straddles an edge on a surface; a mean would float between the
    two.
    """
    batch, frames, height, width = depth.shape
    if (height, width) == tuple(size):
        return depth
    if height % size[0] == 0 and width % size[1] == 0:
        cells = depth.reshape(batch, frames, size[0], height // size[0], size[1], width // size[1])
        return cells.min(axis=(3, 5))
    return jax.image.resize(depth, (batch, frames, *size), "linear", antialias=False)


def gaussians_from(
    config: GaussianConfig,
    raw: Float[Array, "B F h w P"],
    opacity: Float[Array, "B F h w"],
    depth: Float[Array, "B F H W"],
    camtoworld: Float[Array, "B F 4 4"],
    intrinsics: Float[Array, "B F 3 3"],
    size: tuple[int, int],
) -> Gaussians:
    """Raw head channels to Gaussians, one per cell of the raw map.

    Args:
      raw: offsets in x, y (cells), scales 3, quaternion xyzw 4, spherical harmonics 3 x K, depth
        offset; all unbounded.
      opacity: in [0, 1].
      depth: along the optical axis; resampled to (h, w) when it differs.
      camtoworld, intrinsics: of the frames, intrinsics in pixels of an image of `size` (H, W).

    Returns:
      Gaussians in the world of `camtoworld`, N = F h w, in the units of depth and camera positions.
    """
    batch, frames, h, w, _ = raw.shape
    # As published, placing Gaussians does not train the focal length.
    intrinsics = jax.lax.stop_gradient(intrinsics)
    normalised = intrinsics[..., :2, :] / jnp.array([size[1], size[0]], jnp.float32)[:, None]
    focal, centre = normalised[..., [0, 1], [0, 1]], normalised[..., 2]
    depth = resample_depth(depth, (h, w))
    if config.pred_offset_depth:
        depth, raw = depth + raw[..., -1], raw[..., :-1]
    cell = np.array([1 / w, 1 / h], np.float32)
    xs, ys = (np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h
    xy = jnp.asarray(np.stack(np.meshgrid(xs, ys), axis=-1), jnp.float32)
    if config.pred_offset_xy:
        xy, raw = xy + raw[..., :2] * cell, raw[..., 2:]
    rays = (xy - centre[:, :, None, None]) / focal[:, :, None, None]
    rays = jnp.concatenate(
        [jnp.broadcast_to(rays, (batch, frames, h, w, 2)), jnp.ones((batch, frames, h, w, 1))], -1
    )
    if config.unit_rays:
        rays = rays / jnp.linalg.norm(rays, axis=-1, keepdims=True)
    rotation, position = camtoworld[..., :3, :3], camtoworld[..., :3, 3]
    means = jnp.einsum("bfij,bfyxj->bfyxi", rotation, rays * depth[..., None], precision="highest")
    means = means + position[:, :, None, None]

    low, high = config.gaussian_scale_min, config.gaussian_scale_max
    footprint = SCALE_MULTIPLIER * jnp.sum(cell / focal, axis=-1)[:, :, None, None] * depth
    scales = (low + (high - low) * jax.nn.sigmoid(raw[..., :3])) * footprint[..., None]
    quaternions = _world_quaternions(raw[..., 3:7], rotation, config.slipped_quaternions)
    sh = raw[..., 7:].reshape(batch, frames, h * w, 3, config.sh_count) * sh_mask(config.sh_degree)
    sh = rotate_sh(jnp.swapaxes(sh, -1, -2), rotation[:, :, None])
    return Gaussians(
        means=means.reshape(batch, -1, 3),
        quaternions=quaternions.reshape(batch, -1, 4),
        scales=scales.reshape(batch, -1, 3),
        opacities=opacity.reshape(batch, -1),
        sh=sh.reshape(batch, -1, config.sh_count, 3),
    )


def _world_quaternions(
    xyzw: Float[Array, "B F h w 4"], rotation: Float[Array, "B F 3 3"], slipped: bool
) -> Float[Array, "B F h w 4"]:
    """Unit quaternions wxyz, Gaussian axes to world axes; `slipped` as in GaussianConfig."""
    length = jnp.sqrt(
        jnp.sum(xyzw * xyzw, axis=-1, keepdims=True) + 1e-16
    )  # finite gradient at zero
    camera = matrix_to_quaternion(rotation)[:, :, None, None]
    local = jnp.roll(xyzw / length, 2 if slipped else 1, axis=-1)
    world = multiply(jnp.broadcast_to(camera, local.shape), local)
    world = jnp.where(world[..., :1] < 0, -world, world)
    return jnp.roll(world, -1, axis=-1) if slipped else world


def move(gaussians: Gaussians, rigid: Float[Array, "*b 4 4"]) -> Gaussians:
    """The same Gaussians in other axes: `rigid` maps old world coordinates to new ones."""
    rotation, position = rigid[..., None, :3, :3], rigid[..., None, :3, 3]
    turn = matrix_to_quaternion(rotation)
    means = jnp.einsum("...ij,...j->...i", rotation, gaussians.means, precision="highest")
    return gaussians.replace(  # type: ignore[attr-defined]
        means=means + position,
        quaternions=multiply(
            jnp.broadcast_to(turn, gaussians.quaternions.shape), gaussians.quaternions
        ),
        sh=rotate_sh(gaussians.sh, rotation),
    )


def sh_mask(degree: int) -> np.ndarray:
    """[K] published weights that keep a fresh network's colours nearly view-independent."""
    bands = np.concatenate([np.full(2 * band + 1, band) for band in range(degree + 1)])
    return np.where(bands == 0, 1.0, 0.1 * 0.25**bands).astype(np.float32)


def rotate_sh(
    sh: Float[Array, "*b K C"], rotation: Float[Array, "*b 3 3"]
) -> Float[Array, "*b K C"]:
    """Coefficients of the same colour function in axes turned by `rotation` (old to new)."""
    degree = round(sh.shape[-2] ** 0.5) - 1
    parts = [sh[..., :1, :]]
    for band in range(1, degree + 1):
        matrix = sh_rotation(band, rotation)
        part = sh[..., band**2 : (band + 1) ** 2, :]
        parts.append(jnp.einsum("...ij,...jc->...ic", matrix, part, precision="highest"))
    return jnp.concatenate(parts, axis=-2)


def sh_rotation(band: int, rotation: Float[Array, "*b 3 3"]) -> Float[Array, "*b M M"]:
    """The matrix D with Y(R d) = D Y(d) for one band, M = 2 band + 1, from fixed directions."""
    directions, inverse = _sh_directions(band)
    turned = jnp.einsum("...ij,nj->...ni", rotation, directions, precision="highest")
    return jnp.einsum("...nm,nk->...mk", sh_band(band, turned), inverse, precision="highest")


@functools.lru_cache(maxsize=4)
def _sh_directions(band: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions [n 3], and the pseudo-inverse of their harmonics transposed [n M]."""
    golden, n = np.pi * (3 - 5**0.5), 16
    z = 1 - 2 * (np.arange(n) + 0.5) / n
    angle, radius = golden * np.arange(n), np.sqrt(1 - z * z)
    directions = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=-1)
    values = sh_band(band, directions)
    return directions.astype(np.float32), np.linalg.pinv(values).T.astype(np.float32)
