"""Shape of Wan2.1's DiT: the published sizes, the one that ships with this package, config.json of
both releases, and what a forward costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from worldr1_jax.files import short
from worldr1_jax.weights import fields

CLASS = "WanTransformer3DModel"
QK_NORM = "rms_norm_across_heads"
_LIMITS = {"num_layers": (1, 1000), "num_attention_heads": (1, 1024), "eps": (0.0, 1.0)}

# config.json of Wan-Video's own release -> names here.
_ORIGINAL_FIELDS = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "eps": "eps",
    "text_dim": "text_dim",
    "cross_attn_norm": "cross_attn_norm",
    "patch_size": "patch_size",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the network, in the field names of diffusers' config.json.

    patch_size counts latent frames, rows and columns per token; rope_max_seq_len is the largest
    number of tokens along one of these axes.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = QK_NORM
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    def __post_init__(self) -> None:
        if len(self.patch_size) != 3:
            raise ValueError(f"patch_size is {self.patch_size}; it has to have three numbers")
        if self.qk_norm != QK_NORM:
            raise ValueError(f"qk_norm is {self.qk_norm!r}; this network has '{QK_NORM}' only")
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise ValueError(
                f"attention_head_dim is {self.attention_head_dim}; RoPE needs an even number >= 6"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim is {self.freq_dim}; it has to be even")

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def wan_1_3b(cls) -> Config:
        """Wan2.1-T2V-1.3B."""
        return cls(num_attention_heads=12, ffn_dim=8960, num_layers=30)

    @classmethod
    def wan_14b(cls) -> Config:
        """Wan2.1-T2V-14B."""
        return cls()

    @classmethod
    def nano(cls) -> Config:
        """About 2.4M parameters, for the shipped nano world (text from umt5.Config.nano())."""
        return cls(
            num_attention_heads=4,
            attention_head_dim=32,
            text_dim=128,
            freq_dim=64,
            ffn_dim=512,
            num_layers=8,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Reads diffusers' config.json, or the one of Wan-Video's own release.

        Raises:
          ValueError: a field with a value that this network cannot honour, such as image_dim.
        """
        kind = values.get("_class_name", CLASS)
        if kind not in (CLASS, "WanModel"):  # the second is in Wan-Video's own release
            raise ValueError(f"_class_name is {short(repr(kind))}; this network is a {CLASS}")
        values = _from_original(values) if "dim" in values else dict(values)
        known: dict[str, Any] = {}
        for name, value in values.items():
            if name.startswith("_"):  # diffusers' notes on the file: class and version
                continue
            if name in fields.names(cls):
                known[name] = value
            elif value is not None:
                raise ValueError(
                    f"config field '{short(name)}' is {short(repr(value))}; the text-to-video "
                    "network needs it null"
                )
        return cls(**fields.checked(cls, known, _LIMITS))

    def to_dict(self) -> dict[str, Any]:
        """The dict that diffusers' WanTransformer3DModel would write to config.json."""
        values = dataclasses.asdict(self)
        values["patch_size"] = list(self.patch_size)
        nulls = {"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None}
        return {"_class_name": CLASS, **values, **nulls}


def _from_original(values: Mapping[str, Any]) -> dict[str, Any]:
    """Field values of Wan-Video's own config.json under the names of Config."""
    values = {k: v for k, v in values.items() if not k.startswith("_")}
    dim, model_type = values.pop("dim"), values.pop("model_type", "t2v")
    if model_type != "t2v":
        raise ValueError(
            f"model_type is {short(repr(model_type))}; this is the text-to-video network ('t2v')"
        )
    values.pop("text_len", None)  # length to which the pipeline pads the text, not a shape here
    unknown = sorted(set(values) - set(_ORIGINAL_FIELDS))
    if unknown:
        raise ValueError(f"config field '{short(unknown[0])}' is unknown in a Wan config.json")
    named = {_ORIGINAL_FIELDS[name]: value for name, value in values.items()}
    heads = named.get("num_attention_heads")
    if not all(type(n) is int and n > 0 for n in (dim, heads)) or dim % heads:
        raise ValueError(
            f"config field 'dim' is {short(repr(dim))} and 'num_heads' {short(repr(heads))}; dim "
            "has to be a multiple of num_heads, both above 0"
        )
    return {**named, "attention_head_dim": dim // heads}


def tokens(config: Config, size: tuple[int, int, int]) -> int:
    """Tokens of latents of (f, h, w)."""
    return math.prod(n // p for n, p in zip(size, config.patch_size, strict=True))


def flops(config: Config, count: int, text_tokens: int) -> tuple[float, float]:
    """FLOPs of a forward of one video of `count` tokens: products with weights, and attention."""
    d, layers_ = config.dim, config.num_layers
    linear = 2 * count * (6 * d * d + 2 * d * config.ffn_dim) + 2 * text_tokens * 2 * d * d
    scores = 4 * count * (count + text_tokens) * d
    return float(layers_ * linear), float(layers_ * scores)
