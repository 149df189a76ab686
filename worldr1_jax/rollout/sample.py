"""The rollout: one scan over the denoising steps, which keeps only the stochastic window.

The schedule that `sample` is given names the solver: sigmas mean Euler, with stochastic steps in
the window; the tables of `unipc.make` mean UniPC, which has no stochastic steps.

`Sampler` holds the settings that rollout and update must share; both pass the same object, so that
the update recomputes exactly the transitions that were drawn (`stochastic_step`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from worldr1_jax.rollout import sde, unipc
from worldr1_jax.types import Trajectory

# (latents [B f h w C], sigma * 1000 [B], text [B N D]) -> velocity, like latents
Velocity = Callable[[Array, Array, Array], Array]
# (latents [B f h w C], step int32) -> latents
OnStep = Callable[[Array, Array], Array]

KINDS = ("flow", "cps", "none")


@dataclass(frozen=True)
class Sampler:
    """Static settings of a step.

    Attributes:
      kind: "flow" (flow-SDE), "cps" (coefficients-preserving) or "none" (ODE everywhere).
      eta: amount of noise; flow: > 0 (0.7 with "sd3", 1 with "linear", 0.3 with "constant"),
        cps: in (0, 1]. Ignored by "none".
      level: noise-level function of the flow-SDE, one of `sde.LEVELS`.
      guidance: classifier-free guidance scale; 1 is off, and then no second forward is run.

    Raises:
      ValueError: when a field is out of its range.
    """

    kind: str = "flow"
    eta: float = 0.7
    level: str = "sd3"
    guidance: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"sampler kind {self.kind!r} is unknown; use {', '.join(KINDS)}")
        if self.level not in sde.LEVELS:
            raise ValueError(f"noise level {self.level!r} is unknown; use {', '.join(sde.LEVELS)}")
        if self.kind != "none" and not 0 < self.eta < math.inf:
            raise ValueError(f"eta is {self.eta}; a stochastic step needs a finite eta above 0")
        if self.kind == "cps" and self.eta > 1:
            raise ValueError(f"eta is {self.eta}; CPS needs eta in (0, 1]")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; it must be finite")


def in_parts(function: Callable[..., Array], parts: int) -> Callable[..., Array]:
    """`function` of arrays with a leading batch, on one part of the batch after the other, in the
    memory of one; part j holds samples j, j + parts, ..., so that none changes its device."""
    if parts == 1:
        return function

    def call(*arrays: Array) -> Array:
        rows = [x.reshape(x.shape[0] // parts, parts, *x.shape[1:]) for x in arrays]
        out = jax.lax.map(lambda row: function(*row), [jnp.moveaxis(x, 1, 0) for x in rows])
        out = jnp.moveaxis(out, 0, 1)
        return out.reshape(-1, *out.shape[2:])

    return call


def guided(
    velocity: Velocity,
    guidance: float | Float[Array, ""],
    latents: Float[Array, "B f h w C"],
    sigma: Float[Array, ""] | Float[Array, " B"],
    text: Float[Array, "B N D"],
    text_null: Float[Array, "N D"] | None,
    *,
    timestep: Float[Array, ""] | None = None,
) -> Float[Array, "B f h w C"]:
    """Velocity with classifier-free guidance, float32: `v_null + guidance (v_text - v_null)`.

    The two branches are two calls of one batch shape, not one call of twice the batch: memory stays
    that of one branch, and samples stay on the devices that hold them. The model is told
    `timestep`, which is `sigma * 1000` unless given. A guidance that is an array runs both
    branches, whatever it is.
    """
    told = sigma * 1000.0 if timestep is None else timestep
    timestep = jnp.full(latents.shape[:1], told, jnp.float32)
    if isinstance(guidance, float | int) and guidance == 1:
        return velocity(latents, timestep, text).astype(jnp.float32)
    if text_null is None or text_null.ndim != 2:
        shape = None if text_null is None else text_null.shape
        raise ValueError(
            f"guidance {guidance} needs text_null [N D], the embedding of the negative prompt; got "
            f"{shape}"
        )
    null = jnp.broadcast_to(text_null, (latents.shape[0], *text_null.shape))
    # As a loop, so that the network is compiled once.
    v, v_null = jax.lax.map(
        lambda words: velocity(latents, timestep, words).astype(jnp.float32),
        jnp.stack([text, null]),
    )
    return v_null + guidance * (v - v_null)


def stochastic_step(
    sampler: Sampler,
    latents: Float[Array, "B ..."],
    v: Float[Array, "B ..."],
    sigmas: Float[Array, " T+1"],
    index: int | Int[Array, ""] | Int[Array, " B"],
) -> sde.Step:
    """Mean and std of step `index` of the schedule, one for all or one a sample, given the velocity
    at its start."""
    sigma, sigma_next = (_beside(sigmas[i], latents) for i in (index, index + 1))
    if sampler.kind == "flow":
        return sde.flow_sde(latents, v, sigma, sigma_next, sampler.eta, sigmas[1], sampler.level)
    if sampler.kind == "cps":
        return sde.cps(latents, v, sigma, sigma_next, sampler.eta)
    raise ValueError('sampler kind "none" has no stochastic step; use "flow" or "cps"')


def step_noise(
    keys: PRNGKeyArray, index: int | Int[Array, ""] | Int[Array, " B"], shape: tuple[int, ...]
) -> Float[Array, "B ..."]:
    """Noise of step `index` for samples with these keys `[B]`, each of `shape` (without B)."""

    def draw(key, index):
        return jax.random.normal(jax.random.fold_in(key, index), shape)

    return jax.vmap(draw, in_axes=(0, 0 if jnp.ndim(index) else None))(keys, index)


def sample_keys(key: PRNGKeyArray, count: int, *, first: int = 0) -> PRNGKeyArray:
    """Keys `[count]` of samples `first .. first + count - 1`: equal however a batch is split."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))


