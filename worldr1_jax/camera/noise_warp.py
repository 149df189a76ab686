"""Gaussian noise that moves with the camera, and its injection into the latents.

The algorithm is Go-with-the-Flow's (arXiv 2501.08331) as World-R1 uses it. Each pixel of a grid
`flow_scale` times finer than the latents carries noise, a weight and a sub-pixel offset. Every
output frame the grid is carried along the flow:

  shrink  a pixel whose moved centre lands in the image is added to the pixel it lands on; several
          on one combine as sum(w x) / sqrt(sum(w^2)), which is again N(0, 1);
  expand  a pixel on which none lands copies the one that the flow points back to; all copies of
          one source, its shrink copy included, are made independent again ("regaussianised"):
          their sum is kept at sqrt(count) times the source, the rest is fresh noise;
  fresh   a pixel whose source is outside the image is new noise.

Departures from the published code, each deliberate:
  - Copies are grouped by SOURCE PIXEL INDEX (scatter-adds of static shape), not by sorting for
    equal float values: the same groups, without accidental collisions and without a sort.
  - Within a group only the expand copies draw fresh noise; the shrink copy takes what keeps the
    sum. The joint distribution is the same with half the random numbers.
  - Fresh pixels are independent draws of weight 1. In the published code they form one group (of
    value 0), which takes away its mean and divides its weight by its size.
  - Offsets are carried by default (`subpixel`): rounding each frame's flow, as released, loses
    any motion slower than half a pixel per frame. subpixel=False is the released behaviour.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from worldr1_jax.camera import flow as camera_flow

# Bytes of one working array of a frame; more channels than fit are done in turns.
_WORKING_BYTES = 128 * 2**20
_WEIGHT_FLOOR = 1e-5  # published: weights never reach zero ...
_WEIGHT_DECAY = 0.9999  # ... and are drawn towards 1 by this power


class Grid(NamedTuple):
    """What a pixel carries besides its noise. N = pixels of the fine grid."""

    offset: Float[Array, "N 2"]  # (x, y) from the pixel to the content's true place, pixels
    weight: Float[Array, " N"]


class Moves(NamedTuple):
    """Where the noise of one frame comes from; the same for all channels."""

    target: Int[Array, " N"]  # shrink: pixel that this source lands on, N when outside the image
    source: Int[Array, " N"]  # expand: source of this pixel, N when it is not an expand pixel
    landed: Bool[Array, " N"]  # some source lands on this pixel
    copies: Float[Array, " N"]  # expand copies of this source
    members: Float[Array, " N"]  # all copies of this source, at least 1
    weight: Float[Array, " N"]  # weight of each copy of this source
    norm: Float[Array, " N"]  # sqrt of the sum of squared weights that land on this pixel


def _scatter_add(values: Array, index: Int[Array, " N"]) -> Array:
    """Sums rows by index; index N (and beyond) is dropped."""
    return jnp.zeros_like(values).at[index].add(values, mode="drop")


def _neighbour(motion: Float[Array, "H W 2"]) -> Int[Array, " N"]:
    """Index of the pixel nearest to each pixel moved by `motion`, H * W when outside the image.

    The motion is rounded, not the place: a uniform motion of half a pixel must stay uniform.
    """
    height, width, _ = motion.shape
    nearest = jnp.round(motion).astype(jnp.int32)
    x = jnp.arange(width) + nearest[..., 0]
    y = jnp.arange(height)[:, None] + nearest[..., 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return jnp.where(inside, y * width + x, height * width).reshape(-1)


def move_grid(
    grid: Grid, flow: Float[Array, "H W 2"], *, subpixel: bool = True
) -> tuple[Grid, Moves]:
    """Carries the grid one frame along the flow.

    Args:
      grid: offsets and weights, N = H * W in row-major order.
      flow: (x, y) in pixels of this grid, from this frame to the next.
      subpixel: carry what rounding leaves over to the next frame.

    Returns:
      The next frame's grid, and the moves that `move_noise` applies to the noise.
    """
    height, width, _ = flow.shape
    pixels = height * width
    moved = grid.offset.reshape(flow.shape) + flow
    target = _neighbour(moved)
    lands = target < pixels
    landed = _scatter_add(lands.astype(jnp.float32), target) > 0
    back = _neighbour(-flow)
    source = jnp.where(landed, pixels, back)
    expands = source < pixels
    copies = _scatter_add(expands.astype(jnp.float32), source)
    count = jnp.maximum(copies + lands, 1.0)
    share = grid.weight / count

    at = jnp.minimum(source, pixels - 1)
    gathered = _scatter_add(share, target)
    norm = jnp.sqrt(_scatter_add(share**2, target))
    weight = jnp.where(landed, gathered, jnp.where(expands, share[at], 1.0))
    weight = (weight / weight.mean() + _WEIGHT_FLOOR) ** _WEIGHT_DECAY
    offset = grid.offset
    if subpixel:
        left_over = (moved - jnp.round(moved)).reshape(-1, 2)
        met = (
            _scatter_add(left_over * share[:, None], target)
            / jnp.where(landed, gathered, 1)[:, None]
        )
        kept = jnp.where(expands[:, None], offset[at], 0.0)
        offset = jnp.where(landed[:, None], met, kept)
    moves = Moves(target, source, landed, copies, count, share, jnp.where(landed, norm, 1.0))
    return Grid(offset, weight), moves


def move_noise(
    noise: Float[Array, "N C"], moves: Moves, fresh: Float[Array, "N C"]
) -> Float[Array, "N C"]:
    """Carries noise one frame; independent N(0, 1) pixels in give independent N(0, 1) pixels out.

    Args:
      noise: of the previous frame.
      moves: from `move_grid`.
      fresh: independent N(0, 1) where no source has landed; elsewhere it is not used.

    For a source z with m expand copies e_i (fresh, mean e) among n copies in all:
      expand copy    z / sqrt(n) + e_i - (1 - s / sqrt(n)) e      s = 1 with a shrink copy, else 0
      shrink copy    z / sqrt(n) - m e / sqrt(n)
    All n have variance 1, no covariance, and the sum sqrt(n) z.
    """
    pixels = noise.shape[0]
    root = jnp.sqrt(moves.members)[:, None]
    lands = (moves.target < pixels)[:, None]
    total = _scatter_add(fresh, moves.source)
    mean = total / jnp.maximum(moves.copies, 1.0)[:, None]
    base = noise / root
    for_expand = base - jnp.where(lands, 1.0 - 1.0 / root, 1.0) * mean
    for_shrink = (base - total / root) * moves.weight[:, None]
    shrink = _scatter_add(for_shrink, moves.target) / moves.norm[:, None]
    expand = for_expand.at[moves.source].get(mode="fill", fill_value=0.0) + fresh
    return jnp.where(moves.landed[:, None], shrink, expand)


def fresh_noise(
    key: Key[Array, ""], wanted: Bool[Array, " N"], channels: int
) -> Float[Array, "N C"]:
    """N(0, 1) in the wanted rows, zero in the others.

    Few pixels of a frame need fresh noise and drawing it is most of the cost of a frame, so the
    wanted rows are listed and drawn in blocks, as many as there are (shapes stay static).
    """
    pixels = wanted.shape[0]
    block = max(256, pixels // 64)
    blocks = -(-pixels // block)
    (rows,) = jnp.nonzero(wanted, size=blocks * block, fill_value=pixels)

    def draw(index: Array, noise: Array) -> Array:
        at = jax.lax.dynamic_slice_in_dim(rows, index * block, block)
        drawn = jax.random.normal(jax.random.fold_in(key, index), (block, channels))
        return noise.at[at].set(drawn, mode="drop")

    used = (wanted.sum() + block - 1) // block
    return jax.lax.fori_loop(0, used, draw, jnp.zeros((pixels, channels)))


def downscale(
    noise: Float[Array, "N C"], size: tuple[int, int], scale: int
) -> Float[Array, "h w C"]:
    """Sums square bins of the fine grid and divides by sqrt(count), which keeps variance 1.

    Args:
      noise: on the fine grid, (h * scale) by (w * scale), row-major.
      size: (h, w) of the latents.
      scale: fine pixels along the side of a bin.
    """
    height, width = size
    bins = noise.reshape(height, scale, width, scale, -1)
    return bins.sum((1, 3)) / scale


def _check(frames: int, latent_shape: tuple[int, int, int, int], **amounts: float) -> int:
    """Output frames per latent frame."""
    latent_frames = latent_shape[0]
    steps = max(latent_frames - 1, 1)
    if (frames - 1) % steps or (frames > 1) != (latent_frames > 1):
        raise ValueError(
            f"A path of {frames} poses does not fit {latent_frames} latent frames; "
            "the path needs 1 + stride * (latent frames - 1) poses"
        )
    for name, amount in amounts.items():
        if not 0.0 <= amount <= 1.0:
            raise ValueError(f"{name} is {amount} and must be in [0, 1]")
    return (frames - 1) // steps


def mix(
    noise: Float[Array, "..."], other: Float[Array, "..."], amount: float | Float[Array, ""]
) -> Float[Array, "..."]:
    """Mixes two independent noises and keeps variance 1: amount 0 is `noise`, 1 is `other`."""
    kept = 1.0 - amount
    return (kept * noise + amount * other) / jnp.sqrt(kept**2 + jnp.square(amount))


def white(key: Key[Array, ""], latent_shape: tuple[int, int, int, int]) -> Float[Array, "f h w C"]:
    """The noise that `warp` returns for this key when the camera does not move."""
    return jax.random.normal(jax.random.fold_in(key, 0), latent_shape)


@functools.partial(
    jax.jit, static_argnames=("latent_shape", "flow_scale", "degradation", "subpixel", "channels")
)
def warp(
    key: Key[Array, ""],
    camtoworld: Float[Array, "F 4 4"],
    latent_shape: tuple[int, int, int, int],
    *,
    depth: float | Float[Array, ""] = 1000.0,
    focal: float | Float[Array, ""] = 1.2,
    flow_scale: int = 16,
    degradation: float = 0.35,
    subpixel: bool = True,
    channels: int | None = None,
) -> Float[Array, "f h w C"]:
    """Gaussian noise for the latents that moves as the camera path makes the image move.

    Works under jax.vmap over keys and paths; `warp_batch` does the same in bounded memory.

    Args:
      key: consumed.
      camtoworld: path at output frame rate, F = 1 + stride * (f - 1); noise is carried frame by
        frame and kept at frames 0, stride, 2 stride, ...
      latent_shape: (f, h, w, C).
      depth: assumed depth of the scene, in the path's length unit.
      focal: focal length in image widths.
      flow_scale: fine pixels along the side of a latent pixel (16 published).
      degradation: in [0, 1], share of fresh noise mixed in at the end, variance-preserving.
      subpixel: carry offsets below a pixel over frames; False is the released behaviour.
      channels: done at once; None takes as many as keep a working array under 128 MiB.

    Returns:
      Noise, float32: within a frame independent N(0, 1); between frames correlated along the
      flow. `white(key, latent_shape)` when no pose differs from the first.

    Raises:
      ValueError: the path does not fit the latent frames, or degradation is outside [0, 1].
    """
    stride = _check(camtoworld.shape[0], latent_shape, degradation=degradation)
    moving = jnp.any(camtoworld != camtoworld[:1])
    moved_key, mix_key = jax.random.split(jax.random.fold_in(key, 1))

    def warped() -> Array:
        size = (latent_shape[1] * flow_scale, latent_shape[2] * flow_scale)
        intrinsics = camera_flow.pinhole(size, focal)
        transforms = camera_flow.relative(camtoworld[:-1], camtoworld[1:])
        transforms = transforms.reshape(-1, stride, 4, 4)
        flow = functools.partial(
            camera_flow.pixel_flow, intrinsics=intrinsics, size=size, depth=depth
        )
        noise = _carry(moved_key, transforms, flow, latent_shape, flow_scale, subpixel, channels)
        return mix(noise, jax.random.normal(mix_key, latent_shape), degradation)

    if camtoworld.shape[0] == 1:
        return white(key, latent_shape)
    return jax.lax.cond(moving, warped, lambda: white(key, latent_shape))


def _carry(key, transforms, flow, latent_shape, scale, subpixel, channels) -> Array:
    """Scans over frames; emits the downscaled noise once per latent frame."""
    _, height, width, depth = latent_shape
    pixels = height * width * scale**2
    turn = channels or max(1, min(depth, _WORKING_BYTES // (4 * pixels)))
    turns = math.ceil(depth / turn)
    first_key, frames_key = jax.random.split(key)
    first = jax.random.normal(first_key, (turns, pixels, turn))
    grid = Grid(jnp.zeros((pixels, 2)), jnp.ones(pixels))
    keys = jax.random.split(frames_key, transforms.shape[:2])

    def frame(state, inputs):
        grid, noise = state
        transform, frame_key = inputs
        grid, moves = move_grid(grid, flow(transform), subpixel=subpixel)

        def one_turn(inputs):
            turn_noise, turn_key = inputs
            return move_noise(turn_noise, moves, fresh_noise(turn_key, ~moves.landed, turn))

        if turns == 1:
            return (grid, one_turn((noise[0], frame_key))[None]), None
        return (grid, jax.lax.map(one_turn, (noise, jax.random.split(frame_key, turns)))), None

    def latent(noise):
        small = jax.lax.map(lambda part: downscale(part, (height, width), scale), noise)
        return jnp.moveaxis(small, 0, 2).reshape(height, width, -1)[..., :depth]

    def latent_frame(state, inputs):
        state, _ = jax.lax.scan(frame, state, inputs)
        return state, latent(state[1])

    _, later = jax.lax.scan(latent_frame, (grid, first), (transforms, keys))
    return jnp.concatenate([latent(first)[None], later])


def warp_batch(
    keys: Key[Array, " B"],
    camtoworld: Float[Array, "B F 4 4"],
    latent_shape: tuple[int, int, int, int],
    *,
    at_once: int = 1,
    **options,
) -> Float[Array, "B f h w C"]:
    """`warp` for each video, `at_once` of them together: memory grows with `at_once` only.

    With at_once=1 a video whose camera stands still costs no warp at all.
    """

    def one(inputs):
        return warp(inputs[0], inputs[1], latent_shape, **options)

    batch_size = at_once if at_once > 1 else None
    return jax.lax.map(one, (keys, camtoworld), batch_size=batch_size)


def inject(
    noise: Float[Array, "... f h w C"],
    warped: Float[Array, "... f h w C"],
    strength: float | Float[Array, ""],
) -> Float[Array, "... f h w C"]:
    """Initial latents (the paper's injection): variance-preserving mix of fresh and warped noise.

    Args:
      noise: fresh N(0, 1), independent of `warped`.
      warped: from `warp`.
      strength: in [0, 1]; 0 is `noise`, 1 is `warped` (0.35 small, 0.40 large published).

    Raises:
      ValueError: strength is a number outside [0, 1].
    """
    if isinstance(strength, (int, float)) and not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength is {strength} and must be in [0, 1]")
    return mix(noise, warped, strength)


def _mean_std(latents: Float[Array, "B f h w C"]) -> tuple[Array, Array]:
    axes = tuple(range(1, latents.ndim))
    return latents.mean(axes, keepdims=True), latents.std(axes, keepdims=True)


def lowpass(latents: Float[Array, "B f h w C"], kernel: int = 9) -> Float[Array, "B f h w C"]:
    """Box mean over `kernel` x `kernel` latent pixels (odd), zeros outside, as published."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel} and must be odd and positive")
    window = (1, 1, kernel, kernel, 1)
    total = jax.lax.reduce_window(latents, 0.0, jax.lax.add, window, (1,) * 5, "SAME")
    return total / kernel**2


