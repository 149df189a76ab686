"""Layers of the Wan2.1 video VAE: causal convolution, norm, residual, attention, resampling.

Features are channels last, [B F H W C]. Every layer is causal in time. The same code runs a whole
video at once and frame chunk by frame chunk: a `Stream` gives each temporal layer the last frames
of the previous chunk, which are zeros before the first frame, so both ways give one result.

Source: diffusers AutoencoderKLWan (facts: padding, first-frame rules, names of the weights);
Wan2.1, arXiv 2503.20314.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from worldr1_jax.nn.convolution import convolve

Video = Float[Array, "B F H W C"]
DType = Any


class Stream:
    """Hands layers the frames before this chunk, and collects those that the next chunk needs.

    Built anew for each chunk, while it is traced; layers use it in a fixed order, so the caches
    are a plain list.

    Attributes:
      first: whether the chunk starts the video.
      caches: after the chunk, the caches for the next chunk's `Stream`.
    """

    def __init__(self, caches: Sequence[Array] | None = None):
        self.first = caches is None
        self.caches: list[Array] = []
        self._previous = iter(() if caches is None else caches)

    def take(self, count: int) -> list[Array] | None:
        """The next `count` caches of the previous chunk; None at the start of the video."""
        return None if self.first else [next(self._previous) for _ in range(count)]

    def extend(self, x: Video, frames: int) -> Video:
        """Puts the `frames` frames before x in front of it: zeros at the start of the video."""
        batch, _, *rest = x.shape
        before = jnp.zeros((batch, frames, *rest), x.dtype) if self.first else next(self._previous)
        x = jnp.concatenate([before, x], axis=1)
        self.caches.append(x[:, -frames:])
        return x

    def extend_after_first(self, x: Video, frames: int) -> Video:
        """Like `extend`, but the video's own first frames are not preceded by anything."""
        x = x if self.first else jnp.concatenate([next(self._previous), x], axis=1)
        self.caches.append(x[:, -frames:])
        return x


def conv2d(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "kh kw C O"],
    stride: int = 1,
    padding: Any = "SAME",
) -> Float[Array, "N h w O"]:
    """2D convolution, channels last; a 1x1 kernel is one matrix product."""
    precision = lax.Precision.HIGH if x.dtype == jnp.float32 else None
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return jnp.matmul(x, kernel[0, 0], precision=precision)
    return convolve(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )  # fmt: skip


