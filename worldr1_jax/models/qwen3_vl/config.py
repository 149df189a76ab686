"""Shape of Qwen3-VL: the published sizes, what config.json says, and what a forward pass costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from worldr1_jax.files import short
from worldr1_jax.weights import fields

MODEL_TYPE = "qwen3_vl"
_LIMITS: fields.Limits = {
    "num_hidden_layers": (1, 256),
    "depth": (1, 256),
    "deepstack_visual_indexes": (0, 255),
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
    "mrope_section": (1, 4096),
    "image_token_id": (0, 2**20),
    "vision_start_token_id": (0, 2**20),
    "vision_end_token_id": (0, 2**20),
    "min_pixels": (1, 2**28),
    "max_pixels": (1, 2**28),
}
# Values that transformers' config.json may state and that this network takes for granted.
_TEXT = {"model_type": "qwen3_vl_text", "hidden_act": "silu", "attention_bias": False}
_VISION = {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3}
_ROPE = {"rope_type": "default", "type": "default", "mrope_interleaved": True}
_AXIAL = {"rope_type": "axial", "rope_theta": 10000.0}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder, in the field names of transformers' text_config."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] = (24, 20, 20)  # frequencies for time, row and column

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"text_config has {self.num_attention_heads} heads of {self.head_dim} over "
                f"{self.num_key_value_heads} of keys: the first has to be a multiple of the last, "
                "and head_dim even"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section is {list(self.mrope_section)}; it has to be three numbers, of "
                f"time, row and column, that are together half of head_dim {self.head_dim}"
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The image tower, in the field names of transformers' vision_config."""

    depth: int = 24
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_heads: int = 16
    patch_size: int = 16
    spatial_merge_size: int = 2  # a token of the decoder stands for so many patches a side
    temporal_patch_size: int = 2  # an image fills all of them
    num_position_embeddings: int = 2304  # of a square grid
    # Layers whose outputs DeepStack adds to image tokens, one after each of the first text layers.
    deepstack_visual_indexes: tuple[int, ...] = (5, 11, 17)

    def __post_init__(self) -> None:
        taps = self.deepstack_visual_indexes
        if not taps or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < self.depth:
            raise ValueError(
                f"deepstack_visual_indexes are {list(taps)}; they have to be one or more layers "
                f"below depth {self.depth}, rising"
            )
        if math.isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ValueError(
                f"num_position_embeddings is {self.num_position_embeddings}; it has to be a square"
            )
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ValueError(
                f"vision_config has a hidden_size of {self.hidden_size} over {self.num_heads} "
                "heads; a head's width has to be a multiple of 4"
            )

    @property
    def side(self) -> int:
        """Pixels of a decoder's token: sides of prepared images are multiples of it."""
        return self.patch_size * self.spatial_merge_size


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the network, its special tokens and the sizes of images that it takes.

    Attributes:
      text, vision: the two towers.
      tie_word_embeddings: the token table is also the output's.
      image_token_id, vision_start_token_id, vision_end_token_id: as the tokenizer has them.
      min_pixels, max_pixels: to how many pixels, at least and at most, an image is resized (the
        published preprocessor_config.json calls them shortest_edge and longest_edge).
    """

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    tie_word_embeddings: bool = True
    image_token_id: int = 151655
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216

    def __post_init__(self) -> None:
        taps = len(self.vision.deepstack_visual_indexes)
        if taps > self.text.num_hidden_layers:
            raise ValueError(
                f"deepstack_visual_indexes names {taps} layers, but there are only "
                f"{self.text.num_hidden_layers} text layers (num_hidden_layers) to add them after"
            )
        if not self.image_token_id < self.text.vocab_size:
            raise ValueError(
                f"image_token_id is {self.image_token_id}; it has to be below vocab_size "
                f"{self.text.vocab_size}"
            )
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"images of {self.min_pixels} to {self.max_pixels} pixels: the first has to be "
                "positive and at most the second"
            )

    @classmethod
    def qwen3_vl_2b(cls) -> Config:
        """Qwen3-VL-2B."""
        text = TextConfig(
            hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16
        )
        return cls(text=text)

    @classmethod
    def qwen3_vl_4b(cls) -> Config:
        """Qwen3-VL-4B, the judge of World-R1."""
        return cls()

    @classmethod
    def qwen3_vl_8b(cls) -> Config:
        """Qwen3-VL-8B."""
        return cls(
            text=TextConfig(hidden_size=4096, intermediate_size=12288),
            vision=VisionConfig(
                depth=27, hidden_size=1152, intermediate_size=4304,
                deepstack_visual_indexes=(8, 16, 24),
            ),
            tie_word_embeddings=False,
        )  # fmt: skip

    @classmethod
    def nano(cls, vocab_size: int = 512) -> Config:
        """1.3M parameters, for the nano world's 64x64 images, each 16 tokens. The special tokens
        are the last of the vocabulary, where `prompt.train_tokenizer` puts them."""
        text = TextConfig(
            vocab_size=vocab_size, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=24, mrope_section=(4, 4, 4),
        )  # fmt: skip
        vision = VisionConfig(
            depth=4, hidden_size=96, intermediate_size=256, num_heads=4, patch_size=8,
            num_position_embeddings=64, deepstack_visual_indexes=(0, 2),
        )  # fmt: skip
        return cls(
            text=text, vision=vision, image_token_id=vocab_size - 1,
            vision_start_token_id=vocab_size - 3, vision_end_token_id=vocab_size - 2,
            min_pixels=1024,
        )  # fmt: skip

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
    ) -> Config:
        """Reads transformers' config.json, in the spelling of the published files or of
        transformers 5.

        Args:
          values: config.json.
          preprocessor: preprocessor_config.json; None means the published sizes of images.

        Raises:
          ValueError: a network of another architecture, a missing field, or a value that this
            network cannot honour, named.
        """
        kind = values.get("model_type")
        if kind != MODEL_TYPE:
            raise ValueError(
                f"config.json is of the architecture {short(repr(kind))}; this network is "
                f"'{MODEL_TYPE}' "
                "(Qwen3-VL 2B, 4B or 8B)"
            )
        if values.get("quantization_config"):
            raise ValueError(
                "config.json has a quantization_config: give the release in bf16, fp16 or fp32"
            )
        parts = [values.get(name) for name in ("text_config", "vision_config")]
        if not all(isinstance(part, Mapping) for part in parts):
            raise ValueError("config.json of Qwen3-VL needs a text_config and a vision_config")
        text, vision = (dict(part) for part in parts if part is not None)
        own = {
            name: _field(values, name, "config.json")
            for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")
        }
        own["tie_word_embeddings"] = values.get(
            "tie_word_embeddings", text.get("tie_word_embeddings", False)
        )
        config = cls(text=_text(text), vision=_vision(vision), **fields.checked(cls, own, _LIMITS))
        if vision.get("out_hidden_size", config.text.hidden_size) != config.text.hidden_size:
            raise ValueError(
                f"vision_config field 'out_hidden_size' is {short(repr(vision['out_hidden_size']))}"
                f"; it has to be the text's hidden_size, {config.text.hidden_size}"
            )
        return config if preprocessor is None else _with_sizes(config, preprocessor)

    def to_dict(self) -> dict[str, Any]:
        """The dict that transformers' Qwen3VLForConditionalGeneration.from_pretrained reads."""
        text, vision = dataclasses.asdict(self.text), dataclasses.asdict(self.vision)
        rope = {
            "rope_type": "default",
            "rope_theta": text.pop("rope_theta"),
            "mrope_section": list(text.pop("mrope_section")),
            "mrope_interleaved": True,
        }
        vision["deepstack_visual_indexes"] = list(self.vision.deepstack_visual_indexes)
        vision["out_hidden_size"] = self.text.hidden_size
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": MODEL_TYPE,
            "text_config": {**text, **_TEXT, "rope_parameters": rope},
            "vision_config": {**vision, **_VISION, "model_type": "qwen3_vl_vision"},
            "tie_word_embeddings": self.tie_word_embeddings,
            "image_token_id": self.image_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
        }

    def preprocessor_dict(self) -> dict[str, Any]:
        """The dict of the publisher's preprocessor_config.json."""
        return {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            **_processing(self.vision),
        }

    def parameters(self) -> int:
        """How many the network has."""
        text, vision = self.text, self.vision
        d, v, m = text.hidden_size, vision.hidden_size, vision.spatial_merge_size**2
        heads = text.num_attention_heads + text.num_key_value_heads
        layer = 2 * d * heads * text.head_dim + 3 * d * text.intermediate_size
        layer += 2 * d + 2 * text.head_dim  # norms
        block = _linear(v, 3 * v) + _linear(v, v) + 4 * v
        block += _linear(v, vision.intermediate_size) + _linear(vision.intermediate_size, v)
        merger = _linear(m * v, m * v) + _linear(m * v, d)
        taps = len(vision.deepstack_visual_indexes)
        pixels = 3 * vision.temporal_patch_size * vision.patch_size**2
        tower = vision.depth * block + (1 + taps) * merger + 2 * v + taps * 2 * m * v
        tower += _linear(pixels, v) + vision.num_position_embeddings * v
        tables = (1 if self.tie_word_embeddings else 2) * text.vocab_size * d
        return text.num_hidden_layers * layer + d + tower + tables

    def image_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of a prepared image of (height, width)."""
        return math.prod(n // self.vision.side for n in size)

    def flops(self, question: int, images: int, size: tuple[int, int]) -> float:
        """FLOPs of the matrix products of one sample's forward pass.

        2 per weight and token, plus 4 n^2 heads head_dim a layer for attention (all pairs, as it is
        computed), with the vocabulary at the last position only.

        Args:
          question: tokens that are not of images.
          images: V.
          size: of a prepared image, (height, width).
        """
        text, vision = self.text, self.vision
        d, v, m = text.hidden_size, vision.hidden_size, vision.spatial_merge_size**2
        merged = self.image_tokens(size)
        patches, count = m * merged, question + images * merged
        heads = text.num_attention_heads + text.num_key_value_heads
        layer = 2 * count * (2 * d * heads * text.head_dim + 3 * d * text.intermediate_size)
        layer += 4 * count**2 * text.num_attention_heads * text.head_dim
        block = 2 * patches * (4 * v * v + 2 * v * vision.intermediate_size) + 4 * patches**2 * v
        mergers = (1 + len(vision.deepstack_visual_indexes)) * ((m * v) ** 2 + m * v * d)
        tower = vision.depth * block + 2 * merged * mergers
        tower += 2 * patches * 3 * vision.patch_size**2 * v
        return float(text.num_hidden_layers * layer + images * tower + 2 * text.vocab_size * d)


def _linear(features_in: int, features_out: int) -> int:
    """Parameters of a linear map with bias."""
    return (features_in + 1) * features_out


def _field(values: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in values:
        raise ValueError(f"{where} of Qwen3-VL lacks the field '{name}'")
    return values[name]


def _require(values: Mapping[str, Any], required: Mapping[str, Any], where: str) -> None:
    for name, value in required.items():
        if values.get(name, value) != value:
            given = short(repr(values[name]))
            raise ValueError(f"{where} field '{name}' is {given}; it has to be {value!r}")


def _text(values: Mapping[str, Any]) -> TextConfig:
    """Of text_config; RoPE in the published spelling (rope_scaling and rope_theta) or in that of
    transformers 5 (rope_parameters)."""
    _require(values, _TEXT, "text_config")
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= fields.mapping(values.get(name) or {}, name)
    _require(rope, _ROPE, "text_config's RoPE")
    theta = rope["rope_theta"] if "rope_theta" in rope else _field(
        values, "rope_theta", "text_config"
    )  # fmt: skip
    known = {
        name: _field(values, name, "text_config")
        for name in fields.names(TextConfig)
        if name not in ("rope_theta", "mrope_section")
    }
    known["rope_theta"] = theta
    known["mrope_section"] = _field(rope, "mrope_section", "text_config's RoPE")
    return TextConfig(**fields.checked(TextConfig, known, _LIMITS, "text_config."))


def _vision(values: Mapping[str, Any]) -> VisionConfig:
    _require(values, _VISION, "vision_config")
    rope = fields.mapping(values.get("rope_parameters") or {}, "rope_parameters")
    _require(rope, _AXIAL, "vision_config's RoPE")
    kind = values.get("model_type", MODEL_TYPE)
    if kind not in (MODEL_TYPE, f"{MODEL_TYPE}_vision"):
        raise ValueError(
            f"vision_config field 'model_type' is {short(repr(kind))}; it has to be '{MODEL_TYPE}'"
        )
    known = {name: _field(values, name, "vision_config") for name in fields.names(VisionConfig)}
    return VisionConfig(**fields.checked(VisionConfig, known, _LIMITS, "vision_config."))


def _processing(vision: VisionConfig) -> dict[str, Any]:
    """Fields of preprocessor_config.json that are as this network has them, or refused."""
    return {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _with_sizes(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with the bounds on pixels of preprocessor_config.json."""
    where = "preprocessor_config.json"
    _require(values, _processing(config.vision), where)
    size = fields.mapping(values.get("size") or {}, "size")
    names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    given = {ours: values.get(ours) for ours in names}  # as older files have them
    bounds: dict[str, Any] = {
        ours: _field(size, theirs, f"{where} size") if given[ours] is None else given[ours]
        for ours, theirs in names.items()
    }
    return dataclasses.replace(config, **fields.checked(Config, bounds, _LIMITS))
