"""UMT5 text encoder: token ids to embeddings, as Wan2.1 uses it (UMT5-XXL, 512 tokens).

Parameters, file names and mask follow transformers' UMT5EncoderModel. Unlike T5, every layer has
its own relative position bias. Layers are stacked and scanned. Norms, softmax and the residual
stream are float32 (T5's residuals outgrow 16 bits); matmuls run in the module's `dtype`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from worldr1_jax.files import short
from worldr1_jax.mesh.placement import COLUMN, ROW, SMALL, SPLIT, Rules, placer
from worldr1_jax.nn import layers
from worldr1_jax.nn.attention import attention
from worldr1_jax.weights import convert, fields

# Where the leaves live (mesh/placement.py).
PLACES: Rules = (
    (r"blocks\.([qkv]|wi_[01])\.kernel", (None, *COLUMN)),
    (r"blocks\.(o|wo)\.kernel", (None, *ROW)),
    (r"token_embedding\.embedding", (SPLIT, None)),
    (SMALL, ()),
)

# Values that transformers' config.json may state and that this network takes for granted.
_REQUIRED = {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "model_type": "umt5"}
_LIMITS = {"num_layers": (1, 1000), "layer_norm_epsilon": (0.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the encoder, in the field names of transformers' config.json."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def xxl(cls) -> Config:
        """UMT5-XXL, the text encoder of Wan2.1."""
        return cls()

    @classmethod
    def nano(cls) -> Config:
        """0.4M parameters, for the shipped nano world."""
        return cls(vocab_size=512, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Reads transformers' config.json; fields that do not shape the encoder are passed over.

        Raises:
          ValueError: a network of another kind, such as one without gated GELU, or a missing field.
        """
        for name, value in _REQUIRED.items():
            if values.get(name, value) != value:
                raise ValueError(
                    f"config field '{name}' is {short(repr(values[name]))}; it has to be {value!r}"
                )
        # transformers' own defaults are of another size: a field left out would be read wrongly.
        missing = [name for name in fields.names(cls) if name not in values]
        if missing:
            raise ValueError(f"config.json of a UMT5 encoder lacks the field '{missing[0]}'")
        known = {name: values[name] for name in fields.names(cls)}
        return cls(**fields.checked(cls, known, _LIMITS))

    def to_dict(self) -> dict[str, Any]:
        """The dict that transformers' UMT5EncoderModel.from_pretrained reads."""
        return {**dataclasses.asdict(self), **_REQUIRED, "architectures": ["UMT5EncoderModel"]}


