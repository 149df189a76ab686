"""Depth Anything 3 backbone: a DINOv2 transformer whose later layers also look across frames.

Before `alt_start` every layer attends within a frame. From there on, odd layers attend over all
frames and even ones within a frame; queries and keys are normalised and rotated (2D RoPE), and the
class token becomes a camera token. Facts from ByteDance-Seed/Depth-Anything-3 (depth_anything_3
0.1.1).

On a mesh videos lie over data and fsdp and their frames over context, padded at the end to a
multiple of it: layers within a frame then exchange nothing, and layers across frames exchange as
attention_context.py says, without a matrix of scores where the implementation holds none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import current
from worldr1_jax.nn.attention import (
    Implementation,
    attention,
    build,
    for_frames,
    for_long_sequences,
)
from worldr1_jax.nn.attention_context import Sharded

BLOCK_EPS = 1e-6
NORM_EPS = 1e-5  # the final norm and those of queries and keys
ROPE_BASE = 100.0
MIN_FRAMES_FOR_REFERENCE = 3  # with fewer frames the first one is the reference
STRATEGIES = ("first", "middle", "saddle_balanced", "saddle_sim_range")
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


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a layer is told beside its input.

    Attributes:
      across: attend over all frames of a video, and not within each.
      rotation: RoPE's cos and sin [N 1 head_dim], the same in every frame; None for none.
      implementation: of attention, for sequences of this kind.
      length: tokens of a video that are real, when there are more; only across frames.
    """

    across: bool
    rotation: tuple[Array, Array] | None
    implementation: Implementation
    length: int | None


def _both(dtype: Any) -> dict[str, Any]:
    """Products in this dtype, of weights that rest in it: they would be rounded to it anyway."""
    return {"dtype": dtype, "param_dtype": dtype}


