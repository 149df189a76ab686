"""Renders 3D Gaussians: projection, per-tile lists in depth order, front-to-back compositing.

The semantics are those of gsplat 1.5.3 (pinhole, EWA): `EPS2D` is added to the projected covariance, an alpha is at most
`ALPHA_MAX` and is skipped below `ALPHA_MIN`, a pixel stops before its transmittance would reach `TRANSMITTANCE_MIN`, the
background is black, and a colour is max(SH + 0.5, 0). A Gaussian's extent, min(3.33, sqrt(2 ln(255 opacity))) sigma, is the
exact boundary of alpha >= 1/255, so lists that are cut by it lose nothing.

    render        exact: per-tile lists in rounds, until every tile is exhausted or opaque. Not reverse-differentiable.
    render_tiled  one list of static capacity per tile, differentiable; what did not fit is counted in `overflow`.
    render_exact  the oracle: every Gaussian against every pixel, in chunks, differentiable, any size, slow.

All three share the projection and one compositing step, and return the expected depth, sum(w z) / sum(w), 0 where alpha is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from worldr1_jax.types import Gaussians

EPS2D = 0.3  # px^2, added to both axes of the projected covariance: a low-pass of about half a pixel
NEAR = 0.01  # world units
ALPHA_MAX = 0.999
ALPHA_MIN = 1.0 / 255.0
TRANSMITTANCE_MIN = 1e-4
EXTENT_MAX = 3.33  # standard deviations
STEPS_PER_CHECK = 32  # compositing steps between two looks at whether every pixel is finished
# Columns of a projected row.
MEAN_X, MEAN_Y, CONIC_XX, CONIC_XY, CONIC_YY, OPACITY, FEATURES = 0, 1, 2, 3, 4, 5, 6
NUM_FEATURES = 4  # red, green, blue, depth


class Projected(NamedTuple):
    """Gaussians as one view sees them."""

    rows: Float[Array, "N 10"]  # mean x y (px), conic xx xy yy (1/px^2), opacity, r, g, b, depth (world units)
    radii: Float[Array, "N 2"]  # half size of the box that holds every pixel with alpha >= 1/255; px
    visible: Bool[Array, " N"]  # in front of the near plane, in the image, and not transparent


class Rendered(NamedTuple):
    """Images of V views."""

    rgb: Float[Array, "V H W 3"]  # >= 0, on black; not clipped at 1
    depth: Float[Array, "V H W"]  # expected depth along the optical axis, world units; 0 where alpha is 0
    alpha: Float[Array, "V H W"]  # in [0, 1]
    overflow: Int[Array, " V"]  # list entries that did not fit, in tiles that were not yet opaque; 0 = exact


class _Canvas(NamedTuple):
    """What compositing carries for each pixel of L tiles."""

    transmittance: Float[Array, "L P"]
    features: Float[Array, "4 L P"]  # sum of weight times r, g, b, depth
    stop: Int[Array, "L P"]  # list position at which the pixel stopped; `_RUNNING` while it has not


_RUNNING = jnp.iinfo(jnp.int32).max


# ---- Projection --------------------------------------------------------------------------------------------------------


def rotation_matrix(quaternions: Float[Array, "*batch 4"]) -> Float[Array, "*batch 3 3"]:
    """Rotation matrices of quaternions wxyz, which are normalised first."""
    w, x, y, z = jnp.moveaxis(quaternions / jnp.linalg.norm(quaternions, axis=-1, keepdims=True), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def covariance(
    quaternions: Float[Array, "*batch 4"], scales: Float[Array, "*batch 3"]
) -> Float[Array, "*batch 3 3"]:
    """World covariance R diag(scales^2) R^T of each Gaussian; world units squared."""
    half = rotation_matrix(quaternions) * scales[..., None, :]
    return jnp.sum(half[..., :, None, :] * half[..., None, :, :], axis=-1)


def harmonics(
    sh: Float[Array, "*batch K 3"], directions: Float[Array, "*batch 3"]
) -> Float[Array, "*batch 3"]:
    """Real spherical harmonics of degree 0, 1 or 2 (K = 1, 4 or 9), evaluated along unit `directions`."""
    x, y, z = jnp.moveaxis(directions, -1, 0)
    basis = [
        jnp.full_like(x, 0.28209479177387814),
        -0.4886025119029199 * y,
        0.4886025119029199 * z,
        -0.4886025119029199 * x,
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.9461746957575601 * z * z - 0.3153915652525201,
        -1.0925484305920792 * x * z,
        0.5462742152960396 * (x * x - y * y),
    ]
    count = sh.shape[-2]
    if count not in (1, 4, 9):
        raise ValueError(f"sh has {count} coefficients, want 1, 4 or 9 (degree 0, 1 or 2)")
    return sum(basis[k][..., None] * sh[..., k, :] for k in range(count))


def _unit(vectors: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """Unit vectors; a zero vector stays zero, with a zero gradient instead of NaN."""
    squared = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    positive = squared > 0
    return jnp.where(positive, vectors / jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def project(
    gaussians: Gaussians,
    camtoworld: Float[Array, "4 4"],
    intrinsics: Float[Array, "3 3"],
    size: tuple[int, int],
) -> Projected:
    """One view's screen-space Gaussians (EWA splatting: the projection is linearised at each mean).

    The point of linearisation is clamped to 15% beyond the image on each side, as gsplat does, because the linear
    model diverges far from the axis; the mean itself is not moved.
    """
    height, width = size
    position, to_camera = camtoworld[:3, 3], camtoworld[:3, :3].T
    relative = gaussians.means - position
    x, y, depth = (to_camera @ relative.T)
    in_front = depth > NEAR
    z = jnp.where(in_front, depth, 1.0)  # a culled Gaussian must not divide by zero: its gradient would be NaN
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    slope_x = jnp.clip(x / z, -(cx + 0.15 * width) / fx, (1.15 * width - cx) / fx)
    slope_y = jnp.clip(y / z, -(cy + 0.15 * height) / fy, (1.15 * height - cy) / fy)

    # Half covariance A with A A^T = covariance in the camera, then its image under the projection's Jacobian.
    half = rotation_matrix(gaussians.quaternions) * gaussians.scales[:, None, :]
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
    colour = jnp.maximum(harmonics(gaussians.sh, _unit(relative)) + 0.5, 0.0)
    rows = jnp.stack(
        [mean_x, mean_y, yy / determinant, -xy / determinant, xx / determinant, gaussians.opacities, *colour.T, z],
        axis=-1,
    )
    opaque = gaussians.opacities >= ALPHA_MIN
    sigmas = jnp.sqrt(2.0 * jnp.log(jnp.where(opaque, gaussians.opacities / ALPHA_MIN, 1.0)))
    radii = lax.stop_gradient(jnp.minimum(EXTENT_MAX, sigmas)[:, None] * jnp.sqrt(jnp.stack([xx, yy], -1)))
    low, high = rows[:, :2] - radii, rows[:, :2] + radii
    inside = jnp.all((high > 0) & (low < jnp.array([width, height])), axis=-1)
    return Projected(rows, radii, sound & opaque & inside)


# ---- Compositing -------------------------------------------------------------------------------------------------------


def _alpha(row: Float[Array, "L 10"], pixels: Float[Array, "P 2"]) -> Float[Array, "L P"]:
    """Opacity of one Gaussian per tile at each of its pixels, 0 where it is skipped."""
    dx = pixels[:, 0] - row[:, MEAN_X, None]
    dy = pixels[:, 1] - row[:, MEAN_Y, None]
    exponent = 0.5 * (row[:, CONIC_XX, None] * dx * dx + row[:, CONIC_YY, None] * dy * dy)
    exponent = exponent + row[:, CONIC_XY, None] * dx * dy
    alpha = jnp.minimum(ALPHA_MAX, row[:, OPACITY, None] * jnp.exp(-exponent))
    return jnp.where((exponent >= 0) & (alpha >= ALPHA_MIN), alpha, 0.0)


def _blank(tiles: int, pixels: int) -> _Canvas:
    return _Canvas(
        jnp.ones((tiles, pixels)),
        jnp.zeros((NUM_FEATURES, tiles, pixels)),
        jnp.full((tiles, pixels), _RUNNING, jnp.int32),
    )


def _step(
    canvas: _Canvas, row: Float[Array, "L 10"], position: Int[Array, ""], pixels: Float[Array, "P 2"]
) -> _Canvas:
    """Composites the Gaussian at `position` of every tile's list behind what is already there."""
    alpha = _alpha(row, pixels)
    behind = canvas.transmittance * (1.0 - alpha)
    running = canvas.stop == _RUNNING
    drawn = running & (behind > TRANSMITTANCE_MIN)
    weight = jnp.where(drawn, alpha * canvas.transmittance, 0.0)
    features = canvas.features + weight * row.T[FEATURES:, :, None]
    return _Canvas(
        jnp.where(drawn, behind, canvas.transmittance),
        features,
        jnp.where(running & ~drawn, position, canvas.stop),
    )


