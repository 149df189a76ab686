"""Depth Anything 3 backbone: a DINOv2 transformer whose later layers also look across frames.

Before `alt_start` every layer attends within a frame. From there on, odd layers attend over all
frames and even ones within a frame; queries and keys are normalised and rotated (2D RoPE), and the
class token becomes a camera token. Facts from ByteDance-Seed/Depth-Anything-3 (depth_anything_3
0.1.1).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from worldr1_jax.models.attention import Implementation, attention

BLOCK_EPS = 1e-6
NORM_EPS = 1e-5  # the final norm and those of queries and keys
ROPE_BASE = 100.0
MIN_FRAMES_FOR_REFERENCE = 3  # with fewer frames the first one is the reference
STRATEGIES = ("first", "middle", "saddle_balanced")
# name -> embed_dim, depth, num_heads, ffn, as published
VIT_SIZES: dict[str, tuple[int, int, int, str]] = {
    "vits": (384, 12, 6, "mlp"),
    "vitb": (768, 12, 12, "mlp"),
    "vitl": (1024, 24, 16, "mlp"),
    "vitg": (1536, 40, 24, "swiglu"),
}


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Shape of the transformer. `name` is a published size, or any other with its own fields."""

    name: str = "vitg"
    out_layers: tuple[int, ...] = (19, 27, 33, 39)  # layers whose outputs the heads read
    alt_start: int = 13  # first layer of the alternation; -1: never
    qknorm_start: int = 13
    rope_start: int = 13
    cat_token: bool = True  # taps are [last local output, this output] side by side
    patch_size: int = 14
    img_size: int = 518  # side for which the position table is stored
    embed_dim: int = 1536
    depth: int = 40
    num_heads: int = 24
    ffn: str = "swiglu"  # "swiglu" | "mlp"
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads or (self.embed_dim // self.num_heads) % 4:
            raise ValueError(
                f"embed_dim {self.embed_dim} over num_heads {self.num_heads} "
                "has to be a multiple of 4"
            )
        if self.ffn not in ("swiglu", "mlp"):
            raise ValueError(f"ffn is '{self.ffn}'; it has to be 'swiglu' or 'mlp'")
        if len(set(self.out_layers)) != 4 or max(self.out_layers) >= self.depth:
            raise ValueError(
                f"out_layers {self.out_layers} have to be 4 layers, each below {self.depth}"
            )

    @property
    def feature_dim(self) -> int:
        """Channels of a tap."""
        return self.embed_dim * (2 if self.cat_token else 1)

    @property
    def hidden_dim(self) -> int:
        """Feed-forward width; SwiGLU takes two thirds of it, rounded up to a multiple of 8."""
        hidden = int(self.embed_dim * self.mlp_ratio)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.ffn == "swiglu" else hidden


class Attention(nnx.Module):
    """Multi-head self-attention with optional query/key normalisation and rotation."""

    def __init__(self, config: BackboneConfig, qk_norm: bool, dtype: Any, rngs: nnx.Rngs):
        dim, self.num_heads = config.embed_dim, config.num_heads
        head_dim = dim // self.num_heads
        self.qkv = nnx.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = nnx.LayerNorm(head_dim, epsilon=NORM_EPS, dtype=jnp.float32, rngs=rngs)
            self.k_norm = nnx.LayerNorm(head_dim, epsilon=NORM_EPS, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x: Array, rotation: tuple[Array, Array] | None, implementation: Implementation
    ) -> Array:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        out = attention(q.astype(v.dtype), k.astype(v.dtype), v, implementation=implementation)
        return self.proj(out.reshape(batch, tokens, dim))


class FeedForward(nnx.Module):
    """GELU or SwiGLU feed-forward; the leaves carry the publisher's names."""

    def __init__(self, config: BackboneConfig, dtype: Any, rngs: nnx.Rngs):
        dim, hidden = config.embed_dim, config.hidden_dim
        self.gated = config.ffn == "swiglu"
        if self.gated:
            self.w12 = nnx.Linear(dim, 2 * hidden, dtype=dtype, rngs=rngs)
            self.w3 = nnx.Linear(hidden, dim, dtype=dtype, rngs=rngs)
        else:
            self.fc1 = nnx.Linear(dim, hidden, dtype=dtype, rngs=rngs)
            self.fc2 = nnx.Linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        if not self.gated:
            return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
        gate, value = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(jax.nn.silu(gate) * value)


class Block(nnx.Module):
    """Pre-norm transformer layer with LayerScale; the residual stream stays float32."""

    def __init__(self, config: BackboneConfig, qk_norm: bool, dtype: Any, rngs: nnx.Rngs):
        dim = config.embed_dim
        self.norm1 = nnx.LayerNorm(dim, epsilon=BLOCK_EPS, dtype=jnp.float32, rngs=rngs)
        self.attn = Attention(config, qk_norm, dtype, rngs)
        self.ls1 = nnx.Param(jnp.ones((dim,)))
        self.norm2 = nnx.LayerNorm(dim, epsilon=BLOCK_EPS, dtype=jnp.float32, rngs=rngs)
        self.mlp = FeedForward(config, dtype, rngs)
        self.ls2 = nnx.Param(jnp.ones((dim,)))

    def __call__(
        self, x: Array, rotation: tuple[Array, Array] | None, implementation: Implementation
    ) -> Array:
        x = x + self.attn(self.norm1(x), rotation, implementation) * self.ls1[...]
        return x + self.mlp(self.norm2(x)) * self.ls2[...]


class Backbone(nnx.Module):
    """Normalised images -> four taps of patch tokens and four of camera tokens."""

    def __init__(self, config: BackboneConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        dim, patch, grid = config.embed_dim, config.patch_size, config.img_size // config.patch_size
        self.patch_embed = nnx.Conv(
            3, dim, (patch, patch), strides=(patch, patch), padding="VALID", dtype=dtype, rngs=rngs
        )
        normal = nnx.initializers.normal(0.02)
        self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, dim)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (1, grid * grid + 1, dim)))
        if config.alt_start >= 0:
            self.camera_token = nnx.Param(normal(rngs.params(), (1, 2, dim)))
        self.blocks = nnx.List(
            [Block(config, 0 <= config.qknorm_start <= i, dtype, rngs) for i in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(dim, epsilon=NORM_EPS, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "B F H W 3"],
        *,
        strategy: str = "saddle_balanced",
        implementation: Implementation = "xla",
    ) -> list[tuple[Float[Array, "B F N D"], Float[Array, "B F D"]]]:
        """Four taps (patch tokens, camera token), frames in the order given.

        Args:
          images: ImageNet-normalised; H and W multiples of the patch size.
          strategy: how the reference frame is chosen when there are 3 or more: "first", "middle",
            "saddle_balanced".
          implementation: of `models.attention`; within frames it sees B*F sequences, across them B
            long ones.

        Raises:
          ValueError: a size that is no multiple of the patch size, or an unknown strategy.
        """
        config = self.config
        if strategy not in STRATEGIES:
            raise ValueError(
                f"reference strategy '{strategy}' is unknown; use one of {', '.join(STRATEGIES)}"
            )
        batch, frames = images.shape[:2]
        x, grid = self._embed(images)
        local_rotation, global_rotation = self._rotations(grid, frames, jnp.float32)
        local, order, taps = x, None, []
        for i, block in enumerate(self.blocks):
            alternating = 0 <= config.alt_start <= i
            if (
                i == config.alt_start - 1
                and frames >= MIN_FRAMES_FOR_REFERENCE
                and strategy != "first"
            ):
                order = reference_order(x[:, :, 0], strategy)
                x, local = reorder(x, order), reorder(local, order)
            if i == config.alt_start:
                x = local = self._with_camera_token(x)
            rotated = 0 <= config.rope_start <= i
            if alternating and i % 2 == 1:
                flat = x.reshape(batch, -1, x.shape[-1])
                x = block(flat, global_rotation if rotated else None, implementation).reshape(
                    x.shape
                )
            else:
                flat = x.reshape(batch * frames, -1, x.shape[-1])
                x = block(flat, local_rotation if rotated else None, implementation).reshape(
                    x.shape
                )
                local = x
            if i in config.out_layers:
                taps.append(self._tap(local, x, order))
        return taps

    def _embed(self, images: Array) -> tuple[Array, tuple[int, int]]:
        config, (batch, frames, height, width, _) = self.config, images.shape
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(
                f"image size {height}x{width} is not made of multiples "
                f"of the patch size {config.patch_size}"
            )
        grid = (height // config.patch_size, width // config.patch_size)
        x = self.patch_embed(images.reshape(-1, height, width, 3)).astype(jnp.float32)
        x = x.reshape(batch * frames, -1, config.embed_dim)
        cls = jnp.broadcast_to(self.cls_token[...], (batch * frames, 1, config.embed_dim))
        x = jnp.concatenate([cls, x], axis=1) + self._positions(grid)
        return x.reshape(batch, frames, -1, config.embed_dim), grid

    def _positions(self, grid: tuple[int, int]) -> Array:
        """The position table, bicubically resampled when the grid differs from the stored one."""
        table = self.pos_embed[...]
        side = self.config.img_size // self.config.patch_size
        if grid == (side, side):
            return table
        patches = table[0, 1:].reshape(side, side, -1)
        rows, columns = bicubic_matrix(side, grid[0]), bicubic_matrix(side, grid[1])
        patches = jnp.einsum("yi,xj,ijd->yxd", rows, columns, patches)
        return jnp.concatenate([table[:, :1], patches.reshape(1, -1, table.shape[-1])], axis=1)

    def _rotations(self, grid: tuple[int, int], frames: int, dtype: Any) -> tuple[Any, Any]:
        """RoPE tables within a frame, and across frames, where every patch is at (1, 1)."""
        ys, xs = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
        patches = np.stack([ys, xs], axis=-1).reshape(-1, 2) + 1
        camera = np.zeros((1, 2), patches.dtype)
        head_dim = self.config.embed_dim // self.config.num_heads
        across = np.tile(np.concatenate([camera, np.ones_like(patches)]), (frames, 1))
        within = np.concatenate([camera, patches])
        return rope_tables(within, head_dim, dtype), rope_tables(across, head_dim, dtype)

    def _with_camera_token(self, x: Array) -> Array:
        token = self.camera_token[...]
        batch, frames, _, dim = x.shape
        others = jnp.broadcast_to(token[:, 1:], (batch, frames - 1, dim))
        tokens = jnp.concatenate([jnp.broadcast_to(token[:, :1], (batch, 1, dim)), others], axis=1)
        return x.at[:, :, 0].set(tokens)

    def _tap(self, local: Array, x: Array, order: Array | None) -> tuple[Array, Array]:
        camera = (
            jnp.concatenate([local[:, :, 0], x[:, :, 0]], axis=-1)
            if self.config.cat_token
            else x[:, :, 0]
        )
        patches = self.norm(x[:, :, 1:])  # only the half of the latest layer is normalised
        if self.config.cat_token:
            patches = jnp.concatenate([local[:, :, 1:], patches], axis=-1)
        if order is None:
            return patches, camera
        back = jnp.argsort(order, axis=1)
        return reorder(patches, back), reorder(camera, back)


def reference_order(tokens: Float[Array, "B F D"], strategy: str) -> Int[Array, "B F"]:
    """Frame order with the reference frame first and the others as they were.

    "saddle_balanced" takes the frame whose similarity to the others, norm and variance of its class
    token, each scaled to [0, 1] over the frames, are together closest to the middle.
    """
    batch, frames, _ = tokens.shape
    if strategy == "first":
        chosen = jnp.zeros((batch,), jnp.int32)
    elif strategy == "middle":
        chosen = jnp.full((batch,), frames // 2, jnp.int32)
    else:
        norm = jnp.linalg.norm(tokens, axis=-1)
        unit = tokens / norm[..., None]
        similarity = jnp.einsum("bfd,bgd->bfg", unit, unit, precision=jax.lax.Precision.HIGHEST)
        similarity = (similarity.sum(-1) - 1) / (frames - 1)
        metrics = jnp.stack([similarity, norm, jnp.var(unit, axis=-1, ddof=1)])
        low, high = metrics.min(-1, keepdims=True), metrics.max(-1, keepdims=True)
        scaled = (metrics - low) / (high - low + 1e-8)
        chosen = jnp.argmin(jnp.abs(scaled - 0.5).sum(0), axis=1)
    index = jnp.arange(frames)[None]
    shifted = jnp.where(index <= chosen[:, None], index - 1, index)
    return jnp.where(index == 0, chosen[:, None], shifted)


def reorder(x: Float[Array, "B F ..."], order: Int[Array, "B F"]) -> Float[Array, "B F ..."]:
    """Frames of each video in the given order."""
    return jax.vmap(lambda video, index: video[index])(x, order)


def rope_tables(positions: np.ndarray, head_dim: int, dtype: Any) -> tuple[Array, Array]:
    """cos and sin [N 1 head_dim]: half of the channels turns with y, the other half with x."""
    half = head_dim // 2
    frequency = ROPE_BASE ** -(np.arange(0, half, 2, dtype=np.float32) / half)
    angles = positions[:, :, None].astype(np.float32) * frequency  # [N 2 half/2]
    angles = np.concatenate([angles, angles], axis=-1).reshape(len(positions), 1, head_dim)
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def rotate(x: Float[Array, "B N H D"], cos: Array, sin: Array) -> Float[Array, "B N H D"]:
    """Applies RoPE; within each of the two halves, channel c turns against channel c + D/4."""
    a, b, c, d = jnp.split(x, 4, axis=-1)
    return x * cos + jnp.concatenate([-b, a, -d, c], axis=-1) * sin


def bicubic_matrix(source: int, target: int, offset: float = 0.1) -> np.ndarray:
    """[target source] weights of DINOv2's bicubic resampling (a = -0.75, edges repeated).

    The scale is (target + 0.1) / source, as published: the pretrained tables are used with that
    shift.
    """
    scale = (target + offset) / source
    centre = (np.arange(target) + 0.5) / scale - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((target, source), np.float64)
    a = -0.75
    for tap in range(-1, 3):
        t = np.abs(centre - (first + tap))
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        index = np.clip(first + tap, 0, source - 1)
        np.add.at(weights, (np.arange(target), index), np.where(t <= 1, near, far))
    return weights.astype(np.float32)