class UMT5Blocks(nnx.Module):
    """Self-attention with a relative position bias, then a gated MLP; `stack` of them."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, stack: layers.Stack, param_dtype: Any):
        width, inner, hidden = config.d_model, config.num_heads * config.d_kv, config.d_ff
        self.heads = config.num_heads
        kwargs: dict[str, Any] = {
            "rngs": rngs,
            "stack": stack,
            "bias": False,
            "param_dtype": param_dtype,
        }

        def linear(fan_in: int, fan_out: int, std: float) -> layers.Linear:
            return layers.Linear(fan_in, fan_out, init=layers.normal(std), **kwargs)

        # T5's initial values: the missing 1/sqrt(d_kv) of the logits is in q.
        self.norm1 = layers.RMSNorm(width, eps=config.layer_norm_epsilon, stack=stack)
        self.q = linear(width, inner, (width * config.d_kv) ** -0.5)
        self.k = linear(width, inner, width**-0.5)
        self.v = linear(width, inner, width**-0.5)
        self.o = linear(inner, width, inner**-0.5)
        self.relative_bias = layers.Embedding(
            config.relative_attention_num_buckets,
            config.num_heads,
            rngs=rngs,
            init=layers.normal(width**-0.5),
            stack=stack,
        )
        self.norm2 = layers.RMSNorm(width, eps=config.layer_norm_epsilon, stack=stack)
        self.wi_0 = linear(width, hidden, width**-0.5)
        self.wi_1 = linear(width, hidden, width**-0.5)
        self.wo = linear(hidden, width, hidden**-0.5)

    def __call__(
        self,
        x: Float[Array, "B N d"],
        mask: Bool[Array, "B 1 1 N"],
        buckets: Int[Array, "N N"],
        dtype: Any,
    ) -> Float[Array, "B N d"]:
        """One layer (the stack axis has been scanned away) on the float32 residual stream."""
        h = self.norm1(x).astype(dtype)
        q, k, v = (
            layer(h).reshape(*h.shape[:-1], self.heads, -1) for layer in (self.q, self.k, self.v)
        )
        bias = self.relative_bias(buckets).transpose(2, 0, 1).astype(jnp.float32)
        out = attention(q, k, v, mask, bias=bias, scale=1.0)
        x = x + self.o(out.reshape(*h.shape[:-1], -1)).astype(jnp.float32)
        h = self.norm2(x).astype(dtype)
        h = jax.nn.gelu(self.wi_0(h)) * self.wi_1(h)
        return x + self.wo(h).astype(jnp.float32)


class UMT5Encoder(nnx.Module):
    """The encoder.

    Args:
      config: shape of the network.
      rngs: source of the initial weights; use nnx.eval_shape around the constructor for none.
      dtype: dtype of matmuls.
      param_dtype: dtype in which matmul kernels and the token table rest.
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
        self.token_embedding = layers.Embedding(
            config.vocab_size,
            config.d_model,
            rngs=rngs,
            init=layers.normal(1.0),
            param_dtype=param_dtype,
        )
        self.blocks = UMT5Blocks(
            config, rngs=rngs, stack=(config.num_layers,), param_dtype=param_dtype
        )
        self.norm_out = layers.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(
        self, token_ids: Int[Array, "B N"], mask: Bool[Array, "B N"] | Int[Array, "B N"]
    ) -> Float[Array, "B N d"]:
        """Embeddings in float32.

        Args:
          token_ids: in [0, vocab_size).
          mask: 1 (or True) for tokens of the prompt, 0 for padding. Padding is not attended to, but
            its own rows still hold numbers: see `zero_padding`.

        Raises:
          ValueError: shapes of token_ids and mask that are not [B, N] both.
        """
        if token_ids.ndim != 2 or token_ids.shape != mask.shape:
            raise ValueError(
                f"token_ids {list(token_ids.shape)} and mask {list(mask.shape)} have to have one "
                "shape [B, N]"
            )
        config = self.config
        buckets = jnp.asarray(
            relative_buckets(
                token_ids.shape[1],
                config.relative_attention_num_buckets,
                config.relative_attention_max_distance,
            )
        )
        allowed = mask.astype(bool)[:, None, None, :]
        x = self.token_embedding(token_ids).astype(jnp.float32)
        x = layers.scan_layers(
            self.blocks, x, lambda layer, x: layer(x, allowed, buckets, self.dtype)
        )
        return self.norm_out(x)