def _composite(
    rows: Float[Array, "S L 10"],
    length: Int[Array, ""],
    pixels: Float[Array, "P 2"],
    canvas: _Canvas,
) -> _Canvas:
    """Front-to-back over list positions 0..length-1 (S is a multiple of STEPS_PER_CHECK); leaves early when all is opaque."""

    def block(state: tuple[Int[Array, ""], _Canvas]) -> tuple[Int[Array, ""], _Canvas]:
        start, canvas = state
        part = lax.dynamic_slice_in_dim(rows, start, STEPS_PER_CHECK)

        def body(canvas: _Canvas, item: tuple[Array, Array]) -> tuple[_Canvas, None]:
            return _step(canvas, item[0], item[1], pixels), None

        positions = start + jnp.arange(STEPS_PER_CHECK, dtype=jnp.int32)
        return start + STEPS_PER_CHECK, lax.scan(body, canvas, (part, positions), unroll=4)[0]

    def unfinished(state: tuple[Int[Array, ""], _Canvas]) -> Bool[Array, ""]:
        return (state[0] < length) & jnp.any(state[1].stop == _RUNNING)

    return lax.while_loop(unfinished, block, (jnp.int32(0), canvas))[1]


@jax.custom_vjp
def _blend(
    rows: Float[Array, "S L 10"], length: Int[Array, ""], pixels: Float[Array, "P 2"]
) -> tuple[Float[Array, "4 L P"], Float[Array, "L P"], Int[Array, "L P"]]:
    """Features, final transmittance and stopping position of L tiles from their lists.

    Reverse mode walks the lists back to front and recovers each transmittance by division, so it stores the rows and
    three numbers a pixel instead of every step (the sequential scan differentiated by JAX keeps about 10 floats a step).
    """
    canvas = _composite(rows, length, pixels, _blank(rows.shape[1], pixels.shape[0]))
    return canvas.features, canvas.transmittance, canvas.stop


