"""Clipped surrogate and the equalisation of gradients between denoising steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from worldr1_jax.rollout.sample import Sampler, stochastic_step

EQUALISE = ("none", "flash", "grpo_guard")


class Surrogate(NamedTuple):
    """Per sample: loss, probability ratio, and whether the clip stopped its gradient."""

    loss: Float[Array, " B"]
    ratio: Float[Array, " B"]
    clipped: Bool[Array, " B"]


def clipped_surrogate(
    log_ratio: Float[Array, " B"], advantages: Float[Array, " B"], clip: float
) -> Surrogate:
    """`-min(A r, A clip(r, 1 - clip, 1 + clip))` of each sample, with `r = exp(log_ratio)`.

    Args:
      log_ratio: log-probability now minus at the rollout, both means over latent dimensions.
      advantages: from `advantage.group_advantage`.
      clip: half-width of the trust interval, in (0, 1); 1e-3 to 1e-5 is usual, for the log-ratio is
        a mean over the latent, not a sum.
    """
    ratio = jnp.exp(log_ratio)
    free = advantages * ratio
    bounded = advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    return Surrogate(-jnp.minimum(free, bounded), ratio, bounded < free)


def step_gains(sampler: Sampler, sigmas: Float[Array, " T+1"]) -> Float[Array, " T-1"]:
    """`|d mean / d v| / std` of every step but the last: how strongly a step's log-prob sees v.

    Steps are linear in v, so the gain is read off at x = 0, v = 1; for the flow-SDE this is
    `sqrt(D) / s + s sqrt(D) (1 - sigma) / (2 sigma)`.
    """
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))

    def gain(index):
        step = stochastic_step(sampler, zero, one, sigmas, index)
        return jnp.abs(step.mean[0, 0]) / step.std

    return jax.vmap(gain)(jnp.arange(sigmas.shape[0] - 2))


def flash_weights(sampler: Sampler, sigmas: Float[Array, " T+1"]) -> Float[Array, " T-1"]:
    """Weight of each step's loss: the inverse of its gain, normalised to mean 1 over the schedule.

    Flash-GRPO (arXiv 2605.15980). Without it, a large shift lets late steps' gradients vanish.
    Over the schedule, not the window: a window of one step would otherwise always have weight 1.
    """
    inverse = 1 / step_gains(sampler, sigmas)
    return inverse / inverse.mean()
