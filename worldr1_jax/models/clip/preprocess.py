"""Video frames as CLIP saw its images: square, of the published mean and deviation.

    pad       longest side to the square's, black bars around it: HPSv2's own, which leaves 42% of
              what the network sees of an 832x480 frame black
    crop      shortest side to the square's, the middle of the other: PickScore's, without the sides
    squeeze   both sides to the square's

Frames are resampled bicubically with antialiasing, which agrees with Pillow's, and with torch's
antialiased, bicubic to 1e-5. HPSv2 resamples after the conversion to floats, where torchvision
antialiases since 0.17 and did not before: what was published with it depends on the version.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from worldr1_jax.mesh.placement import constrain
from worldr1_jax.models.clip.config import Config

FITS = ("pad", "crop", "squeeze")
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def preprocess(
    frames: Float[Array, "N H W 3"], config: Config, fit: str
) -> Float[Array, "N S S 3"]:
    """Frames in [0, 1] to what `CLIP.image` takes, S being config.image_size.

    "crop" and "squeeze" cut what the resampling overshoots, as images of 8 bits do, but do not
    round to 8 bits; "pad" leaves it, as HPSv2 does, and pads with zeros before the normalisation.

    Raises:
      ValueError: an unknown fit, or frames that are smaller than a patch.
    """
    if fit not in FITS:
        raise ValueError(f"fit is '{fit}'; it has to be one of {', '.join(FITS)}")
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames {list(frames.shape)} have to be [N H W 3]")
    height, width = frames.shape[1:3]
    if min(height, width) < config.patch_size:
        raise ValueError(
            f"frames are {height}x{width} pixels; they have to be larger than a patch of CLIP, "
            f"{config.patch_size} pixels"
        )
    side = config.image_size
    size = resized(height, width, side, fit)
    frames = jnp.asarray(frames, jnp.float32)
    if size != (height, width):
        shape = (frames.shape[0], *size, 3)
        frames = jax.image.resize(frames, shape, "cubic", antialias=True)
    if fit != "pad":
        frames = jnp.clip(frames, 0.0, 1.0)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        frames = frames[:, top : top + side, left : left + side]
    else:
        bars = [(side - n, (side - n) // 2) for n in size]
        rows, columns = ((first, total - first) for total, first in bars)
        frames = jnp.pad(frames, ((0, 0), rows, columns, (0, 0)))
    return constrain((frames - MEAN) / STD, "sequences", None, None, None)


def resized(height: int, width: int, side: int, fit: str) -> tuple[int, int]:
    """Height and width before bars or crop, rounded as each publisher rounds."""
    if fit == "squeeze":
        return side, side
    if fit == "crop":
        short, long = min(height, width), max(height, width)
        longer = int(side * long / short)
        return (side, longer) if height <= width else (longer, side)
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))