def _blend_forward(rows: Array, length: Array, pixels: Array):
    canvas = _composite(rows, length, pixels, _blank(rows.shape[1], pixels.shape[0]))
    outputs = (canvas.features, canvas.transmittance, canvas.stop)
    return outputs, (rows, length, pixels, canvas.transmittance, canvas.stop)


def _blend_backward(residuals, cotangents):
    rows, length, pixels, transmittance, stop = residuals
    d_features, d_transmittance, _ = cotangents

    def body(state, item):
        # transmittance: behind this Gaussian. later: what the loss gains from all that lies behind it, in total.
        transmittance, later = state
        row, position = item
        alpha, pull = jax.vjp(lambda row: _alpha(row, pixels), row)
        drawn = position < stop
        alpha = jnp.where(drawn, alpha, 0.0)
        before = transmittance / (1.0 - alpha)
        weight = alpha * before
        value = jnp.sum(d_features * row.T[FEATURES:, :, None], axis=0)
        d_alpha = jnp.where(drawn, before * value - later / (1.0 - alpha), 0.0)
        d_row = pull(d_alpha)[0]
        d_row = d_row.at[:, FEATURES:].add(jnp.sum(weight * d_features, axis=-1).T)
        return (before, later + weight * value), d_row

    def block(state):
        start, carry, d_rows = state
        part = lax.dynamic_slice_in_dim(rows, start, STEPS_PER_CHECK)
        positions = start + jnp.arange(STEPS_PER_CHECK, dtype=jnp.int32)
        carry, d_part = lax.scan(body, carry, (part, positions), reverse=True, unroll=2)
        return start - STEPS_PER_CHECK, carry, lax.dynamic_update_slice_in_dim(d_rows, d_part, start, 0)

    # Positions at or after every pixel's stop have no gradient: begin at the last block that drew anything.
    last = jnp.minimum(length, jnp.max(stop))
    start = jnp.maximum(last - 1, 0) // STEPS_PER_CHECK * STEPS_PER_CHECK
    carry = (transmittance, d_transmittance * transmittance)
    state = (start.astype(jnp.int32), carry, jnp.zeros_like(rows))
    return lax.while_loop(lambda state: state[0] >= 0, block, state)[2], None, None


