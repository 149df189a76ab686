"""Shape of a CLIP, from transformers' config.json or by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from worldr1_jax.weights import fields

ACTIVATIONS = ("gelu", "quick_gelu")
# transformers writes only the fields that differ from its defaults, which are these.
_TOWERS: dict[str, dict[str, Any]] = {
    "vision": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "image_size": 224,
        "patch_size": 32,
        "num_channels": 3,
    },
    "text": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    },
}
_PROJECTION = 512
_LIMITS: fields.Limits = {
    "num_hidden_layers": (1, 256),
    "layer_norm_eps": (1e-12, 1),
    "eos_token_id": (0, 2**20),
}
# What configs of before 2023 say for "the prompt ends at its largest token id".
_LARGEST = 2


@dataclasses.dataclass(frozen=True)
class Tower:
    """Shape of one of the two transformers, in the field names of transformers."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "gelu"  # "gelu" (exact) | "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} has to be a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act is '{self.hidden_act}'; it has to be one of {', '.join(ACTIVATIONS)}"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of both towers.

    Attributes:
      projection_dim: length of an embedding.
      image_size, patch_size: sides in pixels of the square image and of its patches.
      max_position_embeddings: the longest prompt in tokens, its ends included.
      eos_token_id: the token at whose first place a prompt is read; None for the largest id in it,
        which is the same with the published vocabulary.
    """

    vision: Tower
    text: Tower
    projection_dim: int
    image_size: int = 224
    patch_size: int = 14
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is smaller than a patch of {self.patch_size} pixels"
            )

    @classmethod
    def vit_h_14(cls) -> Config:
        """OpenCLIP ViT-H/14, of HPSv2.1 and PickScore: 986M parameters."""
        return cls(Tower(1280, 5120, 32, 16), Tower(1024, 4096, 24, 16), 1024)

    @classmethod
    def nano(cls, vocab_size: int, eos_token_id: int) -> Config:
        """0.9M parameters, for the nano world's frames, resized to 48 pixels, and its sentences."""
        return cls(
            Tower(128, 512, 4, 4),
            Tower(64, 256, 2, 4),
            64,
            image_size=48,
            patch_size=8,
            vocab_size=vocab_size,
            max_position_embeddings=24,
            eos_token_id=eos_token_id,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Reads transformers' config.json of a CLIPModel.

        Raises:
          ValueError: a network of another kind, or a value that this one does not know.
        """
        kind = values.get("model_type", "clip")
        if kind != "clip":
            raise ValueError(f"config field 'model_type' is {kind!r}; it has to be 'clip'")
        vision, text = (_section(values, name) for name in _TOWERS)
        if vision["num_channels"] != 3:
            raise ValueError(
                f"config field 'num_channels' is {vision['num_channels']!r}; it has to be 3"
            )
        end = text["eos_token_id"]
        own = {
            "projection_dim": values.get("projection_dim", _PROJECTION),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["max_position_embeddings"],
            "eos_token_id": None if end == _LARGEST else end,
        }
        return cls(
            _tower(vision, "vision"), _tower(text, "text"), **fields.checked(cls, own, _LIMITS)
        )

    def to_dict(self) -> dict[str, Any]:
        """The dict that transformers' CLIPModel.from_pretrained reads."""
        vision = {"image_size": self.image_size, "patch_size": self.patch_size, "num_channels": 3}
        text = {
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": None,  # nothing here reads it, and its default is of another vocabulary
            "eos_token_id": _LARGEST if self.eos_token_id is None else self.eos_token_id,
        }
        shared = {"projection_dim": self.projection_dim}
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            **shared,
            "vision_config": {**dataclasses.asdict(self.vision), **vision, **shared},
            "text_config": {**dataclasses.asdict(self.text), **text, **shared},
        }


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One tower's fields. Older files have them twice; what ends in _dict then counts."""
    stated: dict[str, Any] = {}
    for key in (f"{name}_config", f"{name}_config_dict"):
        stated |= fields.mapping(values.get(key) or {}, key)
    return {field: stated.get(field, default) for field, default in _TOWERS[name].items()}


def _tower(section: Mapping[str, Any], name: str) -> Tower:
    known = {field: section[field] for field in fields.names(Tower)}
    return Tower(**fields.checked(Tower, known, _LIMITS, f"{name}_config."))
