"""Flow-GRPO (arXiv 2505.05470): PPO's clipped loss on the stochastic steps of a window.

A step of the window was drawn as `x' ~ N(mean, std^2)`, its mean linear in the velocity (sde.py).
With log-probabilities that are means over the latent's dimensions, and the advantage A,

    r = exp(log p_now(x') - log p_drawn(x'))
    loss = -min(A r, A clip(r, 1 - clip, 1 + clip)) + kl_weight KL
    KL = mean((mean_now - mean_base)^2) / (2 std^2)

Steps outside the window are deterministic and are not trained (Flow-GRPO-Fast, MixGRPO).
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from worldr1_jax.algorithms.base import Algorithm, Draw, Plan, Policies, Samples, Terms
from worldr1_jax.fields import each_in_range, in_range, one_of
from worldr1_jax.rollout import schedule, sde
from worldr1_jax.rollout.sample import Sampler, step_noise, stochastic_step
from worldr1_jax.types import Trajectory

PLACES = ("random", "progressive", "group")
SHARES = ("none", "noise", "prefix")


@flax.struct.dataclass
class Window:
    """What is kept of a rollout: the W + 1 states of each sample's window."""

    states: Float[Array, "B W+1 f h w C"]  # before each step, and after the last one
    log_prob: Float[Array, "B W"]  # of each step, under the policy that drew it
    start: Int[Array, ""] | Int[Array, " B"]  # index of the first step in the schedule
    keys: PRNGKeyArray  # give the steps' noise again


@dataclass(frozen=True)
class WindowStep:
    """A step of the window as it was drawn, and as the policy would draw it now."""

    index: Int[Array, ""] | Int[Array, " B"]  # in the schedule
    log_ratio: Float[Array, " B"]  # log p_now - log p_drawn
    mean: Float[Array, "B f h w C"]  # now
    mean_drawn: Float[Array, "B f h w C"]
    std: Float[Array, "..."]  # of both; one number, or one a sample that broadcasts with the means


class Surrogate(NamedTuple):
    """Per sample: loss, probability ratio, and whether its gradient is stopped."""

    loss: Float[Array, " B"]
    ratio: Float[Array, " B"]
    clipped: Bool[Array, " B"]


def clipped_surrogate(
    log_ratio: Float[Array, " B"], advantages: Float[Array, " B"], clip: float
) -> Surrogate:
    """`-min(A r, A clip(r, 1 - clip, 1 + clip))` of each sample, with `r = exp(log_ratio)`."""
    ratio = jnp.exp(log_ratio)
    free = advantages * ratio
    bounded = advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    return Surrogate(-jnp.minimum(free, bounded), ratio, bounded < free)