def temporal_conv(
    x: Video, kernel: Float[Array, "kt kh kw C O"], stride: int = 1
) -> Float[Array, "B G H W O"]:
    """3D convolution, valid in time (with `stride`), same in space; a sum of 2D ones over taps,
    except for TPUs.

    On 2 CPU cores, at 4x17x32x32 with 16 -> 16 channels, XLA's conv3d takes 49 ms forward and
    185 ms with gradients, this sum 9 and 64 ms. With gradients, one conv2d over joined taps takes
    99 ms, and a matrix product of unfolded windows 128 ms. Forward, in processor time at 4 frames
    against torch's conv3d: 0.88x its speed at 64x64 with 192 channels, equal at 128x128 with 96; a
    loop over frames gains 5%, joined taps and unfolded rows take 19 to 49% longer. For a TPU the
    compiler's estimate, at 4x480x832 with 96 channels, is 40% less for one 3D convolution, and its
    memory 44% less.
    """
    taps = kernel.shape[0]
    batch, frames, *space = x.shape
    count = (frames - taps) // stride + 1
    if count < 1:  # The first chunk of a stream is one frame, too short for a window.
        return jnp.zeros((batch, 0, *space[:2], kernel.shape[-1]), x.dtype)

    def by_taps(x: Array, kernel: Array) -> Array:
        parts = []
        for tap in range(taps):
            part = lax.slice_in_dim(x, tap, tap + stride * (count - 1) + 1, stride, axis=1)
            parts.append(conv2d(part.reshape(batch * count, *space), kernel[tap]))
        out = functools.reduce(jnp.add, parts)
        return out.reshape(batch, count, *out.shape[1:])

    def at_once(x: Array, kernel: Array) -> Array:
        padding = ((0, 0), *((size // 2, size // 2) for size in kernel.shape[1:3]))
        return convolve(
            x, kernel, (stride, 1, 1), padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    if kernel.shape[:3] == (1, 1, 1):
        return by_taps(x, kernel)
    return lax.platform_dependent(x, kernel, tpu=at_once, default=by_taps)


class CausalConv3d(nnx.Module):
    """Convolution that sees a frame and the kt - 1 before it.

    Zeros stand before the video and around each frame.

    Args:
      in_channels, out_channels: channels.
      kernel_size: (kt, kh, kw), kh and kw odd.
      rngs: key for the weights.
      stride: temporal stride; with 2, nothing is put before the video, and the windows overlap in
        one frame.
      dtype: dtype of the computation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        *,
        rngs: nnx.Rngs,
        stride: int = 1,
        dtype: DType = jnp.float32,
    ):
        shape = (*kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x: Video, stream: Stream) -> Video:
        """[B F H W C] -> [B F/stride H W O]."""
        x, kernel, bias = (
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            self.bias[...].astype(self.dtype),
        )
        if self.stride > 1:
            x = stream.extend_after_first(x, 1)
        elif kernel.shape[0] > 1:
            x = stream.extend(x, kernel.shape[0] - 1)
        return temporal_conv(x, kernel, self.stride) + bias


class FrameConv(nnx.Module):
    """2D convolution of each frame. Stride 2 pads below and to the right only."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        rngs: nnx.Rngs,
        stride: int = 1,
        dtype: DType = jnp.float32,
    ):
        shape = (size, size, in_channels, out_channels)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x: Video) -> Video:
        """[B F H W C] -> [B F H/stride W/stride O]."""
        batch, frames, *space = x.shape
        x, kernel, bias = (
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            self.bias[...].astype(self.dtype),
        )
        padding = "SAME" if self.stride == 1 else ((0, 1), (0, 1))
        y = conv2d(x.reshape(batch * frames, *space), kernel, self.stride, padding)
        return y.reshape(batch, frames, *y.shape[1:]) + bias


class RMSNorm(nnx.Module):
    """Scales each pixel's channels to a root mean square of `gamma`, in float32.

    No epsilon, but the norm is at least 1e-12. `gamma` keeps the publisher's shape, [C 1 1 1] for
    videos and [C 1 1] for frames, so that files need no reshape.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs, trailing: int = 3):
        del rngs  # Ones need no key; the argument keeps all layers alike.
        self.gamma = nnx.Param(jnp.ones((channels,) + (1,) * trailing, jnp.float32))

    def __call__(self, x: Video) -> Video:
        """[... C] -> [... C], dtype of x."""
        gamma = self.gamma[...].reshape(-1).astype(jnp.float32)
        y = x.astype(jnp.float32)
        # max under the root, not max(norm, floor): same value, and a finite gradient at zero.
        inverse = lax.rsqrt(jnp.maximum(jnp.sum(y * y, axis=-1, keepdims=True), 1e-24))
        return (y * inverse * (gamma * gamma.size**0.5)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1x1 convolution on x where channels change."""

    caches = 2  # Of the two 3x3x3 convolutions.

    def __init__(
        self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs, dtype: DType = jnp.float32
    ):
        kernel = (3, 3, 3)
        self.norm1 = RMSNorm(in_channels, rngs=rngs)
        self.conv1 = CausalConv3d(in_channels, out_channels, kernel, rngs=rngs, dtype=dtype)
        self.norm2 = RMSNorm(out_channels, rngs=rngs)
        self.conv2 = CausalConv3d(out_channels, out_channels, kernel, rngs=rngs, dtype=dtype)
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(
                in_channels, out_channels, (1, 1, 1), rngs=rngs, dtype=dtype
            )
        self.changes_channels = in_channels != out_channels

    def __call__(self, x: Video, stream: Stream) -> Video:
        """[B F H W C] -> [B F H W O]."""
        skip = self.conv_shortcut(x, stream) if self.changes_channels else x
        x = self.conv1(jax.nn.silu(self.norm1(x)), stream)
        return skip + self.conv2(jax.nn.silu(self.norm2(x)), stream)


def apply(layer: nnx.Module, x: Video, stream: Stream, *, remat: bool) -> Video:
    """Calls the layer; with `remat`, the backward pass recomputes a residual block's inside."""
    if not (remat and isinstance(layer, ResidualBlock)):
        return layer(x, stream)
    graph, state = nnx.split(layer)

    # Functions under jax.checkpoint have to be pure, so the block gets a stream of its own.
    @jax.checkpoint
    def run(state: nnx.State, x: Video, before: list[Array] | None) -> tuple[Video, list[Array]]:
        inner = Stream(before)
        return nnx.merge(graph, state)(x, inner), inner.caches

    x, caches = run(state, x, stream.take(ResidualBlock.caches))
    stream.caches.extend(caches)
    return x


class AttentionBlock(nnx.Module):
    """Self-attention among the pixels of each frame, one head, with a residual."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DType = jnp.float32):
        self.norm = RMSNorm(channels, rngs=rngs, trailing=2)
        self.to_qkv = FrameConv(channels, 3 * channels, 1, rngs=rngs, dtype=dtype)
        self.proj = FrameConv(channels, channels, 1, rngs=rngs, dtype=dtype)

    def __call__(self, x: Video, stream: Stream) -> Video:
        """[B F H W C] -> [B F H W C]; `stream` is not used, frames do not mix."""
        batch, frames, height, width, channels = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(batch * frames, height * width, 1, 3 * channels)
        query, key, value = jnp.split(qkv, 3, axis=-1)
        y = jax.nn.dot_product_attention(query, key, value)  # Softmax in float32.
        return x + self.proj(y.reshape(x.shape))


class Downsample(nnx.Module):
    """Halves height and width; with `temporal`, also the number of frames after the first."""

    def __init__(
        self, channels: int, *, temporal: bool, rngs: nnx.Rngs, dtype: DType = jnp.float32
    ):
        self.resample = FrameConv(channels, channels, 3, rngs=rngs, stride=2, dtype=dtype)
        if temporal:
            self.time_conv = CausalConv3d(
                channels, channels, (3, 1, 1), rngs=rngs, stride=2, dtype=dtype
            )
        self.temporal = temporal

    def __call__(self, x: Video, stream: Stream) -> Video:
        """[B F H W C] -> [B G H/2 W/2 C]; temporal: F = 1 + 2k to G = 1 + k, later 2k to k."""
        x = self.resample(x)
        if not self.temporal:
            return x
        # The first frame passes as it is; it is also the oldest one in the first window.
        y = self.time_conv(x, stream)
        return jnp.concatenate([x[:, :1], y], axis=1) if stream.first else y


class Upsample(nnx.Module):
    """Doubles height and width, halves channels; with `temporal`, doubles later frames too."""

    def __init__(
        self, channels: int, *, temporal: bool, rngs: nnx.Rngs, dtype: DType = jnp.float32
    ):
        self.resample = FrameConv(channels, channels // 2, 3, rngs=rngs, dtype=dtype)
        if temporal:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), rngs=rngs, dtype=dtype)
        self.temporal = temporal

    def __call__(self, x: Video, stream: Stream) -> Video:
        """[B F H W C] -> [B G 2H 2W C/2]; temporal: F = 1 + k to G = 1 + 2k, later k to 2k."""
        if self.temporal and stream.first:
            # The publisher's temporal convolution never sees frame 0: zeros precede frame 1.
            x = jnp.concatenate([x[:, :1], self._double(x[:, 1:], stream)], axis=1)
        elif self.temporal:
            x = self._double(x, stream)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.resample(x)

    def _double(self, x: Video, stream: Stream) -> Video:
        batch, frames, height, width, channels = x.shape
        y = self.time_conv(x, stream).reshape(batch, frames, height, width, 2, channels)
        return jnp.moveaxis(y, 4, 2).reshape(batch, 2 * frames, height, width, channels)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DType):
        self.resnets = nnx.List(
            [ResidualBlock(channels, channels, rngs=rngs, dtype=dtype) for _ in range(2)]
        )
        self.attentions = nnx.List([AttentionBlock(channels, rngs=rngs, dtype=dtype)])

    def layers(self) -> list[nnx.Module]:
        """The layers in the order in which they run."""
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


class UpBlock(nnx.Module):
    """Residual blocks of one decoder level, and the upsampling to the next one."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        *,
        temporal: bool | None,
        rngs: nnx.Rngs,
        dtype: DType,
    ):
        self.resnets = nnx.List(
            [
                ResidualBlock(channels if i else in_channels, channels, rngs=rngs, dtype=dtype)
                for i in range(blocks)
            ]
        )
        # temporal is None at the last level, which is not upsampled.
        upsamplers = (
            []
            if temporal is None
            else [Upsample(channels, temporal=temporal, rngs=rngs, dtype=dtype)]
        )
        self.upsamplers = nnx.List(upsamplers)

    def layers(self) -> list[nnx.Module]:
        """The layers in the order in which they run."""
        return [*self.resnets, *self.upsamplers]


def patchify(x: Array, size: int) -> Array:
    """[B F H W C] -> [B F H/p W/p C p p]; the publisher's channel order is (C, column, row)."""
    if size == 1:
        return x
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(
        batch, frames, height // size, width // size, -1
    )


def unpatchify(x: Array, size: int) -> Array:
    """The inverse of `patchify`."""
    if size == 1:
        return x
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, width, channels // size**2, size, size)
    return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(batch, frames, height * size, width * size, -1)
