"""HPSv2.1 and PickScore: which of two images people would rather have for a prompt, learnt from
their choices, as a reward of videos.

Both are the cosine of a CLIP ViT-H/14 between frames and prompt, with weights of their own. A video
is judged by the mean over a few frames, evenly spaced with both ends, the same for every video;
the published trainers take one (World-R1 a random one). The prompt goes without its camera
sentence, which no frame can show and which spends some of CLIP's 77 tokens.

HPSv2.1: xswu/HPSv2 (arXiv 2306.09341). PickScore: yuvalkirstain/PickScore_v1 (arXiv 2305.01569).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from worldr1_jax.camera import commands
from worldr1_jax.fields import in_range, of_kind, one_of
from worldr1_jax.mesh import placement
from worldr1_jax.models import clip
from worldr1_jax.rewards.base import Evidence, Networks, Parts, Reward
from worldr1_jax.rewards.reconstruct import frame_indices
from worldr1_jax.weights.needed import Needed
from worldr1_jax.weights.shipped import resolve

# What PickScore's logits are divided by where they are a reward, for scores near 1.
LOGITS = 26.0


def hps(image: Float[Array, "B V D"], text: Float[Array, "B D"]) -> Float[Array, " B"]:
    """Mean cosine of a prompt with V frames, in [-1, 1]; with HPSv2.1's weights 0.2 to 0.35 for
    most. Embeddings are of length 1."""
    return jnp.einsum("bvd,bd->bv", image, text, precision="highest").mean(-1)


def pickscore(
    image: Float[Array, "B V D"], text: Float[Array, "B D"], logit_scale: Float[Array, ""]
) -> Float[Array, " B"]:
    """Mean logit of a prompt with V frames over 26; with PickScore's weights 0.78 to 0.90 for
    most. Embeddings are of length 1."""
    return jnp.exp(logit_scale) * hps(image, text) / LOGITS


def evenly(videos: Float[Array, "B F H W 3"], count: int) -> Float[Array, "B V H W 3"]:
    """`count` frames of each video, evenly spaced, ends included; all where there are fewer."""
    return videos[:, frame_indices(videos.shape[1], min(count, videos.shape[1]))]


@dataclasses.dataclass(frozen=True)
class Hps(Reward):
    """`hps` as a reward.

    Attributes:
      weights: file or folder of CLIP's (see models/clip/names.py), such as
        HPS_v2.1_compressed.pt; "nano": the CLIP of the nano world that ships with the package.
      tokenizer: folder of CLIP's tokenizer; "": the one of the weights.
      frames: of a video that are looked at, at most.
      fit: how a frame becomes CLIP's square, out of clip.FITS: "pad" as HPSv2 has it, "crop" as
        PickScore has it, or "squeeze".
    """

    name: ClassVar[str] = "hps"
    published: ClassVar[tuple[str, str, str]] = (
        "xswu/HPSv2, HPS_v2.1_compressed.pt", "2.0 GB", "Apache-2.0"
    )  # fmt: skip

    weights: str = ""
    tokenizer: str = ""
    frames: int = 8
    fit: str = "pad"

    def __post_init__(self) -> None:
        in_range(self, frames=(1, 10**6))
        of_kind(self, str, "weights", "tokenizer")
        one_of(self, fit=clip.FITS)

    def needed(self) -> tuple[Needed, ...]:
        what, size, licence = self.published
        return (
            Needed(f"rewards.{self.name}.weights", self.weights, what, size, licence, ("clip",)),
        )

    def check(self) -> None:
        super().check()
        self._source  # noqa: B018 (says what is missing in a sentence of its own)
        try:
            self._words  # noqa: B018 (reads the config and the tokenizer)
        except ValueError as error:
            raise ValueError(f"rewards.{self.name}: {error}") from error

    def networks(self, mesh: jax.sharding.Mesh, dtype: Any) -> Networks:
        self.check()
        return {"clip": clip.load(self._source, dtype=dtype, mesh=mesh)}

    def described(self, mesh: jax.sharding.Mesh, dtype: Any) -> Networks:
        config = clip.Config.vit_h_14()
        network = nnx.eval_shape(
            lambda: clip.CLIP(config, nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        )
        return {"clip": placement.describe(network, clip.PLACES, mesh)}

    def ask(self, prompts: Sequence[str]) -> Int[np.ndarray, "B T"]:
        """Token ids of the sentences about the scenes; a prompt that is all camera is kept. A plan,
        which has no tokenizer, gets as many."""
        if not self.weights:
            return np.zeros(
                (len(prompts), clip.Config.vit_h_14().max_position_embeddings), np.int32
            )
        return self._words([commands.scene(prompt).strip() or prompt for prompt in prompts])

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        image, text = self._embed(networks["clip"], evidence, asked)
        return {self.name: hps(image, text)}

    def _embed(self, network: clip.CLIP, evidence: Evidence, asked: Any) -> tuple[Array, Array]:
        """Of the frames [B V D] and of the prompts [B D]."""
        frames = evenly(evidence.videos, self.frames)
        batch, views = frames.shape[:2]
        pixels = clip.preprocess(frames.reshape(-1, *frames.shape[2:]), network.config, self.fit)
        return network.image(pixels).reshape(batch, views, -1), network.text(jnp.asarray(asked))

    @property
    def _source(self) -> Path:
        if self.weights != "nano":
            return Path(self.weights)  # or one file
        return resolve("nano", "clip", field=f"rewards.{self.name}.weights")

    @cached_property
    def _words(self) -> clip.Tokenizer:
        folder = self._source
        if self.tokenizer:
            folder = Path(self.tokenizer)
        elif folder.is_file():
            folder = folder.parent
        config = clip.read_config(self._source)
        words = clip.Tokenizer(folder, config.max_position_embeddings)
        words.check(config)
        return words


@dataclasses.dataclass(frozen=True)
class PickScore(Hps):
    """`pickscore` as a reward; attributes as Hps, `weights` such as the folder PickScore_v1."""

    name: ClassVar[str] = "pickscore"
    published: ClassVar[tuple[str, str, str]] = (
        "yuvalkirstain/PickScore_v1", "3.9 GB", "MIT, by its repository"
    )  # fmt: skip

    fit: str = "crop"

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        image, text = self._embed(networks["clip"], evidence, asked)
        return {self.name: pickscore(image, text, networks["clip"].logit_scale[...])}
