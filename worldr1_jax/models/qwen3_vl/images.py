"""Images as Qwen3-VL's published processor prepares them, at static sizes and differentiably."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from worldr1_jax.models.qwen3_vl.config import Config

LONGEST_BY_SHORTEST = 200  # the published processor refuses narrower images


def prepared_size(config: Config, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) to which the published processor resizes an image of (height, width).

    Sides are multiples of `config.vision.side` (32 as published), with about the image's aspect,
    min_pixels to max_pixels in all; a size that is so already stays as it is.

    Raises:
      ValueError: an image smaller than a patch, or narrower than 1:200.
    """
    height, width = size
    if min(size) < config.vision.patch_size:
        raise ValueError(
            f"images of {height}x{width} are smaller than a patch: sides have to be at least "
            f"{config.vision.patch_size} pixels"
        )
    if max(size) > LONGEST_BY_SHORTEST * min(size):
        raise ValueError(
            f"images of {height}x{width} are too narrow: a side may be {LONGEST_BY_SHORTEST} times "
            "the other at most"
        )
    unit = config.vision.side
    # Python's rounding to even at halves is part of what was published.
    rounded = round(height / unit) * unit, round(width / unit) * unit
    if math.prod(rounded) > config.max_pixels:
        factor = math.sqrt(height * width / config.max_pixels)
        return (
            max(unit, math.floor(height / factor / unit) * unit),
            max(unit, math.floor(width / factor / unit) * unit),
        )
    if math.prod(rounded) < config.min_pixels:
        factor = math.sqrt(config.min_pixels / (height * width))
        return (
            math.ceil(height * factor / unit) * unit,
            math.ceil(width * factor / unit) * unit,
        )
    return rounded


def prepare(config: Config, images: Float[Array, "*b H W 3"]) -> Float[Array, "*b h w 3"]:
    """Images in [0, 1] as the network reads them: resized to `prepared_size`, then to [-1, 1].

    Departure: the publisher resizes bytes, columns apart from rows, and rounds and clips to bytes
    after each; here values stay float32 and are clipped at the end. Where an image is resized they
    differ by a level of 255 or so (more where black meets white); where it is not, not at all.

    Raises:
      ValueError: as for `prepared_size`.
    """
    images = images.astype(jnp.float32)
    *batch, height, width, channels = images.shape
    size = prepared_size(config, (height, width))
    if size != (height, width):
        shape = (*batch, *size, channels)
        # Cubic kernels overshoot at edges, where bytes are clipped.
        images = jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True), 0.0, 1.0)
    return images * 2 - 1
