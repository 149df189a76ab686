"""GRPO-Guard (arXiv 2510.22319): ratios that are centred and of one scale at every step.

At an unchanged policy the log-ratio of a Gaussian step has a negative mean, b = KL(now, drawn), and
a spread of 1 / std, so that a clip acts at some steps and never at others. Here, with the step's
length D = sigma - sigma_next,

    log r = (log p_now - log p_drawn + b) std,    b = mean((mean_now - mean_drawn)^2) / (2 std^2)
    loss  = clipped loss of r / D + kl_weight KL

Then log r is mean(noise (mean_now - mean_drawn)), whatever the step's std.
"""

from dataclasses import dataclass

from jaxtyping import Array, Float

from worldr1_jax.algorithms.grpo import Grpo, Surrogate, WindowStep, clipped_surrogate
from worldr1_jax.rollout import sde


@dataclass(frozen=True)
class Guard(Grpo):
    """GRPO-Guard; formulas at the head of this file, fields as Flow-GRPO's."""

    def surrogate(
        self, step: WindowStep, advantages: Float[Array, " B"], sigmas: Float[Array, " T+1"]
    ) -> Surrogate:
        """PPO's, of the centred ratio and by the step's length."""
        bias = sde.kl(step.mean, step.mean_drawn, step.std)
        log_ratio = (step.log_ratio + bias) * sde.of_samples(step.std)
        found = clipped_surrogate(log_ratio, advantages, self.clip)
        length = sigmas[step.index] - sigmas[step.index + 1]
        return found._replace(loss=found.loss / length)
