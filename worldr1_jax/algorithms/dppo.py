"""Flow-DPPO (arXiv 2606.11025): a trust region of the steps' KL in place of a clipped ratio.

Both policies' steps are Gaussians of one std, so their divergence is known and need not be judged
by one draw's ratio r:

    d = mean((mean_now - mean_drawn)^2) / (2 std^2)
    loss = -A r + kl_weight KL,    without -A r where d >= tau and r is already beyond 1 on the side
                                   that A asks for

The drawn means are not stored: a drawn state less its noise, which the keys give again, is one.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from worldr1_jax.algorithms.grpo import Surrogate, Windowed, WindowStep
from worldr1_jax.fields import in_range
from worldr1_jax.rollout import sde


@dataclass(frozen=True)
class Dppo(Windowed):
    """Flow-DPPO; formulas at the head of this file.

    Attributes:
      tau: divergence, a mean over latent dimensions, from which on a step is held; > 0.
    """

    tau: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        in_range(self, tau=(1e-30, 1e9))

    def surrogate(
        self, step: WindowStep, advantages: Float[Array, " B"], sigmas: Float[Array, " T+1"]
    ) -> Surrogate:
        """The ratio's, held where the step has gone far enough."""
        ratio = jnp.exp(step.log_ratio)
        far = sde.kl(step.mean, step.mean_drawn, step.std) >= self.tau
        held = far & (advantages * (ratio - 1) > 0)
        loss = -advantages * jnp.where(held, jax.lax.stop_gradient(ratio), ratio)
        return Surrogate(loss, ratio, held)
