"""DiffusionNFT (arXiv 2509.16117): towards good samples and away from bad ones, without a
likelihood.

The policy v moves from an old one, v_old, which draws the rollouts. A mixture of both, and the same
mixed beyond v_old, are asked for the sample x0 that was drawn, at x_t = (1 - t) x0 + t eps:

    v+- = (1 -+ beta) v_old +- beta v,    x+- = x_t - t v+-,    w+- = max(mean |x+- - x0|, 1e-5)
    r = clip(1/2 + A / (2 A_max), 0, 1)
    loss = (A_max / beta) [ r mean (x+ - x0)^2 / w+  +  (1 - r) mean (x- - x0)^2 / w- ]
           + kl_weight mean (v - v_base)^2,    w without gradient
    after each rollout:  v_old <- decay v_old + (1 - decay) v,  in the space of adapters

The old policy is a second set of adapters, in the train state. Departure: the release copies v into
v_old at first (decay 0, for up to 75 rollouts), and nothing contrastive is learnt until they
differ; here the decay is one number from the first update on.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from worldr1_jax.algorithms.base import Policies, Samples, Terms
from worldr1_jax.algorithms.forward import Forward, mean_square
from worldr1_jax.fields import in_range

LEAST = 1e-5  # of w


@dataclass(frozen=True)
class Nft(Forward):
    """DiffusionNFT; formulas at the head of this file, and `Forward`'s fields.

    Attributes:
      beta: how far the mixtures go from the old policy, > 0: 1 for one reward, 0.1 for several.
      decay: of the old policy, in [0, 1).
    """

    beta: float = 1.0
    decay: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        in_range(self, beta=(1e-6, 1e6), decay=(0, 1 - 1e-9))

    @property
    def forwards(self) -> int:
        """The old policy's, and the base's where there is a KL or an anchor."""
        return 1 + (self.kl_weight > 0) + self.anchors

    def remember(self, adapters: PyTree) -> PyTree:
        """The old policy's adapters."""
        return adapters

    def renew(self, memory: PyTree, adapters: PyTree) -> PyTree:
        """Moves the old policy towards the one that learns."""
        return jax.tree.map(lambda a, b: self.decay * a + (1 - self.decay) * b, memory, adapters)

    def drawing(self, adapters: PyTree, memory: PyTree) -> PyTree:
        """The old policy draws."""
        return memory

    def loss(
        self, policies: Policies, samples: Samples, sigmas: Float[Array, " T+1"], term: Array
    ) -> Terms:
        """At noise level number `term`."""
        x0 = samples.kept
        noised = self.noised(samples.keys, x0, sigmas, term)
        old, v = (self.at(p, noised, samples.text) for p in (policies.drawn, policies.now))
        t = noised.sigma.reshape(-1, *[1] * (x0.ndim - 1))

        def miss(sign):
            error = noised.latents - t * (old + sign * self.beta * (v - old)) - x0
            size = jnp.mean(jnp.abs(error), axis=tuple(range(1, x0.ndim)))
            return mean_square(error) / jax.lax.stop_gradient(jnp.maximum(size, LEAST))

        r = (1 + self.strength(samples.advantages)) / 2
        scale = self.advantage_max / self.beta
        told = self.contrasted(policies, samples, noised, v)
        losses = {
            "policy_loss": scale * (r * miss(1) + (1 - r) * miss(-1)),
            "contrast": told.loss,
            "shared": told.shared,
        }
        if self.kl_weight > 0:
            losses["kl"] = mean_square(v - self.at(policies.base, noised, samples.text))
        return Terms(
            losses=losses,
            weights={
                "kl": self.kl_weight,
                "contrast": self.contrast,
                "shared": self.anchor,
            },
            metrics={"moved": mean_square(v - old), "contrast_gap": told.gap},
            peaks={},
        )
