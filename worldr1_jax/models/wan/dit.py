"""Wan2.1 text-to-video diffusion transformer (DiT): noisy latents, time and text to a velocity.

Parameters and file names follow diffusers' WanTransformer3DModel; the files of Wan-Video's own
release are read as well. The L blocks are stacked on the leading axis of their leaves and scanned.
Norms, time embedding, modulation, RoPE and softmax compute in float32; matmuls and the
residual stream run in the module's `dtype`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.placement import COLUMN, ROW, SMALL, SPLIT, Rules, placer
from worldr1_jax.models.wan import names as wan_dit_names
from worldr1_jax.models.wan.config import Config
from worldr1_jax.nn import layers, rotary
from worldr1_jax.nn.attention import (
    Implementation,
    attention,
    for_mesh,
    for_short_keys,
    laid_out,
    padded,
)
from worldr1_jax.weights import convert

# Where the leaves live (mesh/placement.py): weights, and adapters that follow their kernels.
PLACES: Rules = (
    (r"blocks\.attn[12]\.to_[qkv]\.kernel", (None, *COLUMN)),
    (r"blocks\.attn[12]\.to_out\.kernel", (None, *ROW)),
    (r"blocks\.ffn\.linear_1\.kernel", (None, *COLUMN)),
    (r"blocks\.ffn\.linear_2\.kernel", (None, *ROW)),
    (r"(text_embedder|time_embedder)\.linear_[12]\.kernel", (SPLIT, None)),
    (r"time_proj\.kernel", (SPLIT, None)),
    (r"proj_out\.kernel", (SPLIT, None)),
    (r"patch_embedding\.kernel", ()),
    (SMALL, ()),
)
ADAPTER_PLACES: Rules = (
    (r"blocks\.attn[12]\.to_[qkv]\.lora_a", (None, SPLIT, None)),
    (r"blocks\.attn[12]\.to_[qkv]\.lora_b", (None, None, ("tensor", *SPLIT))),
    (r"blocks\.attn[12]\.to_out\.lora_a", (None, ("tensor", *SPLIT), None)),
    (r"blocks\.attn[12]\.to_out\.lora_b", (None, None, SPLIT)),
)


class WanAttention(nnx.Module):
    """Multi-head attention with RMSNorm of queries and keys over all heads at once."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, stack: layers.Stack, param_dtype: Any):
        dim = config.dim
        kwargs = {"rngs": rngs, "stack": stack, "param_dtype": param_dtype}
        self.heads = config.num_attention_heads
        self.to_q = layers.Linear(dim, dim, **kwargs)
        self.to_k = layers.Linear(dim, dim, **kwargs)
        self.to_v = layers.Linear(dim, dim, **kwargs)
        self.to_out = layers.Linear(dim, dim, **kwargs)
        self.norm_q = layers.RMSNorm(dim, eps=config.eps, stack=stack)
        self.norm_k = layers.RMSNorm(dim, eps=config.eps, stack=stack)

    def __call__(
        self,
        x: Float[Array, "B N d"],
        context: Float[Array, "B M d"],
        rope: tuple[jax.Array, jax.Array] | None,
        *,
        implementation: Implementation,
        adapters: bool,
        length: int,
    ) -> Float[Array, "B N d"]:
        """Queries from x, keys and values from context, whose first `length` rows are real; `rope`
        turns queries and keys."""
        # A TPU would transpose between a product and its heads, so that there each makes, or takes,
        # them itself; a CPU is slower at products of more axes, and reshapes for nothing.
        on_cpu, long = isinstance(implementation, str), context is x
        axes, heads = (1, 0) if on_cpu else (2, self.heads)
        q = self._place(self.to_q(x, adapters, heads=heads), True, implementation)
        k, v = (
            self._place(to(context, adapters, heads=heads), long, implementation)
            for to in (self.to_k, self.to_v)
        )
        # Rounded to the module's dtype before they turn: no float32 copy of them leaves a fusion.
        q, k = (
            self._heads(norm(y, axes=axes).astype(x.dtype))
            for norm, y in ((self.norm_q, q), (self.norm_k, k))
        )
        if rope is not None:
            turn = rotary.rotate if on_cpu else rotary.rotate_by_product
            q, k = turn(q, *rope).astype(x.dtype), turn(k, *rope).astype(x.dtype)
        real = length if length < context.shape[1] else None
        out = attention(q, k, self._heads(v), length=real, implementation=implementation)
        return self.to_out(out.reshape(x.shape) if on_cpu else out, adapters, axes=axes)

    @staticmethod
    def _place(x: jax.Array, long: bool, implementation: Implementation) -> jax.Array:
        axes = ("videos", "tokens" if long else "text", "heads", None)[: x.ndim]
        return laid_out(sharding.constrain(x, *axes), (0, 2, 1, 3)[: x.ndim], axes, implementation)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1)