def step_delta(
    latents: Float[Array, "B f h w C"],
    warped: Float[Array, "B f h w C"],
    step: int | Int[Array, ""],
    *,
    noise: Float[Array, "B f h w C"] | None = None,
    strength: float | Float[Array, ""],
    steps: int = 8,
    kernel: int = 9,
) -> Float[Array, "B f h w C"]:
    """Per-step injection: adds the low-passed warp to the latents after a denoising step.

    A pure function of a traced `step`, for use inside the sampler's scan. The mean and standard
    deviation of each sample are those it came with.

    Args:
      latents: after the step.
      warped: from `warp`, one per sample.
      step: index of the step, from 0; from `steps` on the latents pass unchanged.
      noise: the initial latents; the published delta is warped - noise. None takes `warped` alone.
      strength: 0 changes nothing.
      steps: injected steps; their weights fall linearly from 1 to 0.1 and sum to 1.
      kernel: of the low pass.
    """
    delta = lowpass(warped if noise is None else warped - noise, kernel)
    delta = delta / (_mean_std(delta)[1] + 1e-6)
    weights = jnp.linspace(1.0, 0.1, steps)
    weight = (weights / weights.sum())[jnp.minimum(step, steps - 1)]
    mean, std = _mean_std(latents)
    guided = latents + strength * weight * std * delta
    guided_mean, guided_std = _mean_std(guided)
    guided = (guided - guided_mean) / (guided_std + 1e-6) * std + mean
    return jnp.where((step < steps) & (strength > 0), guided, latents)
