"""START HERE: `train_step`, the update of the policy from one rollout.

    rollout.sample.sample -> rewards -> advantage.group_advantage -> train_step

One optimizer step is taken for each minibatch of samples, `epochs` times over. Its gradient is
accumulated over the window's steps and over microbatches, one network evaluation at a time.
`train_step` is pure: the caller jits it with its shardings under `jax.set_mesh`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from worldr1_jax.algorithms import grpo as losses
from worldr1_jax.rollout import sde
from worldr1_jax.rollout.sample import Sampler, step_noise, transition
from worldr1_jax.types import Trajectory

# (adapters, base, latents [B f h w C], sigma * 1000 [B], text [B N D], adapters_on) -> velocity
PolicyVelocity = Callable[[Any, Any, Array, Array, Array, bool], Array]
Metrics = dict[str, Float[Array, ""]]


@flax.struct.dataclass
class TrainState:
    """What learning changes; checkpoints hold exactly this.

    Attributes:
      adapters: trained parameters, float32.
      opt_state: of the optax optimizer.
      ema: average of the adapters, like them.
      step: optimizer steps taken, int32.
    """

    adapters: Any
    opt_state: Any
    ema: Any
    step: Int[Array, ""]


@flax.struct.dataclass
class Batch:
    """One rollout and what became of it; fields of `types.Trajectory` without the final latents.

    Attributes:
      window_latents: states before each window step, and after the last one.
      log_prob_old: of each step, under the policy that drew it.
      window_start: index of the first window step in the schedule.
      text: embedding of each sample's prompt.
      advantages: from `advantage.group_advantage`.
      valid: samples that may be learnt from; nothing of the others is read.
      keys: the rollout's keys; only "grpo_guard" needs them, to draw the same noise again.
    """

    window_latents: Float[Array, "W+1 B f h w C"]
    log_prob_old: Float[Array, "W B"]
    window_start: Int[Array, ""]
    text: Float[Array, "B N D"]
    advantages: Float[Array, " B"]
    valid: Bool[Array, " B"]
    keys: PRNGKeyArray | None = None


def make_batch(
    trajectory: Trajectory,
    text: Float[Array, "B N D"],
    advantages: Float[Array, " B"],
    valid: Bool[Array, " B"],
    keys: PRNGKeyArray | None = None,
) -> Batch:
    """Batch of a rollout; arguments as `Batch`'s fields."""
    return Batch(
        window_latents=trajectory.window_latents,
        log_prob_old=trajectory.log_prob_old,
        window_start=trajectory.window_start,
        text=text,
        advantages=advantages,
        valid=valid,
        keys=keys,
    )


@dataclass(frozen=True)
class Rules:
    """Static settings of the update.

    Attributes:
      clip: half-width of the ratio's trust interval (World-R1: 1e-3).
      kl_weight: beta of the KL to the policy without adapters (World-R1: 0.004); at 0 its forward
        is not run.
      epochs: passes over the rollout, each of `minibatches` optimizer steps.
      minibatches: parts of the samples, one optimizer step each. Part j holds samples j, j +
        minibatches, ...: every group is spread over all parts, and no sample changes its device.
      microbatches: parts of a minibatch that are evaluated one after the other to save memory; the
        gradient is the same. With 1 and 1, the update has the rollout's batch shape, and the first
        ratios are 1 to the last bits.
      ema_decay: decay of the average of adapters (see `ema_update`), in [0, 1).
      ema_every: optimizer steps between two updates of the average.
      equalise: weighting between window steps: "none", "flash" (`loss.flash_weights`) or
        "grpo_guard" (arXiv 2510.22319: ratio without its bias and scale, loss over D).

    Raises:
      ValueError: when a field is out of its range.
    """

    clip: float = 1e-3
    kl_weight: float = 0.004
    epochs: int = 1
    minibatches: int = 1
    microbatches: int = 1
    ema_decay: float = 0.9
    ema_every: int = 1
    equalise: str = "none"

    def __post_init__(self):
        if not 0 < self.clip < 1:
            raise ValueError(f"clip is {self.clip}; it must lie in (0, 1).")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight is {self.kl_weight}; it must not be negative.")
        for name in ("epochs", "minibatches", "microbatches", "ema_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must lie in [0, 1).")
        if self.equalise not in losses.EQUALISE:
            names = ", ".join(losses.EQUALISE)
            raise ValueError(f"equalise {self.equalise!r} is unknown; use one of {names}.")


def make_optimizer(
    learning_rate: float,
    *,
    weight_decay: float = 1e-4,
    clip_norm: float = 1.0,
    warmup_steps: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """AdamW after clipping the gradient to a global norm; linear warm-up, then constant rate.

    The first optimizer step of a warm-up of n has rate `learning_rate / n`, not 0.
    """
    rate: Any = learning_rate
    if warmup_steps > 0:
        first = learning_rate / warmup_steps
        rate = optax.linear_schedule(first, learning_rate, max(warmup_steps - 1, 1))
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay),
    )


