"""The two towers of CLIP: a vision transformer and a causal text transformer, each with a
projection into the space that they share.

Parameters and arithmetic are those of OpenCLIP's and transformers' CLIPs. Layers are stacked and
scanned; norms, softmax and the residual stream are float32, matmuls run in the module's `dtype`.
On a mesh, frames and prompts lie over data, fsdp and context, each whole on its device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from worldr1_jax.mesh.placement import constrain
from worldr1_jax.models.clip.config import Config, Tower
from worldr1_jax.nn import layers
from worldr1_jax.nn.attention import attention

LOGIT_SCALE = float(np.log(1 / 0.07))  # as CLIP began its training


def quick_gelu(x: Array) -> Array:
    """OpenAI's stand-in for GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": quick_gelu,
}


class Blocks(nnx.Module):
    """The layers of a tower, stacked: self-attention and an MLP, each after its norm.

    Initial values are CLIP's: what adds to the residual stream is smaller the deeper the tower.
    """

    def __init__(self, tower: Tower, *, rngs: nnx.Rngs, param_dtype: Any):
        width, depth, hidden = tower.hidden_size, tower.num_hidden_layers, tower.intermediate_size
        self.heads, self.stack = tower.num_attention_heads, (depth,)
        kwargs: dict[str, Any] = {"rngs": rngs, "stack": self.stack, "param_dtype": param_dtype}
        into, out = layers.normal(width**-0.5), layers.normal((2 * width * depth) ** -0.5)
        norm = partial(layers.LayerNorm, width, eps=tower.layer_norm_eps, affine=True)
        self.norm1 = norm(stack=self.stack)
        self.q = layers.Linear(width, width, init=into, **kwargs)
        self.k = layers.Linear(width, width, init=into, **kwargs)
        self.v = layers.Linear(width, width, init=into, **kwargs)
        self.o = layers.Linear(width, width, init=out, **kwargs)
        self.norm2 = norm(stack=self.stack)
        self.activation = _ACTIVATIONS[tower.hidden_act]
        wide = layers.normal((2 * width) ** -0.5)
        self.linear_1 = layers.Linear(width, hidden, init=wide, **kwargs)
        self.linear_2 = layers.Linear(hidden, width, init=out, **kwargs)

    def __call__(
        self, x: Float[Array, "N T D"], mask: Bool[Array, "1 1 T T"] | None, dtype: Any
    ) -> Float[Array, "N T D"]:
        """All layers, one after the other, on the float32 residual stream."""
        return layers.scan_layers(self, x, lambda layer, x: layer._layer(x, mask, dtype))

    def _layer(self, x: Array, mask: Array | None, dtype: Any) -> Array:
        h = self.norm1(x).astype(dtype)
        q, k, v = (layer(h, heads=self.heads) for layer in (self.q, self.k, self.v))
        x = x + self.o(attention(q, k, v, mask), axes=2).astype(jnp.float32)
        h = self.norm2(x).astype(dtype)
        x = x + self.linear_2(self.activation(self.linear_1(h))).astype(jnp.float32)
        return constrain(x, "sequences", None, "features")


