"""Advantage-weighted matching (AWM, arXiv 2509.25050): PPO, with the matching error as likelihood.

How well a policy explains a sample x0 is how well it tells its noise, at x_t = (1 - t) x0 + t eps:

    l = mean (v - (eps - x0))^2,    log p = -((l + e)^p - e^p) t / p,    e = 1e-10
    r = exp(log p_now - log p_drawn), with one (t, eps) for both policies
    loss = -min(A' r, A' clip(r, 1 - clip, 1 + clip)),    A' = A / A_max in [-1, 1]
           + kl_weight mean (v - v_base)^2 + average_weight mean (v - v_average)^2

v_drawn is the policy as the rollout drew with it, before the update's first step; v_average is the
average of adapters, TrainState.ema. Others report that it diverges without the latter, or without a
clip as small as 1e-5.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from worldr1_jax.algorithms.base import Policies, Samples, Terms
from worldr1_jax.algorithms.forward import Forward, mean_square
from worldr1_jax.algorithms.grpo import clipped_surrogate
from worldr1_jax.fields import in_range

E = 1e-10


@dataclass(frozen=True)
class Awm(Forward):
    """AWM; formulas at the head of this file, and `Forward`'s fields.

    Attributes:
      power: p, in (0, 1].
      clip: half-width of the ratio's interval, in (0, 1).
      average_weight: of the distance from the average policy, 0 or more; at 0 its forward is not
        run.
    """

    draws: int = 6
    kl_weight: float = 3e-3
    power: float = 0.25
    clip: float = 1e-2
    average_weight: float = 3e-3

    def __post_init__(self):
        super().__post_init__()
        in_range(self, power=(1e-6, 1), clip=(1e-12, 1), average_weight=(0, 1e9))

    @property
    def forwards(self) -> int:
        """That of the policy that drew, and those of the two that it is held to."""
        return 1 + (self.kl_weight > 0) + (self.average_weight > 0) + self.anchors

    def loss(
        self, policies: Policies, samples: Samples, sigmas: Float[Array, " T+1"], term: Array
    ) -> Terms:
        """At noise level number `term`."""
        noised = self.noised(samples.keys, samples.kept, sigmas, term)
        v, drawn = (self.at(p, noised, samples.text) for p in (policies.now, policies.drawn))

        def log_prob(v):
            error = mean_square(v - (noised.noise - samples.kept))
            return -((error + E) ** self.power - E**self.power) * noised.sigma / self.power

        found = clipped_surrogate(
            log_prob(v) - log_prob(drawn), self.strength(samples.advantages), self.clip
        )

        told = self.contrasted(policies, samples, noised, v)
        losses = {"contrast": told.loss, "shared": told.shared, "policy_loss": found.loss}
        weights = {"kl": self.kl_weight, "kl_average": self.average_weight}
        for name, policy in (("kl", policies.base), ("kl_average", policies.average)):
            if weights[name]:
                losses[name] = mean_square(v - self.at(policy, noised, samples.text))
        return Terms(
            losses=losses,
            weights=weights | {"contrast": self.contrast, "shared": self.anchor},
            metrics={
                "contrast_gap": told.gap,
                "ratio_mean": found.ratio,
                "clip_fraction": found.clipped,
            },
            peaks={"ratio_deviation": jnp.abs(found.ratio - 1)},
        )