class WanBlocks(nnx.Module):
    """Self-attention, cross-attention to the text and MLP; `stack` of them in one module."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, stack: layers.Stack, param_dtype: Any):
        dim, eps = config.dim, config.eps
        kwargs = {"rngs": rngs, "stack": stack, "param_dtype": param_dtype}
        self.norm1 = layers.LayerNorm(dim, eps=eps, affine=False)
        self.attn1 = WanAttention(config, **kwargs)
        affine = layers.LayerNorm(dim, eps=eps, affine=True, stack=stack)
        self.norm2 = nnx.data(affine if config.cross_attn_norm else None)
        self.attn2 = WanAttention(config, **kwargs)
        self.norm3 = layers.LayerNorm(dim, eps=eps, affine=False)
        self.ffn = layers.Mlp((dim, config.ffn_dim, dim), jax.nn.gelu, **kwargs)
        table = layers.normal(dim**-0.5)(rngs.params(), (*stack, 1, 6, dim), jnp.float32)
        self.scale_shift_table = nnx.Param(table)

    def __call__(
        self,
        x: Float[Array, "B N d"],
        text: Float[Array, "B M d"],
        modulation: Float[Array, "B 6 d"],
        rope: tuple[jax.Array, jax.Array],
        *,
        implementation: Implementation,
        adapters: bool,
        length: int,
    ) -> Float[Array, "B N d"]:
        """One block (the stack axis has been scanned away); tokens from `length` on are padding."""
        dtype = x.dtype
        kwargs: dict[str, Any] = {"implementation": implementation, "adapters": adapters}
        other = {**kwargs, "implementation": for_short_keys(implementation)}
        rows = jnp.split(self.scale_shift_table[...] + modulation, 6, axis=1)
        shift1, scale1, gate1, shift3, scale3, gate3 = rows
        h = (layers.times_row(self.norm1(x), 1 + scale1) + shift1).astype(dtype)
        y = self.attn1(h, h, rope, length=length, **kwargs)
        x = (x + layers.times_row(y, gate1)).astype(dtype)
        h = x if self.norm2 is None else self.norm2(x).astype(dtype)
        x = x + self.attn2(h, text, None, length=text.shape[1], **other)
        h = (layers.times_row(self.norm3(x), 1 + scale3) + shift3).astype(dtype)
        x = (x + layers.times_row(self.ffn(h), gate3)).astype(dtype)
        axes = ("videos", "tokens", "features")
        return laid_out(sharding.constrain(x, *axes), (0, 1, 2), axes, implementation)


class WanDiT(nnx.Module):
    """The denoiser.

    Args:
      config: shape of the network.
      rngs: source of the initial weights; use nnx.eval_shape around the constructor for none.
      dtype: dtype of matmuls and of the residual stream.
      param_dtype: dtype in which matmul kernels rest; all other leaves are float32.
      remat: what the backward pass recomputes: see layers.scan_layers.
      implementation: of attention (attention.attention); in cross-attention, whose 512 keys are
        few, "xla" stands for the names of other implementations.
    """

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: str = "none",
        implementation: Implementation = "xla",
    ):
        layers.check_remat(remat)
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        self.implementation = implementation
        dim, patch = config.dim, math.prod(config.patch_size)
        # The initial values are those of Wan's release: Xavier, 0.02 for time and text, and a zero
        # head, with which a fresh network answers zero.
        embed: dict[str, Any] = {"rngs": rngs, "init": layers.normal(0.02)}
        self.patch_embedding = PatchEmbedding(config, rngs=rngs)
        self.time_embedder = layers.Mlp((config.freq_dim, dim, dim), jax.nn.silu, **embed)
        self.time_proj = layers.Linear(dim, 6 * dim, rngs=rngs)
        self.text_embedder = layers.Mlp((config.text_dim, dim, dim), jax.nn.gelu, **embed)
        self.blocks = WanBlocks(
            config, rngs=rngs, stack=(config.num_layers,), param_dtype=param_dtype
        )
        self.norm_out = layers.LayerNorm(dim, eps=config.eps, affine=False)
        self.proj_out = layers.Linear(
            dim, patch * config.out_channels, rngs=rngs, init=layers.zeros
        )
        table = layers.normal(dim**-0.5)(rngs.params(), (1, 2, dim), jnp.float32)
        self.scale_shift_table = nnx.Param(table)

    def __call__(
        self,
        latents: Float[Array, "B f h w C"],
        timestep: Float[Array, " B"],
        text: Float[Array, "B N t"],
        *,
        adapters: bool = True,
    ) -> Float[Array, "B f h w c"]:
        """Velocity eps - x0 of noisy latents.

        Args:
          latents: x_sigma, normalised VAE latents.
          timestep: 1000 sigma.
          text: UMT5 embeddings, zero beyond each prompt's end, as Wan was trained. No mask: every
            row is attended to.
          adapters: False gives the base network's answer from a network with LoRA.

        Returns:
          float32, shaped like latents (with config.out_channels).

        Raises:
          ValueError: sizes that the patch size does not divide, or that do not fit the config.
        """
        grid = _check_inputs(self.config, latents, timestep, text)
        rope = rotary.tables(grid, self.config.attention_head_dim)
        with jax.default_matmul_precision("float32"):  # which TPUs would round to bfloat16
            temb = self.time_embedder(time_frequencies(timestep, self.config.freq_dim))
            modulation = self.time_proj(jax.nn.silu(temb)).reshape(temb.shape[0], 6, -1)
        text = self.text_embedder(text.astype(self.dtype))
        x = self.patch_embedding(latents.astype(self.dtype))
        tokens = x.shape[1]
        x, rope = _pad_tokens(x, rope, padded(tokens, self.implementation))
        x = sharding.constrain(x, "videos", "tokens", "features")

        def block(layer: WanBlocks, x: jax.Array) -> jax.Array:
            return layer(
                x, text, modulation, rope,
                implementation=self.implementation, adapters=adapters, length=tokens,
            )  # fmt: skip

        x = layers.scan_layers(self.blocks, x, block, remat=self.remat)[:, :tokens]
        shift, scale = jnp.split(self.scale_shift_table[...] + temb[:, None], 2, axis=1)
        x = (self.norm_out(x) * (1 + scale) + shift).astype(self.dtype)
        x = self.proj_out(x).astype(jnp.float32)
        return unpatchify(x, grid, self.config.patch_size)


def _pad_tokens(
    x: jax.Array, rope: tuple[jax.Array, jax.Array], tokens: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Zeros behind the sequence, so that it divides as the attention kernel and the mesh need."""
    more = tokens - x.shape[1]
    if not more:
        return x, rope
    cos, sin = (jnp.pad(table, ((0, more), (0, 0), (0, 0))) for table in rope)
    return jnp.pad(x, ((0, 0), (0, more), (0, 0))), (cos, sin)