_blend.defvjp(_blend_forward, _blend_backward)


# ---- Lists -------------------------------------------------------------------------------------------------------------


def _tile_origins(size: tuple[int, int], tile: int) -> Float[Array, "L 2"]:
    height, width = size
    y, x = jnp.meshgrid(jnp.arange(0, height, tile), jnp.arange(0, width, tile), indexing="ij")
    return jnp.stack([x.ravel(), y.ravel()], axis=-1).astype(jnp.float32)


def _tile_pixels(tile: int) -> Float[Array, "P 2"]:
    """Pixel centres of a tile relative to its origin, row by row."""
    return _tile_origins((tile, tile), 1) + 0.5


class _List(NamedTuple):
    """The next Gaussians of every tile, in depth order; S slots, G = batch x views, L tiles a view."""

    index: Int[Array, "G L S"]  # into N
    used: Bool[Array, "G L S"]  # a prefix of the slots
    candidates: Int[Array, "G L"]  # how many there were to choose from
    last: tuple[Float[Array, "G L"], Int[Array, "G L"]]  # depth and index of the last one taken


def _lists(
    views: Projected,
    size: tuple[int, int],
    tile: int,
    capacity: int,
    after: tuple[Float[Array, "G L"], Int[Array, "G L"]] | None = None,
) -> _List:
    """The `capacity` nearest Gaussians of each tile, of those behind `after` where it is given.

    A Gaussian is in a tile's list when its box holds one of the tile's pixel centres (a thousandth of a pixel of slack
    for rounding). Equal depths are taken in the order of their indices. One view at a time: memory is [L N].
    """
    origins = _tile_origins(size, tile)
    first, last = origins[:, None] + 0.5, origins[:, None] + tile - 0.5

    def one_view(item):
        (rows, radii, visible), after = item
        mean, reach, depth = rows[:, :2], radii + 1e-3, rows[:, -1]
        box = (mean + reach >= first) & (mean - reach <= last)
        candidates = box[..., 0] & box[..., 1] & visible
        if after is not None:
            depth_taken, index_taken = after[0][:, None], after[1][:, None]
            beyond = (depth == depth_taken) & (jnp.arange(depth.shape[0]) > index_taken)
            candidates = candidates & ((depth > depth_taken) | beyond)
        key, index = lax.top_k(jnp.where(candidates, -depth, -jnp.inf), capacity)
        used = key > -jnp.inf
        return _List(index, used, jnp.sum(candidates, axis=-1), (-key[:, -1], index[:, -1]))

    return lax.map(one_view, (jax.tree.map(lax.stop_gradient, views), after))


