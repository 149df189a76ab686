"""Qwen3-VL's image tower: patches to features for the decoder, of the last layer and of those that
DeepStack taps.

Patches are ordered so that the four that a merger joins lie side by side: rows and columns of
merged tokens first, then rows and columns within one. Layers are stacked and scanned.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.mesh import placement
from worldr1_jax.models.qwen3_vl.config import Config, VisionConfig
from worldr1_jax.nn import layers, rotary
from worldr1_jax.nn.attention import Implementation, attention, for_frames

EPS = 1e-6  # of every LayerNorm
ROPE_BASE = 10000.0
INIT = layers.normal(0.02)


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function, as the mergers have it; the layers' is the tanh form."""
    return jax.nn.gelu(x, approximate=False)


class VisionBlocks(nnx.Module):
    """Self-attention within an image, then an MLP; `stack` of them."""

    def __init__(
        self, config: VisionConfig, *, rngs: nnx.Rngs, stack: layers.Stack, param_dtype: Any
    ):
        d, hidden = config.hidden_size, config.intermediate_size
        kwargs: dict[str, Any] = {
            "rngs": rngs, "stack": stack, "param_dtype": param_dtype, "init": INIT,
        }  # fmt: skip
        self.heads = config.num_heads
        self.norm1 = layers.LayerNorm(d, eps=EPS, affine=True, stack=stack)
        self.qkv = layers.Linear(d, 3 * d, **kwargs)
        self.proj = layers.Linear(d, d, **kwargs)
        self.norm2 = layers.LayerNorm(d, eps=EPS, affine=True, stack=stack)
        self.mlp = layers.Mlp((d, hidden, d), jax.nn.gelu, **kwargs)

    def __call__(
        self,
        x: Float[Array, "S P d"],
        rope: tuple[Array, Array],
        dtype: Any,
        implementation: Implementation,
    ) -> Float[Array, "S P d"]:
        """One layer (the stack axis has been scanned away) on the float32 residual stream."""
        qkv = self.qkv(self.norm1(x).astype(dtype))
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = (
            placement.constrain(qkv[:, :, i], "sequences", None, "heads", None) for i in range(3)
        )
        q, k = (rotary.rotate_halves(y, *rope).astype(dtype) for y in (q, k))
        out = attention(q, k, v, implementation=implementation)
        x = x + self.proj(out.reshape(x.shape)).astype(jnp.float32)
        x = x + self.mlp(self.norm2(x).astype(dtype)).astype(jnp.float32)
        return placement.constrain(x, "sequences", None, "features")


class Merger(nnx.Module):
    """Joins the patches of a token and maps them to the decoder's width; the norm is over each
    patch, or (`joined`) over all of them at once, as DeepStack's mergers have it."""

    def __init__(self, config: Config, *, joined: bool, rngs: nnx.Rngs, param_dtype: Any):
        width = config.vision.hidden_size
        self.wide = width * config.vision.spatial_merge_size**2
        self.norm = layers.LayerNorm(self.wide if joined else width, eps=EPS, affine=True)
        self.joined = joined
        features = (self.wide, self.wide, config.text.hidden_size)
        kwargs: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "init": INIT}
        self.mlp = layers.Mlp(features, exact_gelu, **kwargs)

    def __call__(self, x: Float[Array, "S P d"], dtype: Any) -> Float[Array, "S n D"]:
        """Returns float32."""
        if not self.joined:
            x = self.norm(x)
        x = x.reshape(x.shape[0], -1, self.wide)
        if self.joined:
            x = self.norm(x)
        return self.mlp(x.astype(dtype)).astype(jnp.float32)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel. Leaves: kernel [t p p 3 d], bias [d]."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        shape = (config.temporal_patch_size, config.patch_size, config.patch_size, 3)
        self.kernel = nnx.Param(INIT(rngs.params(), (*shape, config.hidden_size), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size))

    def __call__(self, patches: Float[Array, "S P k"], dtype: Any) -> Float[Array, "S P d"]:
        """Returns float32. An image is shown at every time of a patch, so that their kernels add
        up to one."""
        kernel = self.kernel[...].sum(0)
        kernel = kernel.reshape(-1, kernel.shape[-1]).astype(dtype)
        return (patches.astype(dtype) @ kernel).astype(jnp.float32) + self.bias[...]


