"""Poses, rotations and harmonics: one convention for all.

Quaternions are wxyz everywhere; what a publisher's network gives as xyzw is turned where it leaves
the network (`models.da3.gaussians`). Axes and poses: `types`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

SH_C0 = 0.28209479177387814
SH_C1 = 0.4886025119029199
SH_C2 = (
    1.0925484305920792,
    -1.0925484305920792,
    0.31539156525252005,
    -1.0925484305920792,
    0.5462742152960396,
)


def root(values: Float[Array, "*b"], rounding: float = 0.0) -> Float[Array, "*b"]:
    """Square root of values >= 0, whose gradient is 0 at 0, and wherever a value is not above what
    `rounding` alone can make of 0.

    Where a length or a spread is measured, 0 is its minimum, so that 0 is a subgradient; the
    infinite one turns into NaN as soon as it is multiplied by the 0 behind it.
    """
    steep = values > rounding
    exact = lax.stop_gradient(jnp.sqrt(values))
    return jnp.where(steep, jnp.sqrt(jnp.where(steep, values, 1.0)), exact)


def length(vectors: Float[Array, "*b D"]) -> Float[Array, "*b"]:
    """Euclidean length; its gradient at the zero vector is 0."""
    return root(jnp.sum(vectors * vectors, axis=-1))


def quaternion_to_matrix(quaternion: Float[Array, "*b 4"]) -> Float[Array, "*b 3 3"]:
    """Rotation matrix of a quaternion wxyz of any length but 0."""
    w, x, y, z = jnp.moveaxis(quaternion, -1, 0)
    s = 2.0 / jnp.sum(quaternion * quaternion, axis=-1)
    rows = [
        [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
        [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
        [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_quaternion(matrix: Float[Array, "*b 3 3"]) -> Float[Array, "*b 4"]:
    """Unit quaternion wxyz with w >= 0 of a rotation matrix; stable for every angle."""
    m = [[matrix[..., i, j] for j in range(3)] for i in range(3)]
    trace = m[0][0] + m[1][1] + m[2][2]
    # Row c holds 4 q_c q: the row with the largest own component is far from zero and is divided by
    # its length.
    rows = [
        [1 + trace, m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]],
        [m[2][1] - m[1][2], 1 + 2 * m[0][0] - trace, m[1][0] + m[0][1], m[0][2] + m[2][0]],
        [m[0][2] - m[2][0], m[1][0] + m[0][1], 1 + 2 * m[1][1] - trace, m[2][1] + m[1][2]],
        [m[1][0] - m[0][1], m[0][2] + m[2][0], m[2][1] + m[1][2], 1 + 2 * m[2][2] - trace],
    ]
    table = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
    best = jnp.argmax(jnp.diagonal(table, axis1=-2, axis2=-1), axis=-1)
    quaternion = jnp.take_along_axis(table, best[..., None, None], axis=-2)[..., 0, :]
    quaternion = quaternion / jnp.linalg.norm(quaternion, axis=-1, keepdims=True)
    return jnp.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def multiply(a: Float[Array, "*b 4"], b: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """Hamilton product of quaternions wxyz: the rotation b, then a."""
    aw, ax, ay, az = jnp.moveaxis(a, -1, 0)
    bw, bx, by, bz = jnp.moveaxis(b, -1, 0)
    return jnp.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        axis=-1,
    )


def rigid(
    rotation: Float[Array, "*b 3 3"], position: Float[Array, "*b 3"]
) -> Float[Array, "*b 4 4"]:
    """The pose of a rotation and a position."""
    upper = jnp.concatenate([rotation, position[..., None]], axis=-1)
    last = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0], upper.dtype), (*upper.shape[:-2], 1, 4))
    return jnp.concatenate([upper, last], axis=-2)


def rigid_inverse(camtoworld: Float[Array, "*b 4 4"]) -> Float[Array, "*b 4 4"]:
    """Inverse of rotation and translation; worldtocam of camtoworld."""
    inverse = jnp.swapaxes(camtoworld[..., :3, :3], -1, -2)
    position = jnp.einsum("...ij,...j->...i", inverse, camtoworld[..., :3, 3], precision="highest")
    return rigid(inverse, -position)


def are_rigid(camtoworld: Float[np.ndarray, "*b 4 4"], slack: float = 0.02) -> bool:
    """Whether each matrix is a rotation, not a reflection, and a position, all of them finite, up
    to `slack`, which holds products of poses in bfloat16; on the host."""
    rotation = camtoworld[..., :3, :3]
    if not np.isfinite(camtoworld).all():
        return False
    identity = rotation @ np.swapaxes(rotation, -1, -2)
    return bool(
        (np.abs(identity - np.eye(3)) <= slack).all()
        and (np.linalg.det(rotation) > 0).all()
        and (np.abs(camtoworld[..., 3, :] - (0, 0, 0, 1)) <= slack).all()
    )


def relative_to_first(camtoworld: Float[Array, "*b F 4 4"]) -> Float[Array, "*b F 4 4"]:
    """The same path in the frame of its first camera.

    Positions are subtracted before they are turned, so that the first one is exactly 0, and a path
    far from the origin keeps its digits.
    """
    to_first = jnp.swapaxes(camtoworld[..., 0, :3, :3], -1, -2)
    rotations = jnp.einsum(
        "...ij,...fjk->...fik", to_first, camtoworld[..., :3, :3], precision="highest"
    )
    offsets = camtoworld[..., :3, 3] - camtoworld[..., :1, :3, 3]
    positions = jnp.einsum("...ij,...fj->...fi", to_first, offsets, precision="highest")
    return rigid(rotations, positions)


def sh_band(band: int, d: Float[Array, "*b 3"] | np.ndarray) -> Float[Array, "*b M"]:
    """Real spherical harmonics of one band (0, 1 or 2) along unit directions, M = 2 band + 1; signs
    as in 3D Gaussian splatting."""
    xp: Any = np if isinstance(d, np.ndarray) else jnp
    x, y, z = xp.moveaxis(d, -1, 0)
    if band == 0:
        return xp.full((*x.shape, 1), SH_C0, x.dtype)
    if band == 1:
        return SH_C1 * xp.stack([-y, z, -x], axis=-1)
    terms = [x * y, y * z, 2 * z * z - x * x - y * y, x * z, x * x - y * y]
    return xp.stack([c * t for c, t in zip(SH_C2, terms, strict=True)], axis=-1)


def harmonics(
    sh: Float[Array, "*batch K 3"], directions: Float[Array, "*batch 3"]
) -> Float[Array, "*batch 3"]:
    """The function with the coefficients `sh` of degree 0, 1 or 2 (K = 1, 4 or 9) along unit
    `directions`."""
    count = sh.shape[-2]
    if count not in (1, 4, 9):
        raise ValueError(f"sh has {count} coefficients, want 1, 4 or 9 (degree 0, 1 or 2)")
    bands = [sh_band(band, directions) for band in range(round(count**0.5))]
    basis = jnp.concatenate(bands, axis=-1)
    terms = [basis[..., k, None] * sh[..., k, :] for k in range(count)]
    return functools.reduce(jnp.add, terms)


def rotation_angle(matrix: Float[Array, "*batch 3 3"]) -> Float[Array, "*batch"]:
    """Angle of a rotation in [0, pi], radians.

    From sine and cosine together: arccos of the trace alone cannot tell angles below about 0.03
    degrees apart in float32, and is NaN when rounding takes the trace above 3. The gradient at the
    identity is 0.
    """
    skew = jnp.stack(
        [
            matrix[..., 2, 1] - matrix[..., 1, 2],
            matrix[..., 0, 2] - matrix[..., 2, 0],
            matrix[..., 1, 0] - matrix[..., 0, 1],
        ],
        axis=-1,
    )
    return jnp.arctan2(length(skew), jnp.trace(matrix, axis1=-2, axis2=-1) - 1.0)