def _gather(views: Projected, lists: _List, size: tuple[int, int], tile: int) -> Float[Array, "S GL 10"]:
    """Rows of the lists, slot by slot: means relative to the tile's origin, unused slots transparent."""
    origins = _tile_origins(size, tile)
    rows = jax.vmap(lambda rows, index: rows[index])(views.rows, lists.index.transpose(0, 2, 1))
    rows = rows - jnp.pad(origins, ((0, 0), (0, rows.shape[-1] - 2)))
    rows = rows.at[..., OPACITY].multiply(lists.used.transpose(0, 2, 1))
    groups, slots, tiles, columns = rows.shape
    rows = rows.transpose(1, 0, 2, 3).reshape(slots, groups * tiles, columns)
    return jnp.pad(rows, ((0, -slots % STEPS_PER_CHECK), (0, 0), (0, 0)))


def _assemble(
    features: Float[Array, "4 GL P"],
    transmittance: Float[Array, "GL P"],
    leading: tuple[int, ...],
    size: tuple[int, int],
    tile: int,
) -> tuple[Float[Array, "*batch V H W 3"], Float[Array, "*batch V H W"], Float[Array, "*batch V H W"]]:
    """Images from tiles, and the expected depth."""
    height, width = size
    across, down = -(-width // tile), -(-height // tile)
    image = jnp.concatenate([features, 1.0 - transmittance[None]])
    image = image.reshape(5, -1, down, across, tile, tile).swapaxes(3, 4)
    return _finish(image.reshape(5, *leading, down * tile, across * tile)[..., :height, :width])


def _finish(image: Float[Array, "5 *batch H W"]) -> tuple[Array, Array, Array]:
    """rgb, expected depth and alpha from composited r, g, b, depth and alpha."""
    red, green, blue, depth, alpha = image
    seen = alpha > 0
    depth = jnp.where(seen, depth / jnp.where(seen, alpha, 1.0), 0.0)
    return jnp.stack([red, green, blue], axis=-1), depth, alpha


# ---- Renderers ---------------------------------------------------------------------------------------------------------


def _views(
    gaussians: Gaussians, camtoworld: Array, intrinsics: Array, size: tuple[int, int]
) -> tuple[Projected, tuple[int, ...]]:
    """Every view of every scene, projected, on one axis G; and the leading axes (*batch, V) that G stands for."""
    leading, batch = camtoworld.shape[:-2], gaussians.means.shape[:-2]
    if camtoworld.shape[-2:] != (4, 4) or leading[:-1] != batch or not leading:
        raise ValueError(
            f"camtoworld has shape {camtoworld.shape}, want {(*batch, 'V', 4, 4)} for Gaussians with leading axes {batch}"
        )
    if intrinsics.shape != (*leading, 3, 3):
        raise ValueError(f"intrinsics has shape {intrinsics.shape}, want {(*leading, 3, 3)}, one matrix a view")
    scenes = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(batch) :]), gaussians)
    views = leading[-1]
    per_view = jax.vmap(lambda scene, pose, k: project(scene, pose, k, size), in_axes=(None, 0, 0))
    projected = jax.vmap(per_view)(
        scenes, camtoworld.reshape(-1, views, 4, 4), intrinsics.reshape(-1, views, 3, 3)
    )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), projected), leading


