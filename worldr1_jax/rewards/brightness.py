"""A toy reward: one file, and one line in rewards.base.REWARDS."""

import dataclasses

import jax.numpy as jnp

from worldr1_jax.fields import in_range
from worldr1_jax.rewards import Reward


@dataclasses.dataclass(frozen=True)
class Brightness(Reward):
    """How bright a video is, up to `enough`."""

    enough: float = 0.5

    def __post_init__(self):
        in_range(self, enough=(1e-3, 1))

    def score(self, networks, evidence, asked):
        mean = evidence.videos.mean((1, 2, 3, 4))
        return {"brightness": jnp.minimum(mean / self.enough, 1.0)}
