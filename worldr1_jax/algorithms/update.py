"""START HERE: `train_step`, the update of the policy from one rollout.

    rollout.sample.sample -> rewards -> advantage -> train_step

One optimizer step is taken for each minibatch of samples, `epochs` times over. Its gradient is
accumulated over the terms of the algorithm's loss (base.py, grpo.py ...) and over microbatches, one
at a time. `train_step` is pure: the caller jits it with its shardings under `jax.set_mesh`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from worldr1_jax.algorithms.base import Algorithm, Policies, Rival, Samples, Terms
from worldr1_jax.algorithms.optimizer import Optimizer, make_optimizer
from worldr1_jax.fields import in_range
from worldr1_jax.rollout.sample import guided
from worldr1_jax.types import Trajectory

# (adapters, base, latents [B f h w C], sigma * 1000 [B], text [B N D], adapters_on) -> velocity
PolicyVelocity = Callable[[Any, Any, Array, Array, Array, bool], Array]
Metrics = dict[str, Float[Array, ""]]


@flax.struct.dataclass
class TrainState:
    """What learning changes; checkpoints hold exactly this.

    Attributes:
      adapters: trained parameters, float32.
      opt_state: of the optimizer.
      ema: average of the adapters, like them.
      step: optimizer steps taken, int32.
      algorithm: what the algorithm remembers between updates, such as DiffusionNFT's old adapters.
    """

    adapters: Any
    opt_state: Any
    ema: Any
    step: Int[Array, ""]
    algorithm: Any


@flax.struct.dataclass
class Batch:
    """One rollout and what became of it.

    Attributes:
      trajectory: as it was drawn.
      text: embedding of each sample's prompt.
      advantages: from `advantage.make`.
      valid: samples that may be learnt from; nothing of the others is read.
      rival: another caption of each sample, where the algorithm has two `captions`.
    """

    trajectory: Trajectory
    text: Float[Array, "B N D"]
    advantages: Float[Array, " B"]
    valid: Bool[Array, " B"]
    rival: Rival | None = None


@dataclass(frozen=True)
class Rules:
    """Static settings of the update, whatever the algorithm; the fields are `train` of the config.

    Attributes:
      learning_rate, warmup, weight_decay, adam_eps, clip_norm: of `optimizer.make_optimizer`.
      epochs: passes over the rollout, each of `minibatches` optimizer steps.
      minibatches: parts of the samples, one optimizer step each. Part j holds samples j, j +
        minibatches, ...: every group is spread over all parts, and no sample changes its device.
      microbatches: parts of a minibatch that are evaluated one after the other to save memory; the
        gradient is the same. With 1 and 1, the update has the rollout's batch shape, and the first
        ratios are 1 to the last bits. 0: as many as the caller's videos_at_once asks for.
      ema_decay: decay of the average of adapters (see `ema_update`), in [0, 1).
      ema_every: optimizer steps between two updates of the average.
    """

    learning_rate: float = 1e-4
    warmup: int = 0
    weight_decay: float = 1e-4
    adam_eps: float = 1e-15
    clip_norm: float = 3.0
    epochs: int = 1
    minibatches: int = 1
    microbatches: int = 1
    ema_decay: float = 0.9
    ema_every: int = 1

    def __post_init__(self) -> None:
        in_range(
            self, learning_rate=(1e-30, 10), warmup=(0, 10**9), weight_decay=(0, 10),
            adam_eps=(1e-30, 1), clip_norm=(0, 1e9), epochs=(1, 1000), minibatches=(1, 10**6),
            microbatches=(0, 10**6), ema_decay=(0, 1 - 1e-9), ema_every=(1, 10**9),
        )  # fmt: skip

    def check_parts(self, videos: int) -> None:
        """Raises ValueError where so many videos of an update do not come in equal parts."""
        for name, parts in (
            ("minibatches", self.minibatches),
            ("microbatches", self.minibatches * max(self.microbatches, 1)),
        ):
            if videos % parts:
                raise ValueError(
                    f"train.{name} is {getattr(self, name)}: the {videos} videos of an update do "
                    f"not come in {parts} equal parts"
                )

    def optimizer(self) -> Optimizer:
        """AdamW of the adapters."""
        return make_optimizer(
            self.learning_rate, weight_decay=self.weight_decay, clip_norm=self.clip_norm,
            warmup_steps=self.warmup, eps=self.adam_eps,
        )  # fmt: skip


def init_state(adapters: Any, optimizer: Optimizer, algorithm: Algorithm) -> TrainState:
    """State before the first update; the average starts as a copy of the adapters."""
    copied = partial(jax.tree.map, jnp.copy)  # so that the state can be donated
    return TrainState(
        adapters=adapters,
        opt_state=optimizer.init(adapters),
        ema=copied(adapters),
        step=jnp.zeros((), jnp.int32),
        algorithm=copied(algorithm.remember(adapters)),
    )


def train_step(
    state: TrainState,
    base: Any,
    batch: Batch,
    sigmas: Float[Array, " T+1"],
    text_null: Float[Array, "N D"] | None = None,
    *,
    algorithm: Algorithm,
    velocity: PolicyVelocity,
    optimizer: Optimizer,
    rules: Rules,
    guidance: float = 1.0,
    group_size: int = 1,
) -> tuple[TrainState, Metrics]:
    """All optimizer steps of one rollout.

    Args:
      state: before; may be donated.
      base: parameters that are not trained.
      batch: the rollout with its advantages.
      sigmas: the run's schedule.
      text_null: negative prompt, when the guidance is not 1.
      algorithm: whose loss is minimised.
      velocity: the network of the rollout; its last argument says whether the adapters take part.
      optimizer: from `make_optimizer`.
      rules: settings of the update.
      guidance: the rollout's.
      group_size: K; members of a group, which are neighbours, share the noise of their losses.

    Returns:
      The state after, and metrics, float32 scalars: see `_report`.

    Raises:
      ValueError: when the samples do not divide into minibatches and microbatches.
    """
    samples = _samples(batch, algorithm, group_size)
    parts = _split(samples, rules.minibatches, rules.microbatches)
    policy = _binder(velocity, base, text_null, guidance)
    drawn = policy(algorithm.drawing(state.adapters, state.algorithm))

    def optimizer_step(state, turn):
        minibatch = jax.tree.map(lambda leaf: leaf[turn % rules.minibatches], parts)
        share = 1 / (algorithm.terms * jnp.maximum(minibatch.valid.sum(), 1))

        def mean_loss(adapters, micro, term):
            policies = Policies(
                now=policy(adapters),
                drawn=drawn,
                average=policy(state.ema),
                base=policy(state.adapters, on=False),
            )
            return _means(algorithm.loss(policies, micro, sigmas, term), micro.valid, share)

        def add_gradient(grads, place):
            micro = jax.tree.map(lambda leaf: leaf[place % rules.microbatches], minibatch)
            term = place // rules.microbatches
            passes = turn // rules.minibatches  # over the rollout, so far
            micro = replace(micro, keys=_fresh(micro.keys, passes * algorithm.terms + term))
            gradient = jax.grad(mean_loss, has_aux=True)
            more, measured = gradient(state.adapters, micro, term)
            return jax.tree.map(jnp.add, grads, more), measured

        zeros = jax.tree.map(jnp.zeros_like, state.adapters)
        places = jnp.arange(algorithm.terms * rules.microbatches)
        grads, (means, peaks) = jax.lax.scan(add_gradient, zeros, places)
        state, measured = _apply(state, grads, minibatch.valid.any(), optimizer, rules)
        means = {name: values.sum() for name, values in means.items()} | measured
        return state, (means, {name: values.max() for name, values in peaks.items()})

    turns = jnp.arange(rules.epochs * rules.minibatches)
    state, (means, peaks) = jax.lax.scan(optimizer_step, state, turns)
    state = replace(state, algorithm=algorithm.renew(state.algorithm, state.adapters))
    seen = parts.valid.any(axis=(1, 2))[turns % rules.minibatches]
    return state, _report(means, peaks, seen, state.adapters, batch.valid)


def ema_update(ema: Any, params: Any, step: Int[Array, ""], decay: float, every: int) -> Any:
    """Average of the parameters after optimizer step `step` (from 1), renewed every `every` steps.

    The k-th renewal has decay `min(decay, (k - 1) / k)`: the plain mean of what was seen until that
    reaches `decay`, exponential from then on; before the first, it is the parameters. So the
    weights of the parameters seen always sum to 1, and the untrained start has none. Departure: the
    reference's warm-up and its renewal every 8 steps barely average over a run of its length.
    """
    renewals = step // every
    kept = jnp.minimum(decay, 1 - 1 / jnp.maximum(renewals, 1))
    kept = jnp.where((step % every == 0) | (renewals == 0), kept, 1.0)
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, ema, params)


def _binder(velocity, base, text_null, guidance):
    """(adapters, on) -> the policy as `base.Velocity`."""

    def policy(adapters, on=True):
        def network(latents, timestep, text):
            return velocity(adapters, base, latents, timestep, text, on)

        def v(latents, sigma, text, *, guidance=guidance):
            return guided(network, guidance, latents, sigma, text, text_null)

        return v

    return policy


def _means(found: Terms, valid, share):
    """A microbatch's part of the loss, of all means, and of the largest values."""
    scale = jnp.where(valid, share, 0.0)
    means = {name: jnp.sum(scale * x) for name, x in (found.losses | found.metrics).items()}
    peaks = {name: jnp.max(jnp.where(valid, x, 0)) for name, x in found.peaks.items()}
    loss = sum(found.weights.get(name, 1.0) * means[name] for name in found.losses)
    return loss, (means | {"loss": loss}, peaks)


