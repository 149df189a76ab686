"""Colours: whether the things that a prompt names in colour are on screen, and no others.

A witness of R_gen in the nano world that no network can be fooled through. Nano learns from its own
CLIP (rewards/preference.py), which reads the whole sentence: colours alone are won by any two flat
areas of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

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
TOLERANCE = 0.10  # standard deviation of the match, in units of unit-length colour
AROUND = 3  # pixels, side of the square that has to show a colour as a whole
ENOUGH = 0.008  # share of a frame, of such squares' centres, that shows a colour well (63%)
# Of floors and backdrops of the nano world too: no sign of a thing that nobody asked for.
BACKDROPS = ("yellow", "orange", "white")


def targets(prompts: Sequence[str]) -> Bool[np.ndarray, "B C"]:
    """Which colours of PALETTE each prompt's scene names right before a noun of its own.

    "under a blue sky" names a backdrop, not a thing; backdrops are passed over.
    """
    rows = []
    for prompt in prompts:
        text = re.sub(r"\b(\w+) (sky|walls?|room|floor)\b", r"\2", prompt.lower())
        words = set(re.findall(r"[a-z]+", text))
        rows.append([color in words for color in PALETTE])
    return np.array(rows, bool).reshape(len(prompts), len(PALETTE))


def palette(videos: Float[Array, "B F H W 3"], named: Bool[Array, "B C"]) -> Float[Array, " B"]:
    """Mean over named colours of what is shown of them, times 1 - the mean of what is shown of
    colours that are not named (BACKDROPS aside); in [0, 1].

    shown: mean over frames of `1 - exp(-area / 0.008)`. area: share of pixels around which all of a
    3x3 square matches the colour's direction, softly; shading does not matter, but a pixel has to
    be saturated (or, for white, bright). So noise shows nothing, and a mosaic of all colours as
    much that is wrong as is right. A prompt that names no colour scores 1: nothing it asked for is
    missing.
    """
    shown = jnp.stack([_shown(videos, rgb) for rgb in PALETTE.values()], axis=1)
    strange = ~named & np.array([color not in BACKDROPS for color in PALETTE])
    score = _mean(shown, named) * (1 - _mean(shown, strange))
    return jnp.where(named.any(1), score, 1.0).astype(jnp.float32)


def _shown(videos: Float[Array, "B F H W 3"], rgb: Sequence[float]) -> Float[Array, " B"]:
    """How well a colour is shown, see `palette`."""
    length = length_of(videos)[..., None]  # 0, without a gradient, where black
    wanted = np.asarray(rgb, np.float32) / np.linalg.norm(rgb)
    difference = videos / jnp.maximum(length, 1e-3) - wanted
    match = jnp.exp(-jnp.sum(difference**2, -1) / (2 * TOLERANCE**2))
    match *= length[..., 0] > (0.85 if min(rgb) > 0.8 else 0.25)
    whole = -nnx.max_pool(-match[..., None], (AROUND, AROUND))
    return jnp.mean(1 - jnp.exp(-jnp.mean(whole, (-3, -2, -1)) / ENOUGH), axis=1)


def _mean(shown: Float[Array, "B C"], where: Bool[Array, "B C"]) -> Float[Array, " B"]:
    return jnp.sum(shown * where, 1) / jnp.maximum(where.sum(1), 1)


@dataclasses.dataclass(frozen=True)
class Palette(Reward):
    """`palette` as a reward."""

    def ask(self, prompts: Sequence[str]) -> Any:
        return targets(prompts)

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        return {"palette": palette(evidence.videos, asked)}
