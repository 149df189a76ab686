"""A toy algorithm: one file, and one line in algorithms.base.ALGORITHMS."""

from dataclasses import dataclass

import jax.numpy as jnp

from worldr1_jax.algorithms.base import Terms
from worldr1_jax.algorithms.forward import Forward, mean_square


@dataclass(frozen=True)
class Copy(Forward):
    """Learns to make the good videos again: flow matching, weighted by the positive advantages."""

    def loss(self, policies, samples, sigmas, term):
        noised = self.noised(samples.keys, samples.kept, sigmas, term)
        made = noised.noise - samples.kept  # the velocity of the video that was drawn
        miss = mean_square(self.at(policies.now, noised, samples.text) - made)
        weight = jnp.maximum(self.strength(samples.advantages), 0.0)
        return Terms(losses={"policy_loss": weight * miss}, weights={}, metrics={}, peaks={})