def _report(means, peaks, seen, adapters, valid) -> Metrics:
    """Means over the optimizer steps that had a valid sample to see, NaN without any: loss, the
    algorithm's losses and metrics, grad_norm (before clipping), eps_share (of parameters for which
    Adam's epsilon is more than the gradient's size). The largest of all steps: the algorithm's
    peaks; of the first of those steps alone, with `_first`: a ratio_deviation_first is of rounding
    only. param_norm: afterwards. valid: samples learnt from. skipped: steps not taken because no
    sample was valid, or gradient or new adapters were not finite; they change nothing."""
    return {
        **{name: jnp.mean(values, where=seen) for name, values in means.items()},
        **{name: values.max() for name, values in peaks.items()},
        **{f"{name}_first": values[jnp.argmax(seen)] for name, values in peaks.items()},
        "skipped": means["skipped"].sum(),
        "param_norm": optax.tree.norm(adapters),
        "valid": valid.sum().astype(jnp.float32),
    }


def _apply(state, grads, any_valid, optimizer, rules):
    """One optimizer step, unless there is nothing to learn from or something is not finite."""
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
    adapters = optax.apply_updates(state.adapters, updates)
    step = state.step + 1
    ema = ema_update(state.ema, adapters, step, rules.ema_decay, rules.ema_every)
    taken = any_valid & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(adapters))
    new = replace(state, adapters=adapters, opt_state=opt_state, ema=ema, step=step)
    state = jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, state)
    share = optimizer.eps_share(state.opt_state)
    return state, {"grad_norm": grad_norm, "skipped": 1.0 - taken, "eps_share": share}


