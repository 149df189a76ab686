"""Depth Anything 3 heads: the camera decoder, and the DPT that gives depth and Gaussian parameters.

Facts from ByteDance-Seed/Depth-Anything-3 (depth_anything_3 0.1.1). The ray branch of DualDPT is
not built: neither depth nor the camera depends on it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.nn.convolution import convolve

NORM_EPS = 1e-5
UV_RATIO = 0.1  # weight of the position embedding that is added to feature maps
UV_OMEGA = 100.0
PYRAMID = 8  # the finest level of the fused pyramid, times the patch grid
# Of products of float32 on TPUs: 16 bits of mantissa, as in convolution.py, and all 24.
FINE, EXACT = jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Shape of one DPT head."""

    output_dim: int = 2  # channels, the last one is the confidence
    features: int = 256
    out_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    head_features: int = 32  # width before the last layer; fixed at 32 in the published code
    down_ratio: int = 1  # output is (H / down_ratio, W / down_ratio)

    def __post_init__(self) -> None:
        if (
            self.features % 8
            or len(self.out_channels) != 4
            or any(c % 4 for c in self.out_channels)
        ):
            raise ValueError(
                f"features {self.features} has to be a multiple of 8, "
                f"out_channels {self.out_channels} four multiples of 4"
            )


class CameraDecoder(nnx.Module):
    """Camera token -> translation, quaternion and field of view."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        # S_traj is no better than the path that comes out here: TPUs would round these products'
        # factors to 8 bits of mantissa.
        linear = functools.partial(nnx.Linear, precision=EXACT, rngs=rngs)
        self.fc1 = linear(dim, dim)
        self.fc2 = linear(dim, dim)
        small = nnx.initializers.normal(0.1 / dim**0.5)
        # A fresh network starts at the identity with a field of view of 1 rad: the ReLU on the
        # field of view has no gradient below zero, and a zero quaternion no rotation.
        self.translation = linear(dim, 3, kernel_init=small)
        self.quaternion = linear(dim, 4, kernel_init=small, bias_init=_constant(0, 0, 0, 1))
        self.fov = linear(dim, 2, kernel_init=small, bias_init=_constant(1, 1))

    def __call__(self, token: Float[Array, "B F D"]) -> tuple[Array, Array, Array]:
        """Translation [B F 3], quaternion [B F 4] xyzw of any length, field of view [B F 2].

        The fields of view are vertical, horizontal, in radians.
        """
        x = jax.nn.relu(self.fc2(jax.nn.relu(self.fc1(token))))
        return self.translation(x), self.quaternion(x), jax.nn.relu(self.fov(x))


def _constant(*values: float) -> Any:
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(values, dtype).reshape(shape)


class UpConv(nnx.Module):
    """Transposed convolution whose stride equals its kernel: every pixel becomes a k x k patch."""

    def __init__(self, channels: int, k: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(
            nnx.initializers.lecun_normal()(rngs.params(), (k, k, channels, channels))
        )
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
        k, (batch, height, width, _) = self.kernel.shape[0], x.shape
        out = jnp.einsum("bhwc,ijco->bhiwjo", x, self.kernel[...], precision=FINE)
        return out.reshape(batch, height * k, width * k, -1) + self.bias[...]


class ResidualUnit(nnx.Module):
    """Two 3x3 convolutions with pre-activation."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.conv1 = conv(features, features, rngs=rngs)
        self.conv2 = conv(features, features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.conv2(jax.nn.relu(self.conv1(jax.nn.relu(x))))


class Fusion(nnx.Module):
    """Adds a level of the pyramid to what comes from above it and upsamples."""

    def __init__(self, features: int, lateral: bool, *, rngs: nnx.Rngs):
        self.unit1 = ResidualUnit(features, rngs=rngs) if lateral else None
        self.unit2 = ResidualUnit(features, rngs=rngs)
        self.out_conv = conv(features, features, 1, rngs=rngs)

    def __call__(self, x: Array, level: Array | None, size: tuple[int, int]) -> Array:
        if self.unit1 is not None and level is not None:
            x = x + self.unit1(level)
        # The published order is upsampling, then the 1x1 convolution. Both are linear and the
        # upsampling weights sum to one, so this order gives the same at a quarter of the products.
        return resize(self.out_conv(self.unit2(x)), size)


class DPT(nnx.Module):
    """Four taps -> a dense map; with `image_merger` the image is mixed in late (GSDPT)."""

    def __init__(
        self,
        config: HeadConfig,
        dim: int,
        *,
        norm: bool,
        image_merger: bool,
        output_bias: tuple[float, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        features, outs = config.features, config.out_channels
        self.norm = (
            nnx.LayerNorm(dim, epsilon=NORM_EPS, dtype=jnp.float32, rngs=rngs) if norm else None
        )
        self.projects = nnx.List([conv(dim, c, 1, rngs=rngs) for c in outs])
        self.up4 = UpConv(outs[0], 4, rngs=rngs)
        self.up2 = UpConv(outs[1], 2, rngs=rngs)
        self.down2 = conv(outs[3], outs[3], stride=2, rngs=rngs)
        self.levels = nnx.List([conv(c, features, use_bias=False, rngs=rngs) for c in outs])
        self.fusions = nnx.List([Fusion(features, lateral=i < 3, rngs=rngs) for i in range(4)])
        self.neck = conv(features, features // 2, rngs=rngs)
        widths = (3, features // 8, features // 4, features // 2)
        self.merger = (
            nnx.List([conv(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
            if image_merger
            else None
        )
        self.out1 = conv(features // 2, config.head_features, rngs=rngs)
        self.out2 = conv(
            config.head_features, config.output_dim, 1,
            kernel_init=nnx.initializers.normal(0.1 / config.head_features**0.5),
            bias_init=_constant(*output_bias) if output_bias else nnx.initializers.zeros,
            rngs=rngs,
        )  # fmt: skip

    def __call__(
        self,
        taps: list[Float[Array, "N P D"]],
        size: tuple[int, int],
        patch: int,
        images: Array | None = None,
    ) -> Float[Array, "N h w C"]:
        """Raw output (no activation).

        Args:
          taps: patch tokens of N frames at four depths.
          size: (H, W) of the image, multiples of `patch`.
          images: [N H W 3] normalised, for a head with an image merger.
        """
        height, width = size
        grid = (height // patch, width // patch)
        levels = [self._level(i, tap, grid, width / height) for i, tap in enumerate(taps)]
        ratio = self.config.down_ratio
        out_size = (height // ratio, width // ratio)
        # A departure for down_ratio > 1: the pyramid is fused straight at the output's size.
        fine = (grid[0] * PYRAMID, grid[1] * PYRAMID) if ratio == 1 else out_size
        x = self.fusions[3](levels[3], None, _size(levels[2]))
        x = self.fusions[2](x, levels[2], _size(levels[1]))
        x = self.fusions[1](x, levels[1], _size(levels[0]))
        x = self.neck(self.fusions[0](x, levels[0], fine))
        x = resize(x, out_size)
        if self.merger is not None:
            if images is None:
                raise ValueError("this head reads the images too; pass images=[N H W 3]")
            x = x + self._merge(images, ratio)
        x = x + uv_embedding(*out_size, x.shape[-1], width / height)
        return self.out2(jax.nn.relu(self.out1(x)))

    def _level(self, i: int, tokens: Array, grid: tuple[int, int], aspect: float) -> Array:
        x = tokens if self.norm is None else self.norm(tokens)
        x = self.projects[i](x.reshape(x.shape[0], *grid, -1))
        x = x + uv_embedding(*grid, x.shape[-1], aspect)
        if i == 0:
            x = self.up4(x)
        elif i == 1:
            x = self.up2(x)
        elif i == 3:
            x = self.down2(x)
        return self.levels[i](x)

    def _merge(self, images: Array, ratio: int) -> Array:
        # The published merger exists at full size only; with down_ratio it reads the block means of
        # the image.
        batch, height, width, channels = images.shape
        x = images.reshape(batch, height // ratio, ratio, width // ratio, ratio, channels).mean(
            (2, 4)
        )
        for layer in self.merger or ():
            x = jax.nn.gelu(layer(x), approximate=False)
        return x


def _size(x: Array) -> tuple[int, int]:
    return x.shape[1], x.shape[2]


def conv(inputs: int, outputs: int, size: int = 3, *, stride: int = 1, **options: Any) -> nnx.Conv:
    """Convolution of size x size, with zeros around: stride 1 keeps the image's size."""
    return nnx.Conv(
        inputs, outputs, (size, size), strides=(stride, stride), padding=size // 2,
        conv_general_dilated=convolve, **options,
    )  # fmt: skip


def resize(x: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B H W C"]:
    """Bilinear resampling that maps corner pixel centres onto corner pixel centres."""
    if x.shape[1:3] == tuple(size):
        return x
    x = jnp.einsum("yi,bijc->byjc", corner_matrix(x.shape[1], size[0]), x, precision=FINE)
    return jnp.einsum("xj,byjc->byxc", corner_matrix(x.shape[2], size[1]), x, precision=FINE)


@functools.lru_cache(maxsize=64)
def corner_matrix(source: int, target: int) -> np.ndarray:
    """[target source] weights of corner-aligned linear interpolation."""
    centre = np.linspace(0.0, source - 1.0, target) if target > 1 else np.zeros(1)
    low = np.minimum(np.floor(centre).astype(int), max(source - 2, 0))
    weights = np.zeros((target, source), np.float32)
    weights[np.arange(target), low] = 1 - (centre - low)
    weights[np.arange(target), np.minimum(low + 1, source - 1)] += centre - low
    return weights


@functools.lru_cache(maxsize=64)
def uv_embedding(height: int, width: int, channels: int, aspect: float) -> np.ndarray:
    """[height width channels] sines and cosines of image positions, scaled by 0.1.

    Positions span the image with its diagonal normalised to 2; half of the channels encode x, half
    y.
    """
    diagonal = (aspect**2 + 1) ** 0.5
    spans = (aspect / diagonal, 1 / diagonal)
    omega = UV_OMEGA ** -(np.arange(channels // 4, dtype=np.float64) / (channels / 4))
    axes = []
    for span, count in zip(spans, (width, height), strict=True):
        end = span * (count - 1) / count
        angles = np.linspace(-end, end, count)[:, None] * omega
        axes.append(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1))
    xs = np.broadcast_to(axes[0][None], (height, width, channels // 2))
    ys = np.broadcast_to(axes[1][:, None], (height, width, channels // 2))
    return (np.concatenate([xs, ys], axis=-1) * UV_RATIO).astype(np.float32)