class Attention(nnx.Module):
    """Multi-head self-attention with optional query/key normalisation and rotation."""

    def __init__(self, config: BackboneConfig, qk_norm: bool, dtype: Any, rngs: nnx.Rngs):
        dim, self.num_heads = config.embed_dim, config.num_heads
        head_dim = dim // self.num_heads
        self.qkv = nnx.Linear(dim, 3 * dim, **_both(dtype), rngs=rngs)
        self.proj = nnx.Linear(dim, dim, **_both(dtype), rngs=rngs)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = nnx.LayerNorm(head_dim, epsilon=NORM_EPS, dtype=jnp.float32, rngs=rngs)
            self.k_norm = nnx.LayerNorm(head_dim, epsilon=NORM_EPS, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, "B F N D"], how: Layer) -> Float[Array, "B F N D"]:
        batch, frames, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(*x.shape[:3], 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if how.rotation is not None:
            q, k = rotate(q, *how.rotation), rotate(k, *how.rotation)
        sequences = (batch, frames * tokens) if how.across else (batch * frames, tokens)
        q, k, v = (y.astype(v.dtype).reshape(*sequences, *y.shape[3:]) for y in (q, k, v))
        length = how.length if how.across else None
        out = attention(q, k, v, length=length, implementation=how.implementation)
        return self.proj(out.reshape(x.shape))


class FeedForward(nnx.Module):
    """GELU or SwiGLU feed-forward; the leaves carry the publisher's names."""

    def __init__(self, config: BackboneConfig, dtype: Any, rngs: nnx.Rngs):
        dim, hidden = config.embed_dim, config.hidden_dim
        self.gated = config.ffn == "swiglu"
        if self.gated:
            self.w12 = nnx.Linear(dim, 2 * hidden, **_both(dtype), rngs=rngs)
            self.w3 = nnx.Linear(hidden, dim, **_both(dtype), rngs=rngs)
        else:
            self.fc1 = nnx.Linear(dim, hidden, **_both(dtype), rngs=rngs)
            self.fc2 = nnx.Linear(hidden, dim, **_both(dtype), rngs=rngs)

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

    def __call__(self, x: Float[Array, "B F N D"], how: Layer) -> Float[Array, "B F N D"]:
        x = x + self.attn(self.norm1(x), how) * self.ls1[...]
        x = x + self.mlp(self.norm2(x)) * self.ls2[...]
        return sharding.constrain(x, "videos", "frames", None, "features")


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
        """Four taps (patch tokens, camera token), frames in the order given; see `padded_frames`.

        Args:
          images: ImageNet-normalised; H and W multiples of the patch size.
          strategy: how the reference frame is chosen when there are 3 or more; see
            `reference_frame`.
          implementation: of `nn.attention`; within frames it sees B*F sequences, across them B
            long ones. With one that does not hold the scores, call it under `jax.set_mesh`.

        Raises:
          ValueError: a size that is no multiple of the patch size, or an unknown strategy.
        """
        config = self.config
        if strategy not in STRATEGIES:
            raise ValueError(
                f"reference strategy '{strategy}' is unknown; use one of {', '.join(STRATEGIES)}"
            )
        frames = images.shape[1]
        reference = jnp.zeros(images.shape[:1], jnp.int32)
        tokens = 1 + images.shape[2] // config.patch_size * (images.shape[3] // config.patch_size)
        if isinstance(implementation, str):
            implementation = build(implementation, keys=frames * tokens)
        x, grid = self._embed(pad_frames(images, padded_frames(frames, implementation)))
        within, across = self._kinds(grid, frames, implementation)
        local, taps = x, []
        for i, block in enumerate(self.blocks):
            chosen = frames >= MIN_FRAMES_FOR_REFERENCE and i == config.alt_start - 1
            if chosen and strategy != "first":
                reference = reference_frame(x[:, :frames, 0], strategy)
            if i == config.alt_start:
                x = local = self._with_camera_token(x, reference)
            how = across if 0 <= config.alt_start <= i and i % 2 == 1 else within
            if not 0 <= config.rope_start <= i:
                how = dataclasses.replace(how, rotation=None)
            x = block(x, how)
            local = x if not how.across else local
            if i in config.out_layers:
                taps.append(self._tap(local, x))
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
        patches = jnp.einsum("yi,xj,ijd->yxd", rows, columns, patches, precision="highest")
        return jnp.concatenate([table[:, :1], patches.reshape(1, -1, table.shape[-1])], axis=1)

    def _kinds(
        self, grid: tuple[int, int], frames: int, implementation: Implementation
    ) -> tuple[Layer, Layer]:
        """Layers within a frame and across frames: where every patch is at (1, 1)."""
        heads, tokens = self.config.num_heads, 1 + grid[0] * grid[1]
        ys, xs = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
        patches = np.stack([ys, xs], axis=-1).reshape(-1, 2) + 1
        camera = np.zeros((1, 2), patches.dtype)
        own, same = (np.concatenate([camera, p]) for p in (patches, np.ones_like(patches)))
        tables = [rope_tables(p, self.config.embed_dim // heads, jnp.float32) for p in (own, same)]
        all_frames = padded_frames(frames, implementation)
        long = for_long_sequences(implementation, all_frames * tokens, heads)
        length = frames * tokens if all_frames > frames else None
        return (
            Layer(False, tables[0], for_frames(implementation), None),
            Layer(True, tables[1], long, length),
        )

    def _with_camera_token(self, x: Array, reference: Int[Array, " B"]) -> Array:
        """The first camera token for the reference frame, the second one for all others.

        A departure: the published code moves the reference frame to the front and back again. No
        layer tells frames apart by anything else than this token, so that the order does not
        matter, and no frame leaves its device.
        """
        token = self.camera_token[...]
        chosen = jnp.arange(x.shape[1]) == reference[:, None]
        return x.at[:, :, 0].set(jnp.where(chosen[..., None], token[:, :1], token[:, 1:]))

    def _tap(self, local: Array, x: Array) -> tuple[Array, Array]:
        patches = self.norm(x[:, :, 1:])  # only the half of the latest layer is normalised
        if not self.config.cat_token:
            return patches, x[:, :, 0]
        camera = jnp.concatenate([local[:, :, 0], x[:, :, 0]], axis=-1)
        return jnp.concatenate([local[:, :, 1:], patches], axis=-1), camera


def padded_frames(frames: int, implementation: Implementation) -> int:
    """How many frames the taps have: a multiple of the mesh's context axis where the implementation
    divides tokens over it. Those behind the real ones are nobody's."""
    mesh = current()
    if mesh is None or not isinstance(implementation, Sharded):
        return frames
    return -(-frames // mesh.shape["context"]) * mesh.shape["context"]


def pad_frames(images: Float[Array, "B F H W 3"], count: int) -> Float[Array, "B G H W 3"]:
    """Grey frames behind the real ones, `count` with them, and every frame on its device."""
    behind = (0, count - images.shape[1])
    images = jnp.pad(images, ((0, 0), behind, (0, 0), (0, 0), (0, 0)))
    return sharding.constrain(images, "videos", "frames", None, None, None)


def reference_frame(tokens: Float[Array, "B F D"], strategy: str) -> Int[Array, " B"]:
    """Which frame's camera the others are seen from, by their class tokens; F is 2 or more.

    "saddle_balanced" takes the frame whose similarity to the others, norm and variance of its class
    token, each scaled to [0, 1] over the frames, are together closest to the middle;
    "saddle_sim_range" the one whose similarities to the others spread most.
    """
    batch, frames, _ = tokens.shape
    if strategy == "first":
        return jnp.zeros((batch,), jnp.int32)
    if strategy == "middle":
        return jnp.full((batch,), frames // 2, jnp.int32)
    norm = jnp.linalg.norm(tokens, axis=-1)
    unit = tokens / norm[..., None]
    similarity = jnp.einsum("bfd,bgd->bfg", unit, unit, precision=jax.lax.Precision.HIGHEST)
    if strategy == "saddle_sim_range":
        others = similarity - jnp.eye(frames)  # as published: its own counts, as 0
        return jnp.argmax(others.max(-1) - others.min(-1), axis=1).astype(jnp.int32)
    similarity = (similarity.sum(-1) - 1) / (frames - 1)
    metrics = jnp.stack([similarity, norm, jnp.var(unit, axis=-1, ddof=1)])
    low, high = metrics.min(-1, keepdims=True), metrics.max(-1, keepdims=True)
    scaled = (metrics - low) / (high - low + 1e-8)
    return jnp.argmin(jnp.abs(scaled - 0.5).sum(0), axis=1).astype(jnp.int32)


def rope_tables(positions: np.ndarray, head_dim: int, dtype: Any) -> tuple[Array, Array]:
    """cos and sin [N 1 head_dim]: half of the channels turns with y, the other half with x."""
    half = head_dim // 2
    frequency = ROPE_BASE ** -(np.arange(0, half, 2, dtype=np.float32) / half)
    angles = positions[:, :, None].astype(np.float32) * frequency  # [N 2 half/2]
    angles = np.concatenate([angles, angles], axis=-1).reshape(len(positions), 1, head_dim)
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def rotate(x: Float[Array, "*b N H D"], cos: Array, sin: Array) -> Float[Array, "*b N H D"]:
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
