"""Renders 3D Gaussians: projection, depth order, front-to-back compositing.

The semantics are those of gsplat 1.5.3 (pinhole, EWA): `EPS2D` is added to the projected
covariance, an alpha is at most `ALPHA_MAX` and is skipped below `ALPHA_MIN`, a pixel stops before
its transmittance would reach `TRANSMITTANCE_MIN`, the background is black, and a colour is
max(SH + 0.5, 0). A Gaussian's extent, min(3.33, sqrt(2 ln(255 opacity))) sigma, is the boundary of
alpha >= 1/255, so lists that are cut by it lose nothing.

    render(..., method="tiled")    lists of the tiles, in rounds (`tiles`); the default
    render(..., method="pallas")   the same, with a kernel for TPUs (`kernel`)
    render(..., method="exact")    the oracle: every Gaussian against every pixel (`exact`), slow

All are differentiable and share the projection. Depth is the expected depth,
sum(w z) / sum(w), and 0 where alpha is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from worldr1_jax.splat import exact, kernel, tiles
from worldr1_jax.splat import lists as tile_lists
from worldr1_jax.splat.projection import NEAR, Projected, project
from worldr1_jax.types import Gaussians


class Rendered(NamedTuple):
    """Images of V views."""

    rgb: Float[Array, "V H W 3"]  # >= 0, on black; not clipped at 1
    depth: Float[Array, "V H W"]  # expected, along the optical axis, world units; 0 if alpha is
    alpha: Float[Array, "V H W"]  # in [0, 1]
    overflow: Int[Array, " V"]  # what a bound on rounds left out of tiles not yet opaque


# ---- Images --------------------------------------------------------------------------------------


def _untiled(features: Float[Array, "L 5 P"], grid: tile_lists.Grid) -> Float[Array, "H W 5"]:
    """r, g, b, depth times alpha, and alpha, from tiles."""
    (down, across), tile, (height, width) = grid.shape, grid.tile, grid.size
    image = features[: grid.tiles].reshape(down, across, features.shape[1], tile, tile)
    image = image.transpose(0, 3, 1, 4, 2).reshape(down * tile, across * tile, -1)
    return image[:height, :width]


# ---- Renderers -----------------------------------------------------------------------------------


def _each_view(
    one_view: Callable[[Projected], tuple[Array, Array]],
    gaussians: Gaussians,
    camtoworld: Array,
    intrinsics: Array,
    size: tuple[int, int],
    near: float | Float[Array, "*batch"],
) -> Rendered:
    """Projects every view of every scene and renders them one after the other.

    One at a time: memory stays that of one view, each leaves its loop when it is opaque, and on a
    CPU a step is too small to be split over threads, whose meeting costs more than the step. Where
    the batch is sharded, call it inside `jax.shard_map`, or every device renders every scene.
    """
    leading, batch = camtoworld.shape[:-2], gaussians.means.shape[:-2]
    if camtoworld.shape[-2:] != (4, 4) or len(leading) != len(batch) + 1 or leading[:-1] != batch:
        raise ValueError(
            f"camtoworld has shape {camtoworld.shape}, want {(*batch, 'V', 4, 4)}: "
            f"the Gaussians have the leading axes {batch}"
        )
    if intrinsics.shape != (*leading, 3, 3):
        raise ValueError(f"intrinsics has shape {intrinsics.shape}, want {(*leading, 3, 3)}")
    scenes = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(batch) :]), gaussians)

    def one_scene(item: tuple[Gaussians, Array, Array, Array]) -> tuple[Array, Array]:
        scene, poses, matrices, near = item
        return lax.map(
            lambda view: one_view(project(scene, view[0], view[1], size, near)), (poses, matrices)
        )

    views = (camtoworld.reshape(-1, leading[-1], 4, 4), intrinsics.reshape(-1, leading[-1], 3, 3))
    nears = jnp.broadcast_to(jnp.asarray(near, jnp.float32), batch).reshape(-1)
    image, overflow = lax.map(one_scene, (scenes, *views, nears))
    image = image.reshape(*leading, *size, 5)
    depth, alpha = image[..., 3], image[..., 4]
    seen = alpha > 0
    depth = jnp.where(seen, depth / jnp.where(seen, alpha, 1.0), 0.0)
    return Rendered(image[..., :3], depth, alpha, overflow.reshape(leading))


METHODS = ("tiled", "pallas", "exact")


@partial(jax.jit, static_argnames=("size", "method", "tile", "pairs", "rounds", "interpret"))
def render(
    gaussians: Gaussians,
    camtoworld: Float[Array, "*batch V 4 4"],
    intrinsics: Float[Array, "*batch V 3 3"],
    size: tuple[int, int],
    *,
    method: str = "tiled",
    tile: int | None = None,
    pairs: int | None = None,
    rounds: int | None = None,
    interpret: bool = False,
    near: float | Float[Array, "*batch"] = NEAR,
) -> Rendered:
    """Images of every view of every scene; differentiable, whatever the method.

    Gradients reach means, scales, quaternions, opacities, sh, camtoworld and intrinsics. Which
    Gaussians a tile lists, the skip below 1/255 and the stop have none, as in gsplat.

    Args:
        gaussians: N Gaussians a scene, in world axes; any batch axes.
        camtoworld: OpenCV poses of V views a scene.
        intrinsics: px of the image rendered, pixel centres at +0.5. Skew moves the means only.
        size: height and width of the images, px.
        method: "tiled" on any device; "pallas", the same with a kernel for TPUs; "exact", every
            Gaussian against every pixel, the oracle: slow.
        tile: side of the square tiles, px; speed only. None: 8, and 16 with "pallas".
        pairs: room of a round, in Gaussians times the tiles that they touch; speed and memory only.
            None: `tile_lists.PAIRS_PER_TILE` a tile.
        rounds: at most so many rounds, for a bound on the time; what is then missing is counted in
            `overflow`. None: until nothing is left, and `overflow` is 0.
        interpret: run the TPU kernel without a TPU, slowly.
        near: what lies before it, along the optical axis, is not seen; world units, for all scenes
            or for each.

    Raises:
        ValueError: an unknown method, leading axes that disagree, spherical harmonics of degree
            above 2, or a room that is too small.
    """
    if method not in METHODS:
        raise ValueError(f"method is '{method}': it is {', '.join(METHODS)}")
    if method == "exact":
        one_view = partial(_exact_view, size=size)
    else:
        by = "xla" if method == "tiled" else "interpret" if interpret else "pallas"
        side = tile or (8 if method == "tiled" else 16)
        one_view = partial(_tiled_view, grid=tile_lists.make_grid(size, side, pairs, rounds, by))
    return _each_view(one_view, gaussians, camtoworld, intrinsics, size, near)


def _tiled_view(view: Projected, grid: tile_lists.Grid) -> tuple[Array, Array]:
    draw = tiles.composite if grid.kernel == "xla" else kernel.composite
    features, missed = tiles.blend(grid, draw, view)
    return _untiled(features, grid), missed


def _exact_view(view: Projected, size: tuple[int, int]) -> tuple[Array, Array]:
    return exact.draw(view, exact.pixel_centres(size)).reshape(*size, 5), jnp.int32(0)