class PatchEmbedding(nnx.Module):
    """Convolution whose stride is its kernel: one linear map. Leaf kernel [t h w in out]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.patch_size = config.patch_size
        patch = math.prod(config.patch_size)
        flat = layers.xavier_uniform(
            rngs.params(), (patch * config.in_channels, config.dim), jnp.float32
        )
        self.kernel = nnx.Param(flat.reshape(*config.patch_size, config.in_channels, config.dim))
        self.bias = nnx.Param(jnp.zeros(config.dim))

    def __call__(self, latents: Float[Array, "B f h w C"]) -> Float[Array, "B N d"]:
        """Tokens in the order frame, row, column; runs in latents.dtype."""
        kernel = self.kernel[...].astype(latents.dtype)
        tokens = patchify(latents, self.patch_size)
        return tokens @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...].astype(tokens.dtype)


def patchify(x: Float[Array, "B f h w C"], patch_size: tuple[int, int, int]) -> jax.Array:
    """[B f h w C] -> [B N (patch C)], tokens ordered frame, row, column."""
    batch, frames, height, width, channels = x.shape
    t, p, q = patch_size
    x = x.reshape(batch, frames // t, t, height // p, p, width // q, q, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, -1, t * p * q * channels)


def unpatchify(
    x: Float[Array, "B N p"], grid: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> Float[Array, "B f h w C"]:
    """The inverse of patchify; grid counts tokens along frames, rows and columns."""
    x = x.reshape(x.shape[0], *grid, *patch_size, -1)
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    size = [n * p for n, p in zip(grid, patch_size, strict=True)]
    return x.reshape(x.shape[0], *size, x.shape[-1])


def time_frequencies(timestep: Float[Array, " B"], features: int) -> Float[Array, "B d"]:
    """cos, then sin, of timestep x 10000^(-i / (features / 2)), in float32."""
    half = features // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / half).astype(np.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _check_inputs(
    config: Config, latents: jax.Array, timestep: jax.Array, text: jax.Array
) -> tuple[int, int, int]:
    """Tokens along frames, rows and columns; raises ValueError for shapes that do not fit."""
    if latents.ndim != 5 or latents.shape[-1] != config.in_channels:
        raise ValueError(
            f"latents have shape {list(latents.shape)}; they have to be [B, f, h, w, "
            f"{config.in_channels}]"
        )
    batch, *size, _ = latents.shape
    if any(n % p for n, p in zip(size, config.patch_size, strict=True)):
        raise ValueError(
            f"latents of {size} (frames, height, width) have to be multiples of the patch size "
            f"{list(config.patch_size)}"
        )
    if timestep.shape != (batch,):
        raise ValueError(f"timestep has shape {list(timestep.shape)}; it has to be [{batch}]")
    if text.ndim != 3 or text.shape[0] != batch or text.shape[-1] != config.text_dim:
        raise ValueError(
            f"text has shape {list(text.shape)}; it has to be [{batch}, N, {config.text_dim}]"
        )
    frames, height, width = (n // p for n, p in zip(size, config.patch_size, strict=True))
    if max(frames, height, width) > config.rope_max_seq_len:
        raise ValueError(
            f"latents of {size} make more than rope_max_seq_len = {config.rope_max_seq_len} tokens "
            "along one axis"
        )
    return frames, height, width


def table(config: Config, layout: str = "diffusers") -> convert.Table:
    """Rows for convert.load and convert.save; layout is "diffusers" or "wan" (Wan-Video's own)."""
    column = {"diffusers": 1, "wan": 2}[layout]
    rows = [("patch_embedding.weight", "patch_embedding.kernel", "conv3d")]
    for names in wan_dit_names.LINEARS:
        rows.append((f"{names[column]}.weight", f"{names[0]}.kernel", "linear"))
        rows.append((f"{names[column]}.bias", f"{names[0]}.bias", "copy"))
    copies = wan_dit_names.COPIES + (wan_dit_names.CROSS_NORM if config.cross_attn_norm else ())
    rows.extend((names[column], names[0], "copy") for names in copies)
    return tuple(rows)


def load(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    remat: str = "none",
    implementation: Implementation | None = None,
) -> WanDiT:
    """Reads a folder with config.json and safetensors, of diffusers or of Wan-Video's own release.

    Args:
      path: the folder, e.g. Wan2.1-T2V-1.3B-Diffusers/transformer.
      dtype: compute dtype (see WanDiT).
      param_dtype: dtype in which kernels of the blocks rest; None means `dtype`.
      mesh: where the leaves go as they stream in, by PLACES.
      remat: see WanDiT.
      implementation: of attention; None takes what suits the mesh (attention.for_mesh).

    Raises:
      ValueError: a config this network cannot honour, or files that do not fit it.
    """
    config = read_config(path)
    kernels = dtype if param_dtype is None else param_dtype
    model = nnx.eval_shape(
        lambda: WanDiT(
            config,
            nnx.Rngs(0),
            dtype=dtype,
            param_dtype=kernels,
            remat=remat,
            implementation=implementation or for_mesh(mesh, config.num_attention_heads, dtype),
        )
    )
    layout = "wan" if convert.holds(path, "head.head.weight") else "diffusers"
    repeats = {"i": config.num_layers}
    convert.load(model, path, table(config, layout), repeats, shardings=placer(PLACES, mesh))
    return model


def read_config(path: str | Path) -> Config:
    """The config of a folder, of either layout."""
    return convert.config_of(Config, path)


def save(model: WanDiT, path: str | Path) -> None:
    """Writes the folder that diffusers' WanTransformer3DModel.from_pretrained reads.

    LoRA leaves are not written: `lora.merge` folds them in first.
    """
    config = model.config
    convert.save(model, path, table(config), {"i": config.num_layers}, config.to_dict())