def init_state(adapters: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first update; the average starts as a copy of the adapters."""
    return TrainState(
        adapters=adapters,
        opt_state=optimizer.init(adapters),
        ema=jax.tree.map(jnp.copy, adapters),  # a copy, so that the state can be donated
        step=jnp.zeros((), jnp.int32),
    )


def train_step(
    state: TrainState,
    base: Any,
    batch: Batch,
    sigmas: Float[Array, " T+1"],
    text_null: Float[Array, "N D"] | None = None,
    *,
    velocity: PolicyVelocity,
    optimizer: optax.GradientTransformation,
    sampler: Sampler,
    rules: Rules,
) -> tuple[TrainState, Metrics]:
    """All optimizer steps of one rollout.

    Args:
      state: before; may be donated.
      base: parameters that are not trained.
      batch: the rollout with its advantages.
      sigmas: the rollout's schedule.
      text_null: negative prompt, when the sampler's guidance is not 1.
      velocity: the network, the same function as in the rollout; its last argument says whether the
        adapters take part.
      optimizer: from `make_optimizer`.
      sampler: the rollout's.
      rules: settings of the update.

    Returns:
      The state after, and metrics, float32 scalars. Means over optimizer steps: loss, policy_loss,
      kl, ratio_mean, clip_fraction, grad_norm (before clipping). ratio_deviation: largest
      |ratio - 1|; ratio_deviation_first: the same at the first optimizer step, where it measures
      only rounding. param_norm: afterwards. valid: samples learnt from. skipped: optimizer steps
      not taken because no sample was valid or the gradient was not finite; they change nothing.

    Raises:
      ValueError: when the samples do not divide into minibatches and microbatches.
    """
    count = batch.text.shape[0]
    if count % (rules.minibatches * rules.microbatches):
        raise ValueError(
            f"the {count} samples do not divide into {rules.minibatches} minibatches of "
            f"{rules.microbatches} microbatches."
        )
    if rules.equalise == "grpo_guard" and batch.keys is None:
        raise ValueError('equalise "grpo_guard" needs the rollout\'s keys in batch.keys.')
    batch = _without_invalid(batch)
    parts = _split(batch, rules.minibatches)

    def inner_update(state, index):
        minibatch = jax.tree.map(lambda leaf: leaf[index % rules.minibatches], parts)
        grads, metrics = _accumulate(
            state.adapters, base, minibatch, sigmas, text_null, velocity, sampler, rules
        )
        return _apply(state, grads, metrics, minibatch.valid.any(), optimizer, rules)

    updates = jnp.arange(rules.epochs * rules.minibatches)
    state, history = jax.lax.scan(inner_update, state, updates)
    metrics = {name: values.mean() for name, values in history.items()}
    metrics |= {
        "ratio_deviation": history["ratio_deviation"].max(),
        "ratio_deviation_first": history["ratio_deviation"][0],
        "skipped": history["skipped"].sum(),
        "param_norm": optax.tree.norm(state.adapters),
        "valid": batch.valid.sum().astype(jnp.float32),
    }
    return state, metrics


def ema_update(ema: Any, params: Any, step: Int[Array, ""], decay: float, every: int) -> Any:
    """Average of the parameters after optimizer step `step` (from 1), renewed every `every` steps.

    The k-th renewal has decay `min(decay, (k - 1) / k)`: the plain mean of what was seen until that
    reaches `decay`, exponential from then on. So the weights of the parameters seen always sum
    to 1, and the untrained start has none. Departure: the reference's warm-up and its renewal every
    8 steps barely average over a run of its length.
    """
    renewals = step // every
    kept = jnp.minimum(decay, 1 - 1 / jnp.maximum(renewals, 1))
    kept = jnp.where(step % every == 0, kept, 1.0)
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, ema, params)


def _accumulate(adapters, base, batch, sigmas, text_null, velocity, sampler, rules):
    """Gradient of the mean loss over valid samples and window steps, and its metrics."""
    parts = _split(batch, rules.microbatches)
    steps = batch.log_prob_old.shape[0]
    scale = 1 / (steps * jnp.maximum(batch.valid.sum(), 1))
    weights = _step_weights(sampler, sigmas, rules.equalise)

    def term(adapters, part, i):
        """One window step of one microbatch; sums, scaled so that all terms add up to means."""
        index = part.window_start + i
        policy = _transition(adapters, True, part, i)
        log_prob = sde.log_prob(part.window_latents[i + 1], policy.mean, policy.std)
        log_ratio = log_prob - part.log_prob_old[i]
        if rules.equalise == "grpo_guard":
            log_ratio = _guarded(log_ratio, policy, part, i)
        surrogate = losses.clipped_surrogate(log_ratio, part.advantages, rules.clip)
        share = jnp.where(part.valid, scale, 0.0)
        policy_loss = jnp.sum(share * weights[index] * surrogate.loss)
        kl = jnp.zeros(())
        if rules.kl_weight > 0:
            reference = jax.lax.stop_gradient(_transition(adapters, False, part, i))
            kl = jnp.sum(share * sde.kl(policy.mean, reference.mean, policy.std))
        total = policy_loss + rules.kl_weight * kl
        sums = {
            "loss": total,
            "policy_loss": policy_loss,
            "kl": kl,
            "ratio_mean": jnp.sum(share * surrogate.ratio),
            "clip_fraction": jnp.sum(share * surrogate.clipped),
        }
        off = jnp.max(jnp.where(part.valid, jnp.abs(surrogate.ratio - 1), 0.0))
        return total, (sums, off)

    def _transition(adapters, adapters_on, part, i):
        def bound(latents, timestep, text):
            return velocity(adapters, base, latents, timestep, text, adapters_on)

        index = part.window_start + i
        return transition(
            bound, sampler, part.window_latents[i], part.text, text_null, sigmas, index
        )

    def body(carry, place):
        grads, sums, off = carry
        part = jax.tree.map(lambda leaf: leaf[place % rules.microbatches], parts)
        gradient = jax.grad(term, has_aux=True)
        new_grads, (new_sums, new_off) = gradient(adapters, part, place // rules.microbatches)
        grads = jax.tree.map(jnp.add, grads, new_grads)
        sums = jax.tree.map(jnp.add, sums, new_sums)
        return (grads, sums, jnp.maximum(off, new_off)), None

    names = ("loss", "policy_loss", "kl", "ratio_mean", "clip_fraction")
    zeros = (jax.tree.map(jnp.zeros_like, adapters), {name: jnp.zeros(()) for name in names})
    places = jnp.arange(steps * rules.microbatches)
    (grads, sums, off), _ = jax.lax.scan(body, (*zeros, jnp.zeros(())), places)
    return grads, sums | {"ratio_deviation": off}


def _apply(state, grads, metrics, any_valid, optimizer, rules):
    """One optimizer step, unless there is nothing to learn from or the gradient is not finite."""
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
    adapters = optax.apply_updates(state.adapters, updates)
    step = state.step + 1
    ema = ema_update(state.ema, adapters, step, rules.ema_decay, rules.ema_every)
    taken = any_valid & jnp.isfinite(grad_norm)
    new = TrainState(adapters=adapters, opt_state=opt_state, ema=ema, step=step)
    state = jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, state)
    return state, metrics | {"grad_norm": grad_norm, "skipped": 1.0 - taken}


def _guarded(log_ratio, policy, part, i):
    """GRPO-Guard's log-ratio: its negative mean is added back, and its scale brought to std 1.

    The old mean is what is left of the drawn state without its noise, which the keys give again.
    """
    before, after = part.window_latents[i], part.window_latents[i + 1]
    noise = step_noise(part.keys, part.window_start + i, before.shape[1:])
    bias = sde.kl(policy.mean, after - policy.std * noise, policy.std)
    return (log_ratio + bias) * policy.std


def _step_weights(sampler, sigmas, equalise):
    """Weight of the loss of each schedule step but the last."""
    if equalise == "flash":
        return losses.flash_weights(sampler, sigmas)
    if equalise == "grpo_guard":
        return 1 / (sigmas[:-2] - sigmas[1:-1])
    return jnp.ones(sigmas.shape[0] - 2)


def _without_invalid(batch: Batch) -> Batch:
    """Zeros instead of what invalid samples hold: a NaN times a weight of 0 would still be NaN."""

    def clean(x, axis):
        shape = [1] * x.ndim
        shape[axis] = -1
        return jnp.where(batch.valid.reshape(shape), x, 0)

    return replace(
        batch,
        window_latents=clean(batch.window_latents, 1),
        log_prob_old=clean(batch.log_prob_old, 1),
        text=clean(batch.text, 0),
        advantages=clean(batch.advantages, 0),
    )


def _split(batch: Batch, parts: int) -> Batch:
    """A leading axis of parts; part j holds samples j, j + parts, ... (see `Rules.minibatches`)."""

    def split(x, axis):
        shape = x.shape
        x = x.reshape(*shape[:axis], shape[axis] // parts, parts, *shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0)

    return Batch(
        window_latents=split(batch.window_latents, 1),
        log_prob_old=split(batch.log_prob_old, 1),
        window_start=jnp.broadcast_to(batch.window_start, (parts,)),
        text=split(batch.text, 0),
        advantages=split(batch.advantages, 0),
        valid=split(batch.valid, 0),
        keys=None if batch.keys is None else split(batch.keys, 0),
    )
