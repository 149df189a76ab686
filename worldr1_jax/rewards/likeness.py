"""How alike two pictures are, and how much a picture shows: PSNR, SSIM, texture."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

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
    alike = _ssim(mean_a, mean_b, variance_a, variance_b, covariance)
    return jnp.mean(alike, axis=(-3, -2, -1))


def _ssim(mean_a: Array, mean_b: Array, variance_a: Array, variance_b: Array, covariance: Array):
    """SSIM from the moments of a window."""
    brightness = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (variance_a + variance_b + C2)
    return brightness * structure


def ssim_where(
    a: Float[Array, "*batch H W 3"],
    b: Float[Array, "*batch H W 3"],
    shown: Bool[Array, "*batch H W"],
) -> Float[Array, "*batch"]:
    """`ssim` of the pixels that are `shown`: each window's means are over those of them that lie
    inside it, and it counts by their weight; 0 where none does."""
    weight, moments = _moments_where(a, b, shown)
    return _mean_where(_ssim(*moments), weight)


def structure_where(
    a: Float[Array, "*batch H W C"],
    b: Float[Array, "*batch H W C"],
    shown: Bool[Array, "*batch H W"],
    faint: float,
) -> Float[Array, "*batch"]:
    """`ssim_where` without its comparison of means, for images of any range: differences between
    windows whose standard deviation is below `faint` count less."""
    weight, (_, _, variance_a, variance_b, covariance) = _moments_where(a, b, shown)
    alike = (2 * covariance + faint**2) / (variance_a + variance_b + faint**2)
    return _mean_where(alike, weight)


def _moments_where(a: Array, b: Array, shown: Array) -> tuple[Array, tuple[Array, ...]]:
    """Each window's weight of shown pixels, and their means, variances and covariance."""
    mask = shown[..., None].astype(a.dtype)
    weight = _blur(mask)
    total = jnp.maximum(weight, 1e-6)
    mean_a, mean_b = _blur(mask * a) / total, _blur(mask * b) / total
    variance_a = jnp.maximum(_blur(mask * a * a) / total - mean_a**2, 0.0)
    variance_b = jnp.maximum(_blur(mask * b * b) / total - mean_b**2, 0.0)
    covariance = _blur(mask * a * b) / total - mean_a * mean_b
    return weight, (mean_a, mean_b, variance_a, variance_b, covariance)


def _mean_where(alike: Float[Array, "*batch h w C"], weight: Float[Array, "*batch h w 1"]) -> Array:
    alike = jnp.sum(weight * jnp.mean(alike, axis=-1, keepdims=True), axis=(-3, -2, -1))
    return alike / jnp.maximum(jnp.sum(weight, axis=(-3, -2, -1)), 1e-6)


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


def finite(tree: object) -> Bool[Array, " B"]:
    """Per sample, whether every number of every leaf [B ...] is finite."""
    leaves = jax.tree.leaves(tree)
    checks = [jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    return jnp.all(jnp.stack(checks), axis=0)


def where_shown(scores: Parts, evidence: Evidence) -> Parts:
    """The scores, NaN for videos with a frame that shows nothing, or with a reconstruction that is
    not finite: what renders or compares it passes over such parts, which would hide the failure."""
    shown = jnp.min(jnp.asarray(evidence.texture), axis=1) >= BLANK
    sound = shown & finite(evidence.reconstruction)
    return {name: jnp.where(sound, score, jnp.nan) for name, score in scores.items()}