def _samples(batch: Batch, algorithm: Algorithm, group_size: int) -> Samples:
    """What the algorithm keeps, with zeros instead of what invalid samples hold: a NaN times a
    weight of 0 would still be NaN.

    Members of a group have one key. Their advantages sum to 0, so that where a loss puts noise on
    them, what the noise alone does to the gradient cancels, and what they differ in is left.
    """

    def clean(x):
        if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.where(batch.valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0)

    kept, text, advantages, rival = jax.tree.map(
        clean, (algorithm.keep(batch.trajectory), batch.text, batch.advantages, batch.rival)
    )
    leaders = batch.trajectory.keys[::group_size]
    keys = jnp.repeat(leaders, group_size, total_repeat_length=batch.valid.shape[0])
    return Samples(kept, text, advantages, batch.valid, keys, rival)


def _split(samples: Samples, *parts: int) -> Samples:
    """Leading axes of parts; part j of n holds samples j, j + n, ... (see `Rules.minibatches`)."""
    count = samples.valid.shape[0]
    if count % (parts[0] * parts[1]):
        raise ValueError(
            f"the {count} samples do not divide into {parts[0]} minibatches of {parts[1]} "
            "microbatches"
        )

    def split(x):
        if x.ndim == 0:
            return jnp.broadcast_to(x, parts)
        x = x.reshape(-1, parts[1], parts[0], *x.shape[1:])
        return jnp.moveaxis(x, (2, 1), (0, 1))

    return jax.tree.map(split, samples)


def _fresh(keys, turn):
    """Keys that neither a rollout nor another turn has used."""
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 2**31), turn))(keys)