@dataclass(frozen=True)
class Windowed(Algorithm):
    """What algorithms on a window of stochastic steps share: all but their `surrogate`.

    Attributes:
      kl_weight: beta of the KL to the policy without adapters; at 0 its forward is not run and no
        KL is measured, while 1e-9 only measures it.
      sde: noise of the window: "flow" (flow-SDE) or "cps" (coefficients-preserving).
      eta: its amount: 0.7 with level "sd3", 1 with "linear", 0.3 with "constant"; cps: in (0, 1].
      level: sigma -> noise level of the flow-SDE (`sde.noise_level`).
      window: W, stochastic steps of a rollout, at least 1.
      window_range: [first, last) of the steps that the window may cover.
      window_place: "random", "progressive" (from noise to data, as MixGRPO), or "group": random
        for each prompt, whose members share it.
      window_interval: updates at one place, when progressive.
      share: what the members of a group have in common before the window, where they branch:
        "none"; "noise": their starting noise, so that they differ by the window's noise alone, and
        less; "prefix": the same, and the steps before the window are taken once for a group. That
        saves (K - 1) / K of these: 19% of a rollout of 50 steps with windows of 3 in the first 25,
        and 13% of nano's.
    """

    kl_weight: float = 0.004
    sde: str = "flow"
    eta: float = 0.7
    level: str = "sd3"
    window: int = 3
    window_range: tuple[int, int] = (0, 25)
    window_place: str = "random"
    window_interval: int = 25
    share: str = "none"

    def __post_init__(self):
        in_range(
            self, kl_weight=(0, 1e9), eta=(1e-6, 1 if self.sde == "cps" else 1e3),
            window=(1, 10**4), window_interval=(1, 10**9),
        )  # fmt: skip
        one_of(self, sde=("flow", "cps"), level=sde.LEVELS, window_place=PLACES, share=SHARES)
        each_in_range(self, window_range=(0, 10**4), whole=True, length=2)

    def surrogate(
        self, step: WindowStep, advantages: Float[Array, " B"], sigmas: Float[Array, " T+1"]
    ) -> Surrogate:
        """What the policy gains by step; the part of the loss in which algorithms differ."""
        raise NotImplementedError

    @property
    def terms(self) -> int:
        """One for each step of the window."""
        return self.window

    @property
    def forwards(self) -> int:
        """The base policy's, where there is a KL."""
        return int(self.kl_weight > 0)

    def sampler(self, guidance: float = 1.0) -> Sampler:
        """Of the window's steps."""
        return Sampler(kind=self.sde, eta=self.eta, level=self.level, guidance=guidance)

    def draw(self, key: PRNGKeyArray, update: int, plan: Plan) -> Draw:
        """A window at the place that the fields say; see `Algorithm.draw`."""
        place = (self.window, *self.window_range)
        schedule.check_window(plan.steps, *place)
        if self.window_place == "progressive":
            start = schedule.progressive_window(update, *place, interval=self.window_interval)
        elif self.window_place == "random":
            start = schedule.random_window(key, *place)
        else:
            start = schedule.random_window(key, *place, shape=(plan.groups,))
            start = jnp.repeat(start, plan.group_size)
        return Draw(
            self.sampler(plan.guidance),
            self.window,
            start,
            shared_by=1 if self.share == "none" else plan.group_size,
            prefix=self.share == "prefix",
        )

    def keep(self, trajectory: Trajectory) -> Window:
        """The window; the final latents are let go."""
        return Window(
            states=jnp.moveaxis(trajectory.window_latents, 0, 1),
            log_prob=trajectory.log_prob_old.T,
            start=trajectory.window_start,
            keys=trajectory.keys,
        )

    def loss(
        self, policies: Policies, samples: Samples, sigmas: Float[Array, " T+1"], term: Array
    ) -> Terms:
        """`surrogate + kl_weight KL` of step `term` of the window."""
        kept: Window = samples.kept
        index = kept.start + term
        before, after = kept.states[:, term], kept.states[:, term + 1]

        def step(policy) -> sde.Step:
            v = policy(before, sigmas[index], samples.text)
            return stochastic_step(self.sampler(), before, v, sigmas, index)

        now = step(policies.now)
        # What is left of the drawn state without its noise is the mean that it was drawn around.
        noise = step_noise(kept.keys, index, before.shape[1:])
        found = self.surrogate(
            WindowStep(
                index=index,
                log_ratio=sde.log_prob(after, now.mean, now.std) - kept.log_prob[:, term],
                mean=now.mean,
                mean_drawn=after - now.std * noise,
                std=now.std,
            ),
            samples.advantages,
            sigmas,
        )
        losses = {"policy_loss": found.loss}
        if self.kl_weight > 0:
            losses["kl"] = sde.kl(now.mean, step(policies.base).mean, now.std)
        return Terms(
            losses=losses,
            weights={"kl": self.kl_weight},
            metrics={"ratio_mean": found.ratio, "clip_fraction": found.clipped},
            peaks={"ratio_deviation": jnp.abs(found.ratio - 1)},
        )


@dataclass(frozen=True)
class Grpo(Windowed):
    """Flow-GRPO; formulas at the head of this file.

    Attributes:
      clip: half-width of the ratio's interval, in (0, 1) (World-R1: 1e-3); small, for log-ratios
        are means over the latent, not sums.
    """

    clip: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        in_range(self, clip=(1e-12, 1 - 1e-6))

    def surrogate(
        self, step: WindowStep, advantages: Float[Array, " B"], sigmas: Float[Array, " T+1"]
    ) -> Surrogate:
        """PPO's."""
        return clipped_surrogate(step.log_ratio, advantages, self.clip)