class VisionTower(nnx.Module):
    """Prepared images -> what the decoder reads in place of their tokens, and DeepStack's part."""

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        *,
        dtype: Any,
        param_dtype: Any,
        remat: str,
        implementation: Implementation,
    ):
        vision = config.vision
        self.config, self.dtype, self.remat = vision, dtype, remat
        self.implementation = implementation
        self.patch_embedding = PatchEmbedding(vision, rngs=rngs)
        table = (vision.num_position_embeddings, vision.hidden_size)
        self.pos_embed = nnx.Param(INIT(rngs.params(), table, jnp.float32))
        self.blocks = VisionBlocks(
            vision, rngs=rngs, stack=(vision.depth,), param_dtype=param_dtype
        )
        kwargs: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        self.merger = Merger(config, joined=False, **kwargs)
        count = len(vision.deepstack_visual_indexes)
        self.taps = nnx.List([Merger(config, joined=True, **kwargs) for _ in range(count)])

    def __call__(
        self, images: Float[Array, "S h w 3"]
    ) -> tuple[Float[Array, "S n D"], Float[Array, "T S n D"]]:
        """Features of each image's n tokens, row by row, in float32: of the last layer, and of the
        T layers that DeepStack taps.

        Args:
          images: in [-1, 1], sides multiples of `config.side` (images.prepare).
        """
        config = self.config
        grid = (images.shape[1] // config.patch_size, images.shape[2] // config.patch_size)
        rope = rope_tables(config, grid)
        x = self.patch_embedding(patchify(config, images), self.dtype) + self._positions(grid)
        x = placement.constrain(x, "sequences", None, "features")
        implementation = for_frames(self.implementation)
        # Slot k is written by every layer up to tap k and after tap k - 1: the last one stays. Only
        # what a layer made is written, and no other layer's output is kept.
        count = len(config.deepstack_visual_indexes)
        slots = jnp.asarray(np.searchsorted(config.deepstack_visual_indexes, range(config.depth)))
        taps = jnp.zeros((count + 1, *x.shape), x.dtype)

        def layer(
            block: VisionBlocks, carry: tuple[Array, Array, Array]
        ) -> tuple[Array, Array, Array]:
            x, taps, i = carry
            x = block(x, rope, self.dtype, implementation)
            return x, jax.lax.dynamic_update_index_in_dim(taps, x, slots[i], 0), i + 1

        start = (x, taps, jnp.zeros((), jnp.int32))
        x, taps, _ = layers.scan_layers(self.blocks, start, layer, remat=self.remat)
        deep = [merge(tap, self.dtype) for merge, tap in zip(self.taps, taps[:count], strict=True)]
        return self.merger(x, self.dtype), jnp.stack(deep)

    def _positions(self, grid: tuple[int, int]) -> Float[Array, "P d"]:
        """The square table, resampled to the grid of patches."""
        side = math.isqrt(self.config.num_position_embeddings)
        table = self.pos_embed[...].reshape(side, side, -1)
        rows, columns = (linear_matrix(side, n) for n in grid)
        table = jnp.einsum("yi,xj,ijd->yxd", rows, columns, table, precision="highest")
        return _merge_order(self.config, table[None])[0].reshape(-1, table.shape[-1])


def patchify(config: VisionConfig, images: Float[Array, "S h w 3"]) -> Float[Array, "S P k"]:
    """Pixels of each patch (row, column, channel), patches in the tower's order."""
    count, height, width, _ = images.shape
    p = config.patch_size
    x = images.reshape(count, height // p, p, width // p, p, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(*x.shape[:3], -1)
    return _merge_order(config, x).reshape(count, -1, x.shape[-1])


def _merge_order(config: VisionConfig, x: Any) -> Any:
    """[S y x d] -> [S y/m x/m m m d]: patches of one merged token side by side."""
    m = config.spatial_merge_size
    x = x.reshape(x.shape[0], x.shape[1] // m, m, x.shape[2] // m, m, x.shape[3])
    return x.transpose(0, 1, 3, 2, 4, 5)


def linear_matrix(source: int, target: int) -> np.ndarray:
    """[target source] weights of linear resampling whose ends fall on the ends (align_corners)."""
    place = np.linspace(0, source - 1, target)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(source)), 0).astype(np.float32)


def rope_tables(
    config: VisionConfig, grid: tuple[int, int]
) -> tuple[Float[Array, "P 1 c"], Float[Array, "P 1 c"]]:
    """cos and sin for `rotary.rotate_halves`: the first half of the angles is the patch's row times
    the frequencies, the other its column."""
    half = config.hidden_size // config.num_heads // 2
    frequencies = ROPE_BASE ** (-np.arange(0, half, 2) / half)
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1)
    angles = _merge_order(config, (places[..., None] * frequencies).reshape(1, *grid, half))
    cos, sin = (turn(angles).astype(np.float32) for turn in (np.cos, np.sin))
    return jnp.asarray(cos.reshape(-1, 1, half)), jnp.asarray(sin.reshape(-1, 1, half))