def sample(
    velocity: Velocity,
    keys: PRNGKeyArray,
    noise: Float[Array, "B f h w C"],
    sigmas: Float[Array, " T+1"] | unipc.UniPC,
    text: Float[Array, "B N D"],
    text_null: Float[Array, "N D"] | None = None,
    *,
    sampler: Sampler,
    window: tuple[int | Int[Array, ""] | Int[Array, " B"], int] = (0, 0),
    on_step: OnStep | None = None,
    shared_by: int = 1,
    guidance: Float[Array, ""] | None = None,
) -> Trajectory:
    """Denoises a batch: ODE steps, and stochastic ones inside the window.

    Memory is that of W + 1 states, whatever T is.

    Args:
      velocity: the policy.
      keys: `[B]`, one a sample (`sample_keys`), consumed; results then do not depend on how the
        batch is split or sharded.
      noise: state at `sigmas[0]`, unit variance; group members share prompt and camera, not this.
      sigmas: schedule (`schedule.sigmas`) of Euler and stochastic steps, or the tables of UniPC
        (`unipc.make`), which have their own.
      text: embedding of each prompt.
      text_null: embedding of the negative prompt; needed when guidance is not 1.
      sampler: settings; the update must be given the same.
      window: first step, of all or of each sample, which may be traced, and W, which is static.
        `schedule.check_window` says what fits. W is 0 exactly when the sampler's kind is "none".
      on_step: applied to the state after each step outside the window (the released World-R1 adds
        its camera warp so). Inside, it would change the state whose probability was taken.
      shared_by: so many neighbours have one noise and one text. Up to the first window of the batch
        they are one and are denoised as one; needs a window.
      guidance: in place of the sampler's, so that one program serves many.

    Raises:
      ValueError: when keys are not one a sample, or the window and the sampler's kind disagree, or
        UniPC is given a window or on_step, or samples are shared without a window or with on_step.
    """
    start, width = window
    _check(keys, noise, sigmas, sampler, start, width, on_step)
    if shared_by > 1 and (width == 0 or on_step is not None):
        raise ValueError("samples that share their steps need a window to part in, and no on_step")
    start = jnp.asarray(start, jnp.int32)
    scale = sampler.guidance if guidance is None else guidance
    if isinstance(sigmas, unipc.UniPC):
        return _sample_unipc(velocity, keys, noise, sigmas, text, text_null, scale, start)
    return _sample_steps(
        velocity,
        keys,
        noise,
        sigmas,
        text,
        text_null,
        sampler,
        scale,
        start,
        width,
        on_step,
        shared_by,
    )