class ImageEncoder(nnx.Module):
    """Patches and a class token through the vision tower; the class token's row is projected."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, param_dtype: Any):
        tower, patch = config.vision, config.patch_size
        width, grid = tower.hidden_size, config.image_size // patch
        normal = layers.normal(width**-0.5)
        patches = layers.normal((3 * patch * patch) ** -0.5)
        self.patch_kernel = nnx.Param(patches(rngs.params(), (patch, patch, 3, width), param_dtype))
        self.class_token = nnx.Param(normal(rngs.params(), (width,), jnp.float32))
        self.positions = nnx.Param(normal(rngs.params(), (grid * grid + 1, width), jnp.float32))
        norm = partial(layers.LayerNorm, width, eps=tower.layer_norm_eps, affine=True)
        self.norm_in, self.norm_out = norm(), norm()
        self.blocks = Blocks(tower, rngs=rngs, param_dtype=param_dtype)
        self.projection = layers.Linear(
            width, config.projection_dim, rngs=rngs, bias=False, init=normal,
            param_dtype=param_dtype,
        )  # fmt: skip

    def __call__(self, frames: Float[Array, "N S S 3"], dtype: Any) -> Float[Array, "N P"]:
        """The projection, in float32 and of any length."""
        kernel = self.patch_kernel[...].astype(dtype)
        patch, count = kernel.shape[0], frames.shape[0]
        grid = frames.shape[1] // patch
        # A convolution without overlap is one product: patches as rows, in the kernel's order.
        frames = frames[:, : grid * patch, : grid * patch].astype(dtype)
        x = frames.reshape(count, grid, patch, grid, patch, 3).swapaxes(2, 3)
        x = x.reshape(count, grid * grid, -1) @ kernel.reshape(-1, kernel.shape[-1])
        token = jnp.broadcast_to(self.class_token[...], (count, 1, x.shape[-1]))
        x = jnp.concatenate([token, x.astype(jnp.float32)], axis=1) + self.positions[...]
        x = constrain(self.norm_in(x), "sequences", None, "features")
        x = self.blocks(x, None, dtype)
        return self.projection(self.norm_out(x[:, 0]))


class TextEncoder(nnx.Module):
    """Tokens through the causal text tower; the row of the end token is projected."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, param_dtype: Any):
        tower, width = config.text, config.text.hidden_size
        self.eos_token_id = config.eos_token_id
        self.token_embedding = layers.Embedding(
            config.vocab_size, width, rngs=rngs, init=layers.normal(0.02), param_dtype=param_dtype
        )
        positions = layers.normal(0.01)
        self.positions = nnx.Param(
            positions(rngs.params(), (config.max_position_embeddings, width), jnp.float32)
        )
        self.blocks = Blocks(tower, rngs=rngs, param_dtype=param_dtype)
        self.norm_out = layers.LayerNorm(width, eps=tower.layer_norm_eps, affine=True)
        self.projection = layers.Linear(
            width, config.projection_dim, rngs=rngs, bias=False, init=layers.normal(width**-0.5),
            param_dtype=param_dtype,
        )  # fmt: skip

    def __call__(self, token_ids: Int[Array, "N T"], dtype: Any) -> Float[Array, "N P"]:
        """The projection, in float32 and of any length."""
        length = token_ids.shape[1]
        x = self.token_embedding(token_ids).astype(jnp.float32) + self.positions[:length]
        x = constrain(x, "sequences", None, "features")
        causal = np.tril(np.ones((length, length), bool))[None, None]
        x = self.blocks(x, jnp.asarray(causal), dtype)
        # The first end, not the last: published files pad with the end token itself. What comes
        # after it is not seen, so that padding does not matter.
        ends = token_ids if self.eos_token_id is None else token_ids == self.eos_token_id
        end = jnp.argmax(ends, axis=1)
        last = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return self.projection(self.norm_out(last))


class CLIP(nnx.Module):
    """Both towers and the logit scale (the logarithm of the published temperature's inverse).

    Args:
      config: shape of the network.
      rngs: source of the initial weights; use nnx.eval_shape around the constructor for none.
      dtype: dtype of matmuls.
      param_dtype: dtype in which kernels and the token table rest.
    """

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.image_encoder = ImageEncoder(config, rngs=rngs, param_dtype=param_dtype)
        self.text_encoder = TextEncoder(config, rngs=rngs, param_dtype=param_dtype)
        self.logit_scale = nnx.Param(jnp.asarray(LOGIT_SCALE, jnp.float32))

    def image(self, frames: Float[Array, "N S S 3"]) -> Float[Array, "N P"]:
        """Embeddings of length 1 of preprocessed frames (see `preprocess`).

        Raises:
          ValueError: frames of another size than the config's.
        """
        side = self.config.image_size
        if frames.ndim != 4 or frames.shape[1:] != (side, side, 3):
            raise ValueError(
                f"frames {list(frames.shape)} have to be [N {side} {side} 3]: see clip.preprocess"
            )
        return _unit(self.image_encoder(frames, self.dtype))

    def text(self, token_ids: Int[Array, "N T"]) -> Float[Array, "N P"]:
        """Embeddings of length 1 of prompts, each with its end token (see `Tokenizer`).

        Raises:
          ValueError: token ids that are not [N T], or more of them than the network has places for.
        """
        most = self.config.max_position_embeddings
        if token_ids.ndim != 2 or token_ids.shape[1] > most:
            raise ValueError(
                f"token_ids {list(token_ids.shape)} have to be [N T], T at most {most}"
            )
        return _unit(self.text_encoder(token_ids, self.dtype))


def _unit(x: Float[Array, "N P"]) -> Float[Array, "N P"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
