"""Qwen3-VL's decoder: causal grouped-query attention with interleaved MRoPE, and DeepStack.

MRoPE gives a token three positions: time, row and column. They are equal for text; the tokens of
an image share the time at which it begins and count rows and columns from there, and the text goes
on at that time plus the longer side of the image. Layers are stacked and scanned.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from worldr1_jax.mesh import placement
from worldr1_jax.models.qwen3_vl.config import TextConfig
from worldr1_jax.nn import layers, rotary
from worldr1_jax.nn.attention import attention

INIT = layers.normal(0.02)


class TextBlocks(nnx.Module):
    """Causal self-attention with normalised queries and keys, then a gated MLP; `stack` of them."""

    def __init__(
        self, config: TextConfig, *, rngs: nnx.Rngs, stack: layers.Stack, param_dtype: Any
    ):
        d, hidden, width = config.hidden_size, config.intermediate_size, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = width

        def linear(features_in: int, features_out: int) -> layers.Linear:
            return layers.Linear(
                features_in, features_out, rngs=rngs, stack=stack, bias=False, init=INIT,
                param_dtype=param_dtype,
            )  # fmt: skip

        def norm(features: int) -> layers.RMSNorm:
            return layers.RMSNorm(features, eps=config.rms_norm_eps, stack=stack)

        self.norm1, self.norm2 = norm(d), norm(d)
        self.q = linear(d, config.num_attention_heads * width)
        self.k = linear(d, config.num_key_value_heads * width)
        self.v = linear(d, config.num_key_value_heads * width)
        self.o = linear(config.num_attention_heads * width, d)
        self.q_norm, self.k_norm = norm(width), norm(width)
        self.gate, self.up, self.down = linear(d, hidden), linear(d, hidden), linear(hidden, d)

    def __call__(
        self,
        x: Float[Array, "B N d"],
        allowed: Bool[Array, "B 1 N N"],
        rope: tuple[Array, Array],
        dtype: Any,
    ) -> Float[Array, "B N d"]:
        """One layer (the stack axis has been scanned away) on the float32 residual stream."""
        h = self.norm1(x).astype(dtype)
        q, k, v = (self._heads(to(h)) for to in (self.q, self.k, self.v))
        q = rotary.rotate_halves(self.q_norm(q), *rope).astype(dtype)
        k = rotary.rotate_halves(self.k_norm(k), *rope).astype(dtype)
        # Each head of keys and values serves `groups` of queries.
        k, v = (jnp.repeat(y, self.groups, axis=2) for y in (k, v))
        out = attention(q, k, v, allowed)
        x = x + self.o(out.reshape(*x.shape[:2], -1)).astype(jnp.float32)
        h = self.norm2(x).astype(dtype)
        x = x + self.down(jax.nn.silu(self.gate(h)) * self.up(h)).astype(jnp.float32)
        return placement.constrain(x, "sequences", None, "features")

    def _heads(self, x: Array) -> Array:
        x = x.reshape(*x.shape[:2], -1, self.head_dim)
        return placement.constrain(x, "sequences", None, "heads", None)


class Decoder(nnx.Module):
    """The token table, the layers and the last norm."""

    def __init__(
        self, config: TextConfig, rngs: nnx.Rngs, *, dtype: Any, param_dtype: Any, remat: str
    ):
        self.config, self.dtype, self.remat = config, dtype, remat
        self.token_embedding = layers.Embedding(
            config.vocab_size, config.hidden_size, rngs=rngs, init=INIT, param_dtype=param_dtype
        )
        self.blocks = TextBlocks(
            config, rngs=rngs, stack=(config.num_hidden_layers,), param_dtype=param_dtype
        )
        self.norm_out = layers.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        x: Float[Array, "B N d"],
        deep: Float[Array, "T B N d"],
        places: Int[Array, "3 B N"],
        mask: Bool[Array, "B N"],
    ) -> Float[Array, "B N d"]:
        """The residual stream after all layers, before the last norm, in float32.

        Args:
          x: embeddings of text and images.
          deep: what is added after each of the first T layers; zero where there is no image.
          places: time, row and column (`positions`).
          mask: False for padding, which no real token looks at; its own rows hold no meaning.
        """
        count = x.shape[1]
        causal = jnp.tril(jnp.ones((count, count), bool))
        allowed = causal & mask[:, None, None, :]
        rope = rope_tables(self.config, places)
        x = placement.constrain(x.astype(jnp.float32), "sequences", None, "features")

        def layer(block: TextBlocks, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x, i = carry
            x = block(x, allowed, rope, self.dtype)
            # A loop over layers of one kind: those past the T first add nothing. Two loops would
            # need the stack of weights cut, which costs a copy of it.
            more = jax.lax.dynamic_index_in_dim(
                deep, jnp.minimum(i, deep.shape[0] - 1), keepdims=False
            )
            return x + jnp.where(i < deep.shape[0], more, 0), i + 1

        start = (x, jnp.zeros((), jnp.int32))
        return layers.scan_layers(self.blocks, start, layer, remat=self.remat)[0]


def positions(
    is_image: Bool[Array, "B N"], mask: Bool[Array, "B N"], grid: tuple[int, int]
) -> Int[Array, "3 B N"]:
    """Time, row and column of every token, which count from 0 at the first real one.

    Args:
      is_image: where the tokens of images are, each image's side by side.
      mask: False for padding, which does not count.
      grid: rows and columns of an image's tokens.
    """
    per_image = grid[0] * grid[1]
    within = (jnp.cumsum(is_image, axis=1) - 1) % per_image
    # Time goes on by one after each token of text, and by the longer side after an image's last.
    last = is_image & (within == per_image - 1)
    steps = jnp.where(is_image, jnp.where(last, max(grid), 0), mask.astype(jnp.int32))
    time = jnp.cumsum(steps, axis=1) - steps
    row, column = (jnp.where(is_image, y, 0) for y in jnp.divmod(within, grid[1]))
    return jnp.stack([time, time + row, time + column])


def rope_tables(
    config: TextConfig, places: Int[Array, "3 B N"]
) -> tuple[Float[Array, "B N 1 c"], Float[Array, "B N 1 c"]]:
    """cos and sin for `rotary.rotate_halves`, in float32.

    Interleaved: of frequencies 0, 1, 2, 3, ... those at 1, 4, 7, ... turn with the row and those at
    2, 5, 8, ... with the column, mrope_section[1] and [2] of them; the others turn with time.
    """
    index = np.arange(config.head_dim // 2)
    frequencies = config.rope_theta ** (-2.0 * index / config.head_dim)
    axis = np.zeros_like(index)
    for which in (1, 2):
        turns = (index % 3 == which) & (index < 3 * config.mrope_section[which])
        axis = np.where(turns, which, axis)
    chosen = jnp.moveaxis(places[axis], 0, -1).astype(jnp.float32)
    angles = (chosen * jnp.asarray(frequencies, jnp.float32))[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)
