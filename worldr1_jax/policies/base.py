"""What a policy is, and the table of the families that there are.

A new family is one file and one line: a module with the functions of `Family`, whose `load` gives a
`Policy`, and its row in FAMILIES under the `_class_name` of the config.json of its denoiser.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.fields import in_range, of_kind, one_of
from worldr1_jax.files import short
from worldr1_jax.nn.layers import HELD
from worldr1_jax.nn.lora import LAYERS, Adapters
from worldr1_jax.weights.convert import read_config

FAMILIES = {
    "WanTransformer3DModel": "worldr1_jax.policies.wan",
    "WanModel": "worldr1_jax.policies.wan",  # in Wan-Video's own release
}

POLICY, VAE, TEXT = "policy", "vae", "text"  # names of the networks, also in `idle_on_host`


@dataclasses.dataclass(frozen=True)
class Options:
    """How a policy is loaded and trained; its fields are `policy` of the config.

    Attributes:
      weights: folder in diffusers' layout, of the publisher's own release, or of
        launch/convert_weights.py; "nano" for what ships with the package.
      adapters: what training starts from, a run's workdir or LoRA, "path:0.8" for a strength; "":
        adapters that change nothing yet. The KL is to the base without any.
      text_cache: folder of launch/encode_prompts.py, with which the text encoder is not loaded; ""
        to encode.
      chunked_vae: decode by chunks of frames, in memory that does not grow with their number.
      lora_rank, lora_alpha: of the adapters.
      lora_layers: what has them: all "attention", or "cross"-attention alone, where the prompt
        enters.
      dtype: of products and resting weights; adapters, norms and softmax stay float32.
      remat: what the backward pass recomputes (`layers.scan_layers`).
      text_tokens: padded length of prompts.
    """

    weights: str
    adapters: str = ""
    text_cache: str = ""
    chunked_vae: bool = True
    lora_rank: int = 32
    lora_alpha: float = 64.0
    lora_layers: str = "attention"
    dtype: str = "bfloat16"
    remat: str = "full"
    text_tokens: int = 512

    def __post_init__(self) -> None:
        in_range(self, lora_rank=(1, 4096), lora_alpha=(1e-6, 1e6), text_tokens=(1, 10**5))
        one_of(
            self, dtype=("float32", "bfloat16", "float16"), remat=tuple(HELD),
            lora_layers=tuple(LAYERS),
        )  # fmt: skip
        of_kind(self, str, "weights", "adapters", "text_cache")
        of_kind(self, bool, "chunked_vae")


@dataclasses.dataclass(frozen=True)
class Work:
    """What one forward of the denoiser takes for one video and one branch of guidance.

    Attributes:
      tokens, width, layers, heads: of the residual stream.
      linear, scores: FLOPs of products with weights, and of attention.
      weights: parameters of the blocks.
    """

    tokens: int
    width: int
    layers: int
    heads: int
    linear: float
    scores: float
    weights: int


class Shape(Protocol):
    """A model as its small files describe it."""

    @property
    def heads(self) -> int:
        """Attention heads of the denoiser."""

    @property
    def text_width(self) -> int:
        """D of the embeddings."""

    def latents(self, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """(f, h, w, C) of the latents of a video of (frames, height, width) pixels.

        Raises:
          ValueError: a size that the model cannot make.
        """

    def work(self, size: tuple[int, int, int], text_tokens: int) -> Work:
        """Of a video of (frames, height, width) pixels."""


class Policy(Protocol):
    """A model that samples videos; the methods with `networks` are pure functions of these.

    Attributes:
      networks: POLICY, the denoiser, whose LoRA leaves are trained; VAE; TEXT, but where prompts
        come encoded.
      shape: see there.
    """

    @property
    def networks(self) -> Mapping[str, nnx.Module]:
        """By name."""

    @property
    def shape(self) -> Any:
        """A `Shape`."""

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Arrays [B ...] that `embed` takes; on the host."""

    def embed(self, networks: Any, tokens: tuple[Array, ...]) -> Float[Array, "B N D"]:
        """Prompts to embeddings, padded places at zero."""

    def velocity(
        self,
        networks: Any,
        latents: Float[Array, "B f h w C"],
        timestep: Float[Array, " B"],
        text: Float[Array, "B N D"],
        *,
        adapters: bool,
    ) -> Float[Array, "B f h w C"]:
        """eps - x0, whatever the network predicts; `timestep` is sigma * 1000."""

    def decode(
        self, networks: Any, latents: Float[Array, "B f h w C"], *, chunked: bool
    ) -> Float[Array, "B F H W 3"]:
        """Latents to videos in [0, 1]; `chunked` bounds memory, whatever their length."""


class Family(Protocol):
    """The functions of a family's module; errors are ValueErrors of one sentence."""

    def read(self, folder: str | Path) -> Shape:
        """From the small files alone."""

    def load(self, folder: str | Path, **options: Any) -> Policy:
        """Every part onto the mesh; options as those of policies.wan.load."""

    def load_text(self, folder: str | Path, **options: Any) -> Policy:
        """Text encoder and tokenizer alone."""

    def text_files(self, folder: str | Path) -> list[Path]:
        """What embeddings depend on: encoder and tokenizer."""

    def load_adapters(self, paths: Sequence[str], folder: str | Path, kind: str) -> Adapters:
        """Adapters of runs, or of LoRA files, "path:0.8" for a strength, together."""

    def read_adapters(self, paths: Sequence[str], folder: str | Path, kind: str) -> Any:
        """The same as `store` folds them in: with whatever else the files change."""

    def store(self, folder: str | Path, to: str | Path, **options: Any) -> None:
        """Converts a folder; options as those of policies.wan.store."""

    def described(self, size: str, mesh: jax.sharding.Mesh, **options: Any) -> Policy:
        """A published size, "small" or "large", as shapes that lie on the mesh; for plans."""


def family(folder: str | Path) -> Any:
    """The module of the family (see `Family`) of a folder of weights.

    Raises:
      ValueError: a folder of no known family, or none.
    """
    root = Path(folder)
    found = [p for p in (root / "transformer", root) if (p / "config.json").is_file()]
    if not found:
        raise ValueError(
            f"policy.weights '{folder}' has neither transformer/config.json nor config.json: give "
            "a folder in diffusers' layout or of Wan-Video's own release"
        )
    name = read_config(found[0]).get("_class_name", "WanModel")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"policy.weights '{folder}' is a {short(str(name))}: it has to be one of "
            f"{', '.join(FAMILIES)}"
        )
    return importlib.import_module(FAMILIES[name])
