"""Projects 3D Gaussians to the screen of a pinhole camera (EWA splatting, as gsplat 1.5.3)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from worldr1_jax.geometry import harmonics, quaternion_to_matrix
from worldr1_jax.types import Gaussians

EPS2D = 0.3  # px^2, added to the projected covariance: a low-pass of about half a pixel
NEAR = 0.01  # world units
ALPHA_MIN, ALPHA_MAX = 1.0 / 255.0, 0.999  # below, a Gaussian is skipped; above, it is cut off
TRANSMITTANCE_MIN = 1e-4  # a pixel stops before its transmittance would reach this
EXTENT_MAX = 3.33  # standard deviations
LARGEST = 1e15  # numbers of a Gaussian from here on, or not finite: it is not drawn
WIDEST = 1e9  # px; the same for its standard deviation on the screen, whose fourth power is taken
# Columns of a projected row.
MEAN_X, MEAN_Y, CONIC_XX, CONIC_XY, CONIC_YY, OPACITY, FEATURES = 0, 1, 2, 3, 4, 5, 6
NUM_FEATURES = 4  # red, green, blue, depth


class Projected(NamedTuple):
    """Gaussians as one view sees them."""

    rows: Float[Array, "N 10"]  # mean x y (px), conic xx xy yy (1/px^2), opacity, r g b, depth
    radii: Float[Array, "N 2"]  # half size of the box around all alpha >= 1/255; px
    visible: Bool[Array, " N"]  # in front of the near plane, in the image, and not transparent


def covariance(
    quaternions: Float[Array, "*batch 4"], scales: Float[Array, "*batch 3"]
) -> Float[Array, "*batch 3 3"]:
    """World covariance R diag(scales^2) R^T of each Gaussian; world units squared."""
    half = quaternion_to_matrix(quaternions) * scales[..., None, :]
    return jnp.sum(half[..., :, None, :] * half[..., None, :, :], axis=-1)


def extent(
    opacities: Float[Array, "*batch"], variances: Float[Array, "*batch 2"]
) -> Float[Array, "*batch 2"]:
    """Half sides of the box around all of a Gaussian that is drawn, px; 0 for a transparent one.

    min(3.33, sqrt(2 ln(255 opacity))) standard deviations along x and y, `variances` in px^2.
    gsplat's CUDA rounds it up to whole pixels, and its torch version takes 3.33 whatever the
    opacity: both draw the same Gaussians into more tiles.
    """
    opaque = opacities >= ALPHA_MIN
    sigmas = jnp.sqrt(2.0 * jnp.log(jnp.where(opaque, opacities / ALPHA_MIN, 1.0)))
    return jnp.minimum(EXTENT_MAX, sigmas)[..., None] * jnp.sqrt(variances)


def _unit(vectors: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """Unit vectors; a zero vector stays zero, with a zero gradient instead of NaN."""
    squared = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    positive = squared > 0
    return jnp.where(positive, vectors / jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def without_degenerate(gaussians: Gaussians) -> Gaussians:
    """The Gaussians, transparent and plain where a number of them is NaN, infinite or beyond
    LARGEST, or the quaternion is zero.

    Such a Gaussian is not drawn either way; left in, its own NaN would become that of every
    gradient that shares a sum with it.
    """
    turn = gaussians.quaternions
    # False for NaN too.
    fields = jax.tree.map(lambda leaf: jnp.abs(leaf) < LARGEST, gaussians)
    sound = fields.opacities & (jnp.sum(turn * turn, axis=-1) > 1.0 / LARGEST**2)
    for field in (fields.means, fields.quaternions, fields.scales):
        sound &= jnp.all(field, axis=-1)
    sound &= jnp.all(fields.sh, axis=(-2, -1))

    def kept(leaf: Array, plain: Array | float) -> Array:
        shape = sound.shape + (1,) * (leaf.ndim - sound.ndim)
        return jnp.where(sound.reshape(shape), leaf, plain)

    unturned = jnp.array([1.0, 0.0, 0.0, 0.0], turn.dtype)
    return jax.tree.map(lambda leaf: kept(leaf, 0.0), gaussians).replace(
        quaternions=kept(turn, unturned)
    )


def project(
    gaussians: Gaussians,
    camtoworld: Float[Array, "4 4"],
    intrinsics: Float[Array, "3 3"],
    size: tuple[int, int],
    near: float | Float[Array, ""] = NEAR,
) -> Projected:
    """One view's screen-space Gaussians (EWA splatting: the projection is linearised at each mean).

    What lies before `near`, in world units along the optical axis, is not seen.

    The point of linearisation is clamped to 15% beyond the image on each side, as gsplat does,
    because the linear model diverges far from the axis; the mean itself is not moved.
    """
    height, width = size
    gaussians = without_degenerate(gaussians)
    position, to_camera = camtoworld[:3, 3], camtoworld[:3, :3].T
    relative = gaussians.means - position
    x, y, depth = jnp.matmul(to_camera, relative.T, precision=lax.Precision.HIGHEST)
    in_front = depth > near
    z = jnp.where(in_front, depth, 1.0)  # or a culled Gaussian would have a gradient of NaN
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    slope_x = jnp.clip(x / z, -(cx + 0.15 * width) / fx, (1.15 * width - cx) / fx)
    slope_y = jnp.clip(y / z, -(cy + 0.15 * height) / fy, (1.15 * height - cy) / fy)

    # A with A A^T = covariance in the camera, then its image under the projection's Jacobian.
    wide = jnp.maximum(fx, fy) / z * jnp.max(jnp.abs(gaussians.scales), axis=-1)
    in_front = in_front & (wide < WIDEST)
    scales = jnp.where(in_front[:, None], gaussians.scales, 0.0)
    half = quaternion_to_matrix(gaussians.quaternions) * scales[:, None, :]
    half = jnp.einsum("ij,njk->ikn", to_camera, half, precision=lax.Precision.HIGHEST)
    half_x = fx / z * (half[0] - slope_x * half[2])
    half_y = fy / z * (half[1] - slope_y * half[2])
    xx = jnp.sum(half_x * half_x, axis=0) + EPS2D
    yy = jnp.sum(half_y * half_y, axis=0) + EPS2D
    xy = jnp.sum(half_x * half_y, axis=0)
    determinant = xx * yy - xy * xy
    sound = in_front & (determinant > 0)
    determinant = jnp.where(sound, determinant, 1.0)

    mean_x = (intrinsics[0, 0] * x + intrinsics[0, 1] * y) / z + cx
    mean_y = fy * y / z + cy
    conic = yy / determinant, -xy / determinant, xx / determinant
    colour = jnp.maximum(harmonics(gaussians.sh, _unit(relative)) + 0.5, 0.0)
    rows = jnp.stack(
        [mean_x, mean_y, *conic, gaussians.opacities, *colour.T, z],
        axis=-1,
    )
    opaque = gaussians.opacities >= ALPHA_MIN
    radii = lax.stop_gradient(extent(gaussians.opacities, jnp.stack([xx, yy], -1)))
    low, high = rows[:, :2] - radii, rows[:, :2] + radii
    inside = jnp.all((high > 0) & (low < jnp.array([width, height])), axis=-1)
    return Projected(rows, radii, sound & opaque & inside)