def render(
    gaussians: Gaussians,
    camtoworld: Float[Array, "*batch V 4 4"],
    intrinsics: Float[Array, "*batch V 3 3"],
    size: tuple[int, int],
    *,
    tile: int = 8,
    round_size: int = 512,
) -> tuple[Float[Array, "*batch V H W 3"], Float[Array, "*batch V H W"], Float[Array, "*batch V H W"]]:
    """rgb, expected depth and alpha of every view; exact: no Gaussian that contributes is dropped.

    Tiles take their next `round_size` nearest Gaussians in rounds, until each is exhausted or opaque. Static shapes, any
    batch axes, forward only (the number of rounds depends on the data); differentiate `render_tiled`.

    Args:
        gaussians: N Gaussians a scene, in world axes.
        camtoworld: OpenCV poses of V views a scene.
        intrinsics: in pixels of the image rendered, pixel centres at +0.5; skew is honoured in means only, as in gsplat.
        size: height and width of the images, px.
        tile: side of the square tiles, px; speed only.
        round_size: Gaussians per tile and round; speed only.

    Returns:
        rgb >= 0 on black (not clipped at 1), depth in world units (0 where alpha is 0), alpha in [0, 1].
    """
    views, leading = _views(gaussians, camtoworld, intrinsics, size)
    capacity = min(round_size, views.rows.shape[1])
    pixels = _tile_pixels(tile)
    tiles = _tile_origins(size, tile).shape[0]
    groups = views.rows.shape[0]

    def one_round(state):
        canvas, after, _ = state
        lists = _lists(views, size, tile, capacity, after)
        length = jnp.max(jnp.sum(lists.used, axis=-1))
        canvas = _composite(_gather(views, lists, size, tile), length, pixels, canvas)
        running = jnp.any(canvas.stop == _RUNNING, axis=-1).reshape(groups, tiles)
        # A tile that is opaque asks for nothing more.
        after = (jnp.where(running, lists.last[0], jnp.inf), lists.last[1])
        return canvas, after, jnp.any(running & (lists.candidates > capacity))

    nothing = (jnp.full((groups, tiles), -jnp.inf), jnp.zeros((groups, tiles), jnp.int32))
    state = (_blank(groups * tiles, pixels.shape[0]), nothing, jnp.bool_(True))
    canvas = lax.while_loop(lambda state: state[2], one_round, state)[0]
    return _assemble(canvas.features, canvas.transmittance, leading, size, tile)


def render_tiled(
    gaussians: Gaussians,
    camtoworld: Float[Array, "*batch V 4 4"],
    intrinsics: Float[Array, "*batch V 3 3"],
    size: tuple[int, int],
    *,
    capacity: int = 512,
    tile: int = 8,
) -> Rendered:
    """As `render`, differentiable in the Gaussians, with at most `capacity` Gaussians a tile.

    Gradients reach means, scales, quaternions, opacities, sh, camtoworld and intrinsics. Which Gaussians a tile lists,
    the skip below 1/255 and the stop have none, as in gsplat. What a tile could not take while it was still transparent
    is counted in `overflow`; zero means that the images are exact.
    """
    views, leading = _views(gaussians, camtoworld, intrinsics, size)
    capacity = min(capacity, views.rows.shape[1])
    lists = _lists(views, size, tile, capacity)
    rows = _gather(views, lists, size, tile)
    features, transmittance, stop = _blend(rows, jnp.max(jnp.sum(lists.used, axis=-1)), _tile_pixels(tile))
    running = jnp.any(stop == _RUNNING, axis=-1).reshape(lists.candidates.shape)
    dropped = jnp.sum(jnp.where(running, jnp.maximum(lists.candidates - capacity, 0), 0), axis=-1)
    images = _assemble(features, transmittance, leading, size, tile)
    return Rendered(*images, dropped.reshape(leading))


def render_exact(
    gaussians: Gaussians,
    camtoworld: Float[Array, "*batch V 4 4"],
    intrinsics: Float[Array, "*batch V 3 3"],
    size: tuple[int, int],
) -> tuple[Float[Array, "*batch V H W 3"], Float[Array, "*batch V H W"], Float[Array, "*batch V H W"]]:
    """As `render`, by the definition: every Gaussian in depth order against every pixel, no lists. The oracle of the tests.

    Differentiable, with memory for the rows and a few numbers a pixel; time is N x H x W a view.
    """
    views, leading = _views(gaussians, camtoworld, intrinsics, size)
    depth = jnp.where(views.visible, lax.stop_gradient(views.rows[..., -1]), jnp.inf)
    order = jnp.argsort(depth, axis=-1, stable=True)
    rows = views.rows.at[..., OPACITY].multiply(views.visible)
    rows = jnp.take_along_axis(rows, order[..., None], axis=1).swapaxes(0, 1)
    rows = jnp.pad(rows, ((0, -rows.shape[0] % STEPS_PER_CHECK), (0, 0), (0, 0)))
    height, width = size
    pixels = _tile_origins(size, 1) + 0.5
    features, transmittance, _ = _blend(rows, jnp.max(jnp.sum(views.visible, axis=-1)), pixels)
    image = jnp.concatenate([features, 1.0 - transmittance[None]]).reshape(5, *leading, height, width)
    return _finish(image)