def zero_padding(
    embeddings: Float[Array, "B N d"], mask: Bool[Array, "B N"] | Int[Array, "B N"]
) -> Float[Array, "B N d"]:
    """Zeros beyond the prompt's end, which is how Wan2.1 hands text to its DiT."""
    return jnp.where(mask.astype(bool)[..., None], embeddings, 0)


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """T5's bucket of key position minus query position, [length, length] int32, for an encoder.

    Half of the buckets are for keys after the query. Of each half, the first half holds one
    distance each; the rest grow logarithmically up to max_distance, and the last takes all others.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # float32 as in the publisher's code: at powers of two rounding decides the bucket.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    bucket = np.where(distance < exact, distance, far) + np.where(offset > 0, half, 0)
    return bucket.astype(np.int32)


_BLOCK = "encoder.block.{i}.layer"
_NAMES = (  # leaf, transformers' name, name in Wan-Video's own release, kind; without ".weight"
    ("token_embedding.embedding", "shared", "token_embedding", "copy"),
    ("blocks.norm1.scale", f"{_BLOCK}.0.layer_norm", "blocks.{i}.norm1", "copy"),
    ("blocks.q.kernel", f"{_BLOCK}.0.SelfAttention.q", "blocks.{i}.attn.q", "linear"),
    ("blocks.k.kernel", f"{_BLOCK}.0.SelfAttention.k", "blocks.{i}.attn.k", "linear"),
    ("blocks.v.kernel", f"{_BLOCK}.0.SelfAttention.v", "blocks.{i}.attn.v", "linear"),
    ("blocks.o.kernel", f"{_BLOCK}.0.SelfAttention.o", "blocks.{i}.attn.o", "linear"),
    (
        "blocks.relative_bias.embedding",
        f"{_BLOCK}.0.SelfAttention.relative_attention_bias",
        "blocks.{i}.pos_embedding.embedding",
        "copy",
    ),
    ("blocks.norm2.scale", f"{_BLOCK}.1.layer_norm", "blocks.{i}.norm2", "copy"),
    ("blocks.wi_0.kernel", f"{_BLOCK}.1.DenseReluDense.wi_0", "blocks.{i}.ffn.gate.0", "linear"),
    ("blocks.wi_1.kernel", f"{_BLOCK}.1.DenseReluDense.wi_1", "blocks.{i}.ffn.fc1", "linear"),
    ("blocks.wo.kernel", f"{_BLOCK}.1.DenseReluDense.wo", "blocks.{i}.ffn.fc2", "linear"),
    ("norm_out.scale", "encoder.final_layer_norm", "norm", "copy"),
)


def table(layout: str = "diffusers") -> convert.Table:
    """Rows for convert.load and convert.save; layout is "diffusers" (transformers' names) or "wan"
    (Wan-Video's own)."""
    column = {"diffusers": 1, "wan": 2}[layout]
    return tuple((f"{names[column]}.weight", names[0], names[3]) for names in _NAMES)


# Files of transformers < 5 hold the token table twice, under its two names.
IGNORE = (r"encoder\.embed_tokens\.weight",)


def load(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
) -> UMT5Encoder:
    """Reads a folder of transformers' UMT5EncoderModel, or the file of Wan-Video's own release.

    Args:
      path: the folder, with config.json, e.g. Wan2.1-T2V-1.3B-Diffusers/text_encoder; or one file,
        e.g. Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth, which is taken for UMT5-XXL.
      dtype: compute dtype (see UMT5Encoder).
      param_dtype: dtype in which kernels and the token table rest; None means `dtype`.
      mesh: where the leaves go as they stream in, by PLACES.

    Raises:
      ValueError: a config this network cannot honour, or files that do not fit it.
    """
    config = read_config(path)
    kernels = dtype if param_dtype is None else param_dtype
    model = nnx.eval_shape(
        lambda: UMT5Encoder(config, nnx.Rngs(0), dtype=dtype, param_dtype=kernels)
    )
    layout = "wan" if convert.holds(path, "token_embedding.weight") else "diffusers"
    repeats = {"i": config.num_layers}
    convert.load(
        model,
        path,
        table(layout),
        repeats,
        mesh=mesh,
        shardings=placer(PLACES, mesh),
        ignore=IGNORE,
    )
    return model


def read_config(path: str | Path) -> Config:
    """The config of a folder; a single file has none and is UMT5-XXL, as Wan-Video releases it."""
    if Path(path).is_file():
        return Config.xxl()
    return convert.config_of(Config, path)


def save(model: UMT5Encoder, path: str | Path) -> None:
    """Writes the folder that transformers' UMT5EncoderModel.from_pretrained reads."""
    config = model.config
    repeats = {"i": config.num_layers}
    convert.save(model, path, table(), repeats, config.to_dict(), filename="model.safetensors")
