"""What algorithms on the forward process share: they learn from final latents alone.

Noise is put on a latent x0 that was drawn, x_t = (1 - t) x0 + t eps, and the velocities of policies
are compared there. So the rollout may be of any solver, needs no log-probability, and its number of
steps is none of the loss's business.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from worldr1_jax.algorithms.base import Algorithm, Draw, Plan, Policies, Samples, Velocity
from worldr1_jax.algorithms.contrast import contrast
from worldr1_jax.fields import each_in_range, in_range, of_kind, one_of
from worldr1_jax.rollout import schedule, unipc
from worldr1_jax.rollout.sample import Sampler
from worldr1_jax.types import Trajectory

SOLVERS = ("euler", "unipc")


class Noised(NamedTuple):
    """Latents on the way to noise."""

    latents: Float[Array, "B f h w C"]  # x_t
    sigma: Float[Array, " B"]  # t
    noise: Float[Array, "B f h w C"]  # eps


class Contrasted(NamedTuple):
    """What the contrast of captions asks of each sample; 0 without a rival."""

    loss: Float[Array, " B"]
    gap: Float[Array, " B"]  # see contrast.py
    shared: Float[Array, " B"]  # how far the mean of both captions is from the base's, squared


@dataclass(frozen=True)
class Forward(Algorithm):
    """The fields that they share.

    Attributes:
      draws: noise levels at which a sample is looked at, one evaluation each, at least 1.
      levels: lowest and highest of them, in [0, 1]: where a movement is decided, above 0.9, or all.
      kl_weight: of `mean |v - v_base|^2`; at 0 the base's forward is not run and no KL is measured,
        while 1e-9 only measures it.
      absorb: with guidance in the rollout: True trains the branch of the prompt alone, which takes
        over what guidance did, at half the cost; False trains the guided velocity as it is sampled.
      solver: of the rollout: "euler" or "unipc", which needs fewer steps.
      advantage_max: advantage that counts in full, > 0; larger ones are cut.
      contrast: weight of the contrast of captions (contrast.py); at 0 there are no rivals.
      sharpness, margin: of the contrast, see contrast.py; > 0, and any.
      anchor: weight of `mean |(v(c) + v(c')) / 2 - the base's|^2`: captions that differ in the
        camera alone may part, and what they have in common stays; at 0 the base is not run.
    """

    draws: int = 3
    levels: tuple[float, float] = (0.0, 1.0)
    kl_weight: float = 1e-4
    absorb: bool = True
    solver: str = "euler"
    advantage_max: float = 5.0
    contrast: float = 0.0
    sharpness: float = 20.0
    margin: float = 4.0
    anchor: float = 0.0

    def __post_init__(self):
        in_range(
            self, draws=(1, 10**4), kl_weight=(0, 1e9), advantage_max=(1e-9, 1e9),
            contrast=(0, 1e9), sharpness=(1e-6, 1e6), margin=(-1e6, 1e6), anchor=(0, 1e9),
        )  # fmt: skip
        one_of(self, solver=SOLVERS)
        of_kind(self, bool, "absorb")
        each_in_range(self, levels=(0, 1), length=2)
        if self.levels[0] >= self.levels[1]:
            raise ValueError(f"levels is {self.levels}: the lower level comes first")
        if self.anchor and not self.contrast:
            raise ValueError("anchor is not 0, but contrast is: it holds what two captions share")

    @property
    def terms(self) -> int:
        """One for each noise level."""
        return self.draws

    @property
    def captions(self) -> int:
        """Two, where captions are contrasted."""
        return 2 if self.contrast else 1

    @property
    def anchors(self) -> int:
        """Evaluations of the base that the anchor takes: both captions'."""
        return 2 if self.contrast and self.anchor else 0

    def branches(self, guidance: float) -> int:
        """One, where what guidance did is taken over."""
        return 1 if self.absorb else super().branches(guidance)

    def draw(self, key: PRNGKeyArray, update: int, plan: Plan) -> Draw:
        """Deterministic, by the solver that the field names; see `Algorithm.draw`."""
        last = schedule.lowest(plan.steps, plan.shift)
        if self.levels[1] < last:
            raise ValueError(
                f"levels is {self.levels}: the lowest noise level at which the rollout asks the "
                f"policy is {last:.3g}"
            )
        solver = unipc.make(plan.steps, plan.shift) if self.solver == "unipc" else None
        return Draw(Sampler(kind="none", guidance=plan.guidance), solver=solver)

    def keep(self, trajectory: Trajectory) -> Float[Array, "B f h w C"]:
        """The final latents."""
        return trajectory.latents

    def noised(
        self, keys: PRNGKeyArray, x0: Float[Array, "B f h w C"],
        sigmas: Float[Array, " T+1"], term: Array,
    ) -> Noised:  # fmt: skip
        """Each sample at a noise level of its own; the keys are consumed.

        The levels at which the rollout asked the policy, as far as they lie within `levels`, are
        cut into `draws` equal parts of the schedule. Level number `term` lies anywhere in its part.
        """
        steps = jnp.arange(sigmas.shape[0], dtype=jnp.float32)
        low, high = self.levels
        # Places in the schedule, of which interp wants the levels to ascend.
        ends = jnp.interp(jnp.array([high, low]), sigmas[::-1], steps[::-1])
        first, last = jnp.minimum(ends, steps[-2])

        def draw(key):
            level_key, noise_key = jax.random.split(key)
            share = (term + jax.random.uniform(level_key)) / self.draws
            return first + share * (last - first), jax.random.normal(noise_key, x0.shape[1:])

        place, noise = jax.vmap(draw)(keys)
        sigma = jnp.interp(place, steps, sigmas)
        t = sigma.reshape(-1, *[1] * (x0.ndim - 1))
        return Noised((1 - t) * x0 + t * noise, sigma, noise)

    def at(self, policy: Velocity, noised: Noised, text: Float[Array, "B N D"]) -> Array:
        """The velocity that is compared; see `absorb`."""
        guidance = {"guidance": 1.0} if self.absorb else {}
        return policy(noised.latents, noised.sigma, text, **guidance)

    def contrasted(
        self, policies: Policies, samples: Samples, noised: Noised, own: Float[Array, "B f h w C"]
    ) -> Contrasted:
        """Of the samples' own captions, under which the velocity is `own`, and their rivals."""
        zero = jnp.zeros_like(noised.sigma)
        if samples.rival is None:
            return Contrasted(zero, zero, zero)
        rival = self.at(policies.now, noised, samples.rival.text)
        loss, gap = contrast(
            own, rival, noised.noise - samples.kept, noised.sigma, samples.rival.lead,
            sharpness=self.sharpness, margin=self.margin,
        )  # fmt: skip
        if not self.anchor:
            return Contrasted(loss, gap, zero)
        texts = (samples.text, samples.rival.text)
        base = sum(self.at(policies.base, noised, text) for text in texts)
        return Contrasted(loss, gap, mean_square((own + rival - base) / 2))

    def strength(self, advantages: Float[Array, " B"]) -> Float[Array, " B"]:
        """Advantages in units of the largest, in [-1, 1]."""
        return jnp.clip(advantages / self.advantage_max, -1, 1)


def mean_square(x: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """Mean over all but the samples."""
    return jnp.mean(x**2, axis=tuple(range(1, x.ndim)))