def _sample_steps(
    velocity: Velocity,
    keys: PRNGKeyArray,
    noise: Float[Array, "B f h w C"],
    sigmas: Float[Array, " T+1"],
    text: Float[Array, "B N D"],
    text_null: Float[Array, "N D"] | None,
    sampler: Sampler,
    scale: float | Float[Array, ""],
    start: Int[Array, ""] | Int[Array, " B"],
    width: int,
    on_step: OnStep | None,
    shared_by: int,
) -> Trajectory:
    """`sample` by Euler and stochastic steps."""

    def ode_step(x, v, index):
        x_next = sde.ode(x, v, sigmas[index], sigmas[index + 1])
        x_next = x_next if on_step is None else on_step(x_next, index).astype(jnp.float32)
        return x_next, jnp.zeros(x.shape[0], jnp.float32)

    def sde_step(x, v, index):
        step = stochastic_step(sampler, x, v, sigmas, index)
        x_next = step.mean + step.std * step_noise(keys, index, x.shape[1:])
        log_prob = sde.log_prob(x_next, step.mean, step.std)
        if start.ndim:  # other samples may have no window here
            inside = _beside((index >= start) & (index < start + width), x)
            x_next = jnp.where(inside, x_next, ode_step(x, v, index)[0])
        return x_next, log_prob

    def body(carry, index):
        x, states, log_probs = carry
        v = guided(velocity, scale, x, sigmas[index], text, text_null)
        place = index - start  # of this step in the window, or in that of each sample
        if width == 0:
            x_next, log_prob = ode_step(x, v, index)
        else:
            inside = (place >= 0) & (place < width)
            x_next, log_prob = jax.lax.cond(jnp.any(inside), sde_step, ode_step, x, v, index)
            log_probs = _put(log_probs, log_prob, place)
        return (x_next, _put(states, x_next, place + 1), log_probs), None

    def shared_step(index, x):
        v = guided(velocity, scale, x, sigmas[index], text[::shared_by], text_null)
        return ode_step(x, v, index)[0]

    x, first, steps = noise.astype(jnp.float32), start.min(), sigmas.shape[0] - 1
    if shared_by > 1:
        x = jax.lax.fori_loop(0, first, shared_step, x[::shared_by])
        x = jnp.broadcast_to(x[:, None], (len(x), shared_by, *x.shape[1:])).reshape(noise.shape)
    states = jnp.zeros((width + 1, *x.shape), jnp.float32).at[0].set(x)  # right when start is 0
    carry = x, states, jnp.zeros((width, x.shape[0]), jnp.float32)
    if shared_by > 1:
        carry = jax.lax.fori_loop(first, steps, lambda i, carry: body(carry, i)[0], carry)
    else:
        carry, _ = jax.lax.scan(body, carry, jnp.arange(steps))
    return Trajectory(*carry, window_start=start, keys=keys)


def _sample_unipc(
    velocity: Velocity,
    keys: PRNGKeyArray,
    noise: Float[Array, "B f h w C"],
    solver: unipc.UniPC,
    text: Float[Array, "B N D"],
    text_null: Float[Array, "N D"] | None,
    guidance: float | Float[Array, ""],
    start: Int[Array, ""],
) -> Trajectory:
    """`sample` by UniPC: the same scan with the solver's memory beside the state."""

    def body(carry, index):
        x, memory = carry
        v = guided(
            velocity, guidance, x, solver.sigmas[index], text, text_null,
            timestep=solver.timesteps[index],
        )  # fmt: skip
        return unipc.step(solver, index, x, v, memory), None

    x = noise.astype(jnp.float32)
    carry, _ = jax.lax.scan(body, (x, unipc.start(solver, x)), jnp.arange(len(solver.timesteps)))
    return Trajectory(
        latents=carry[0],
        window_latents=x[None],  # the noise, as with Euler and no window
        log_prob_old=jnp.zeros((0, x.shape[0]), jnp.float32),
        window_start=start,
        keys=keys,
    )


def _put(
    buffer: Float[Array, "n B ..."],
    value: Float[Array, "B ..."],
    place: Int[Array, ""] | Int[Array, " B"],
) -> Float[Array, "n B ..."]:
    """Writes `value` at `buffer[place]`, where each sample may have its own place; one outside the
    buffer leaves it as it is."""
    here = jnp.arange(len(buffer))[:, None] == place
    return jnp.where(here.reshape(*here.shape, *[1] * (value.ndim - 1)), value, buffer)


def _beside(values: Array, x: Float[Array, "B ..."]) -> Array:
    """One value a sample, so that they broadcast with x; a single one as it is."""
    return values.reshape(-1, *[1] * (x.ndim - 1)) if jnp.ndim(values) else values


def _check(keys, noise, sigmas, sampler: Sampler, start, width: int, on_step) -> None:
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != noise.shape[:1]:
        raise ValueError(
            f"keys are {keys.dtype}{list(keys.shape)}; they must be one jax.random.key for each of "
            f"the {noise.shape[0]} samples (see sample_keys)"
        )
    if isinstance(sigmas, unipc.UniPC):
        if width or sampler.kind != "none":
            raise ValueError(
                f"UniPC is deterministic and has no place for sampler kind {sampler.kind!r} with a "
                f"window of {width} steps; sample these on sigmas (schedule.sigmas)"
            )
        if on_step is not None:
            raise ValueError(
                "UniPC's corrector starts again from the state before each step and would undo "
                "what on_step changes; use sigmas (schedule.sigmas) with on_step"
            )
    if (width == 0) != (sampler.kind == "none"):
        raise ValueError(
            f'a window of {width} steps and sampler kind {sampler.kind!r} disagree; kind "none" '
            "goes with 0 steps, the others with at least 1"
        )
    if width and isinstance(start, int) and not 0 <= start <= sigmas.shape[0] - 2 - width:
        raise ValueError(
            f"window steps {start} .. {start + width - 1} do not lie within the first "
            f"{sigmas.shape[0] - 2} of the {sigmas.shape[0] - 1} steps"
        )
