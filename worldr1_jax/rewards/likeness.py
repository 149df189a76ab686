"""How alike two pictures are, and how much a picture shows: PSNR, SSIM, texture."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from worldr1_jax.geometry import root
from worldr1_jax.rewards.base import Evidence, Parts

WINDOW, SIGMA = 7, 1.5  # px; SSIM's Gaussian window, 7 instead of 11 because nano frames are small
C1, C2 = 0.01**2, 0.03**2  # SSIM's stabilisers for a range of 1
BLANK = 1 / 255  # texture below which a frame shows nothing: one level of 8 bits
MSE_MIN = 1e-10  # PSNR is at most 100 dB
ROUNDING = 1e-7  # of a variance in float32; a spread of 0.1 of 255 levels


def psnr(
    a: Float[Array, "*batch H W 3"], b: Float[Array, "*batch H W 3"]
) -> Float[Array, "*batch"]:
    """Peak signal-to-noise ratio of images in [0, 1]; dB, at most 100."""
    error = jnp.mean((a - b) ** 2, axis=(-3, -2, -1))
    return -10.0 * jnp.log10(jnp.maximum(error, MSE_MIN))


def ssim(
    a: Float[Array, "*batch H W 3"], b: Float[Array, "*batch H W 3"]
) -> Float[Array, "*batch"]:
    """Structural similarity of images in [0, 1] (Wang et al. 2004), -1 to 1.

    Gaussian window, population variances, mean over channels and over the pixels whose window lies
    inside the image.

    Raises:
        ValueError: images smaller than the window.
    """
    if min(a.shape[-3:-1]) < WINDOW:
        raise ValueError(f"images are {a.shape[-3:-1]} px; SSIM needs at least {WINDOW} a side")
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    brightness = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (variance_a + variance_b + C2)
    return jnp.mean(brightness * structure, axis=(-3, -2, -1))


def texture(video: Float[Array, "B F H W 3"]) -> Float[Array, "B F"]:
    """Mean local standard deviation of brightness (SSIM's window); 0 for a blank frame."""
    gray = jnp.mean(video, axis=-1, keepdims=True)
    gray = gray - jnp.mean(gray, axis=(2, 3), keepdims=True)  # or rounding looks like texture
    variance = _blur(gray * gray) - _blur(gray) ** 2
    return jnp.mean(root(jnp.maximum(variance, 0.0), ROUNDING), axis=(2, 3, 4))


def _blur(image: Float[Array, "*batch H W C"]) -> Float[Array, "*batch h w C"]:
    """Gaussian mean of each whole window."""
    taps = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    taps = taps / taps.sum()
    for axis in (-3, -2):
        axis = image.ndim + axis
        length = image.shape[axis] - WINDOW + 1
        shifted = [jax.lax.slice_in_dim(image, k, k + length, axis=axis) for k in range(WINDOW)]
        image = functools.reduce(
            jnp.add, [float(tap) * part for tap, part in zip(taps, shifted, strict=True)]
        )
    return image


def where_shown(scores: Parts, evidence: Evidence) -> Parts:
    """The scores, NaN for videos with a frame that shows nothing."""
    shown = jnp.min(jnp.asarray(evidence.texture), axis=1) >= BLANK
    return {name: jnp.where(shown, score, jnp.nan) for name, score in scores.items()}
