"""R_gen, the part of the reward that does not look at geometry.

`palette` asks whether the colours that a prompt names are on screen. It stands where World-R1 has
HPS, which nano's 64-pixel shapes would mean nothing to, and it keeps the 3D rewards from being won
by an empty room.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from worldr1_jax.geometry import length as length_of
from worldr1_jax.rewards.base import Evidence, Parts, Reward

# Colour words and their sRGB-like values, far apart in hue; white is told by brightness.
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.12, 0.65, 0.18),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.92, 0.82, 0.12),
    "purple": (0.55, 0.15, 0.70),
    "orange": (0.95, 0.48, 0.08),
    "white": (0.92, 0.92, 0.92),
    "cyan": (0.10, 0.78, 0.80),
}
MAX_COLORS = 4
TOLERANCE = 0.10  # standard deviation of the match, in units of unit-length colour
ENOUGH = 0.015  # share of a frame that shows a colour well (63% of the score)


def targets(prompts: Sequence[str]) -> tuple[Float[np.ndarray, "B M 3"], Float[np.ndarray, "B M"]]:
    """The colours that each prompt's scene names right before a noun of its own, and which places
    are used.

    "under a blue sky" names a backdrop, not a thing; backdrops are passed over.
    """
    colors = np.zeros((len(prompts), MAX_COLORS, 3), np.float32)
    used = np.zeros((len(prompts), MAX_COLORS), np.float32)
    for row, prompt in enumerate(prompts):
        text = re.sub(r"\b(\w+) (sky|walls?|room|floor)\b", r"\2", prompt.lower())
        named = [w for w in re.findall(r"[a-z]+", text) if w in PALETTE][:MAX_COLORS]
        for place, name in enumerate(named):
            colors[row, place], used[row, place] = PALETTE[name], 1.0
    return colors, used


def palette(
    videos: Float[Array, "B F H W 3"], colors: Float[Array, "B M 3"], used: Float[Array, "B M"]
) -> Float[Array, " B"]:
    """Mean over named colours and frames of `1 - exp(-area / 0.015)`, in [0, 1].

    area: share of the frame's pixels whose colour direction matches, softly; shading does not
    matter, but a pixel has to be saturated (or, for white, bright). A prompt that names no colour
    scores 1: nothing it asked for is missing.
    """
    length = length_of(videos)[..., None]  # 0, without a gradient, where black
    direction = videos / jnp.maximum(length, 1e-3)
    wanted = colors / jnp.maximum(jnp.linalg.norm(colors, axis=-1, keepdims=True), 1e-3)

    def area(index):
        difference = direction - wanted[:, index, None, None, None, :]
        match = jnp.exp(-jnp.sum(difference**2, -1) / (2 * TOLERANCE**2))
        floor = jnp.where(colors[:, index].min(-1) > 0.8, 0.85, 0.25)[:, None, None, None]
        bright = length[..., 0] > floor
        return jnp.mean(match * bright, (-2, -1))

    shown = jnp.stack([1 - jnp.exp(-area(i) / ENOUGH) for i in range(colors.shape[1])], 1)
    per_color = shown.mean(-1)
    count = used.sum(1)
    score = jnp.sum(per_color * used, 1) / jnp.maximum(count, 1)
    return jnp.where(count > 0, score, 1.0).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Palette(Reward):
    """`palette` as a reward."""

    def ask(self, prompts: Sequence[str]) -> Any:
        return targets(prompts)

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        return {"palette": palette(evidence.videos, *asked)}
