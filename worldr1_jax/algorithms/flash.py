"""Flash-GRPO (arXiv 2605.15980): one stochastic step a prompt, and gradients of one size.

The step is drawn for each prompt; the members of its group share it, so that they differ by what
one step did. How strongly the log-probability of step i sees the velocity is its gain

    c_i = |d mean_i / d v| / std_i = sqrt(D) / s + s sqrt(D) (1 - sigma) / (2 sigma)   (flow-SDE)

and it doubles within the first half of a shifted schedule: what a prompt teaches would depend on
the step that it drew. So

    loss = w_i clipped loss + kl_weight KL,    w_i = (1 / c_i) / mean over window_range of 1 / c

Departure: the release divides by the batch's mean of 1 / c, which depends on what was drawn.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from worldr1_jax.algorithms.grpo import Grpo, Surrogate, WindowStep
from worldr1_jax.rollout.sample import Sampler, stochastic_step


@dataclass(frozen=True)
class Flash(Grpo):
    """Flash-GRPO; formulas at the head of this file, fields as Flow-GRPO's, defaults its release's
    (20 steps, guidance 4.5)."""

    kl_weight: float = 0.0
    eta: float = 1.0
    level: str = "linear"
    window: int = 1
    window_range: tuple[int, int] = (0, 10)
    window_place: str = "group"

    def surrogate(
        self, step: WindowStep, advantages: Float[Array, " B"], sigmas: Float[Array, " T+1"]
    ) -> Surrogate:
        """PPO's, by the step's weight."""
        found = super().surrogate(step, advantages, sigmas)
        weights = step_weights(self.sampler(), sigmas, self.window_range)
        return found._replace(loss=weights[step.index] * found.loss)


def step_gains(sampler: Sampler, sigmas: Float[Array, " T+1"]) -> Float[Array, " T-1"]:
    """c of every step but the last. Steps are linear in v: c is read off at x = 0, v = 1."""
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))

    def gain(index):
        step = stochastic_step(sampler, zero, one, sigmas, index)
        return jnp.abs(step.mean[0, 0]) / step.std

    return jax.vmap(gain)(jnp.arange(sigmas.shape[0] - 2))


def step_weights(
    sampler: Sampler, sigmas: Float[Array, " T+1"], window_range: tuple[int, int]
) -> Float[Array, " T-1"]:
    """w of every step but the last; the mean over the range is 1."""
    inverse = 1 / step_gains(sampler, sigmas)
    return inverse / inverse[slice(*window_range)].mean()
