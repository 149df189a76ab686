"""Pixel motion between two cameras that look at a scene of constant depth."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# On an accelerator the default precision of a product rounds to bfloat16: four pixels at x = 1000.
_EXACT = jax.lax.Precision.HIGHEST
# Points behind the next camera are held this far in front of it, in units of the scene depth.
_NEAREST = 1e-5


def pinhole(size: tuple[int, int], focal: float | Float[Array, ""] = 1.2) -> Float[Array, "3 3"]:
    """Intrinsics in pixels of a centred pinhole.

    Args:
      size: (H, W) of the image in pixels.
      focal: focal length in image widths (1.2 published).
    """
    height, width = size
    length = focal * width
    return jnp.array([[length, 0.0, width / 2], [0.0, length, height / 2], [0.0, 0.0, 1.0]])


def relative(
    camtoworld: Float[Array, "... 4 4"], next_camtoworld: Float[Array, "... 4 4"]
) -> Float[Array, "... 4 4"]:
    """Rigid transform of points from the first camera's frame to the next one's."""
    rotation = jnp.swapaxes(next_camtoworld[..., :3, :3], -1, -2)
    offset = camtoworld[..., :3, 3] - next_camtoworld[..., :3, 3]
    turn = jnp.matmul(rotation, camtoworld[..., :3, :3], precision=_EXACT)
    shift = jnp.matmul(rotation, offset[..., None], precision=_EXACT)
    top = jnp.concatenate([turn, shift], -1)
    return jnp.concatenate(
        [top, jnp.broadcast_to(camtoworld[..., 3:, :], top[..., :1, :].shape)], -2
    )


def pixel_flow(
    transform: Float[Array, "4 4"],
    intrinsics: Float[Array, "3 3"],
    size: tuple[int, int],
    *,
    depth: float | Float[Array, ""],
    limit: float = 0.25,
) -> Float[Array, "H W 2"]:
    """Where each pixel moves from one frame to the next, if every point is `depth` away.

    Args:
      transform: points of the first camera to the next camera's frame (`relative`).
      intrinsics: of both cameras, in pixels of this image; pixel centres lie at +0.5.
      size: (H, W) in pixels.
      depth: z of every point in the first camera's frame, in the transform's length unit.
      limit: the field is scaled down as a whole when its longest vector is longer than this
        fraction of the larger side, as published.

    Returns:
      (x, y) displacement in pixels: the content of pixel p is at p + flow[p] in the next frame.
    """
    height, width = size
    focal = jnp.array([intrinsics[0, 0], intrinsics[1, 1]])
    centre = intrinsics[:2, 2]
    grid = jnp.stack(jnp.meshgrid(jnp.arange(width), jnp.arange(height)), -1) + 0.5
    rays = jnp.concatenate([(grid - centre) / focal, jnp.ones((height, width, 1))], -1)
    # In units of the depth, so that the result depends on translation / depth alone.
    points = jnp.matmul(rays, transform[:3, :3].T, precision=_EXACT) + transform[:3, 3] / depth
    flow = points[..., :2] / jnp.maximum(points[..., 2:], _NEAREST) * focal + centre - grid
    longest = jnp.sqrt(jnp.max(jnp.sum(flow**2, -1)))
    allowed = limit * max(height, width)
    return flow * jnp.minimum(1.0, allowed / jnp.maximum(longest, allowed))
