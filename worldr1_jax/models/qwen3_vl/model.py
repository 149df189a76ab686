"""Qwen3-VL (2B, 4B, 8B): images and a question to the logits of the next token.

    network = qwen3_vl.load(folder)
    logits = network(token_ids, images)    # [B N], [B V H W 3] in [0, 1] -> [B vocabulary]

Built: what reads images. Not built: videos, generation, the mixtures of experts. Parameters, file
names and numbers follow transformers' Qwen3VLForConditionalGeneration. Norms, softmax, rotations
and residual streams are float32; matmuls run in the module's `dtype`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from worldr1_jax.models.qwen3_vl import text as decoder
from worldr1_jax.models.qwen3_vl.config import Config
from worldr1_jax.models.qwen3_vl.images import prepare
from worldr1_jax.models.qwen3_vl.vision import VisionTower
from worldr1_jax.nn import layers
from worldr1_jax.nn.attention import Implementation


class Qwen3VL(nnx.Module):
    """The network.

    Args:
      config: shape of the network.
      rngs: source of the initial weights; use nnx.eval_shape around the constructor for none.
      dtype: dtype of matmuls.
      param_dtype: dtype in which the layers' kernels and the token table rest.
      remat: what the backward pass recomputes of the layers: see layers.scan_layers.
      implementation: of attention in the image tower (attention.attention). The decoder's, causal
        and short, is "xla".
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
        self.config, self.dtype = config, jnp.dtype(dtype)
        kwargs: dict[str, Any] = {"dtype": self.dtype, "param_dtype": param_dtype, "remat": remat}
        self.vision = VisionTower(config, rngs, implementation=implementation, **kwargs)
        self.text = decoder.Decoder(config.text, rngs, **kwargs)
        head = layers.Embedding(
            config.text.vocab_size, config.text.hidden_size, rngs=rngs, init=decoder.INIT,
            param_dtype=param_dtype,
        ) if not config.tie_word_embeddings else None  # fmt: skip
        self.lm_head = nnx.data(head)

    def __call__(
        self,
        token_ids: Int[Array, "B N"],
        images: Float[Array, "B V H W 3"],
        mask: Bool[Array, "B N"] | Int[Array, "B N"] | None = None,
        *,
        rows: Int[Array, " R"] | None = None,
    ) -> Float[Array, "B R"]:
        """Logits of the token after the last real one, in float32.

        Args:
          token_ids: in [0, vocab_size); each image is `config.image_tokens(prepared size)` times
            image_token_id (prompt.py writes them), images in their order.
          images: in [0, 1], of any size (images.prepare).
          mask: 0 (or False) for padding, before or behind the question; None: there is none.
          rows: tokens whose logits are wanted, without a product with the vocabulary; None means
            all of them, R = vocab_size.

        Returns:
          [B R]; NaN for a row whose image tokens are not as many as its images have, which cannot
          be seen before the program runs when `token_ids` is traced.

        Raises:
          ValueError: shapes that do not fit, images too small or too narrow, or, where the values
            of `token_ids` are known, another number of image tokens than the images have.
        """
        _check_shapes(token_ids, images, mask)
        pixels = prepare(self.config, images)
        wanted = _check_counts(self.config, token_ids, mask, pixels.shape)
        token_ids = jnp.asarray(token_ids)
        real = jnp.ones(token_ids.shape, bool) if mask is None else jnp.asarray(mask, bool)
        is_image = (token_ids == self.config.image_token_id) & real
        x = self._decode(token_ids, pixels, is_image, real)
        last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
        x = self.text.norm_out(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])
        table = (self.text.token_embedding if self.lm_head is None else self.lm_head).embedding[...]
        if rows is not None:
            table = jnp.take(table, rows, axis=0)
        logits = jnp.einsum(
            "bd,vd->bv", x.astype(self.dtype), table.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return jnp.where((is_image.sum(1) == wanted)[:, None], logits, jnp.nan)

    def _decode(
        self, token_ids: Array, pixels: Array, is_image: Array, real: Array
    ) -> Float[Array, "B N D"]:
        """Both towers: images through theirs, their features in the places of their tokens."""
        batch, side = pixels.shape[0], self.config.vision.side
        grid = (pixels.shape[2] // side, pixels.shape[3] // side)
        features, deep = self.vision(pixels.reshape(-1, *pixels.shape[2:]))
        every = jnp.concatenate([features[None], deep]).reshape(
            deep.shape[0] + 1, batch, -1, deep.shape[-1]
        )
        # Which of a sample's image tokens each token is.
        which = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)[None, :, :, None]
        every = jnp.take_along_axis(every, which, axis=2, mode="clip")
        every = jnp.where(is_image[None, :, :, None], every, 0)
        words = self.text.token_embedding(token_ids).astype(jnp.float32)
        x = jnp.where(is_image[..., None], every[0], words)
        return self.text(x, every[1:], decoder.positions(is_image, real, grid), real)


def _check_shapes(token_ids: Array, images: Array, mask: Array | None) -> None:
    if images.ndim != 5 or images.shape[-1] != 3 or not images.shape[1]:
        raise ValueError(
            f"images have the shape {list(images.shape)}; it has to be [B V H W 3], with one image "
            "or more"
        )
    if token_ids.ndim != 2 or token_ids.shape[0] != images.shape[0]:
        raise ValueError(
            f"token_ids have the shape {list(token_ids.shape)}; it has to be "
            f"[{images.shape[0]}, N], a row for each row of images"
        )
    if mask is not None and mask.shape != token_ids.shape:
        raise ValueError(
            f"mask has the shape {list(mask.shape)}; it has to be that of token_ids, "
            f"{list(token_ids.shape)}"
        )


def _check_counts(config: Config, token_ids: Any, mask: Any, pixels: tuple[int, ...]) -> int:
    """How many image tokens a row has to have for prepared images of this shape; where the rows'
    values are known, they do."""
    _, count, height, width, _ = pixels
    wanted = count * config.image_tokens((height, width))
    if all(map(_known, (token_ids, mask))):
        is_image = np.asarray(token_ids) == config.image_token_id
        counts = (is_image if mask is None else is_image & np.asarray(mask, bool)).sum(1)
        for row in np.flatnonzero(counts != wanted)[:1]:
            raise ValueError(
                f"row {row} of token_ids has {counts[row]} image tokens; {count} images of "
                f"{height}x{width} (as prepared) need {wanted}"
            )
    return wanted


def _known(x: Any) -> bool:
    """Whether this process can read the values now."""
    return not isinstance(x, jax.Array) or (
        not isinstance(x, jax.core.Tracer) and x.is_fully_addressable
    )
