"""Noise levels of the samplers, and the place of the stochastic window among their steps.

A schedule is the array `sigmas [T+1]`: step `i` takes the state from `sigmas[i]` to
`sigmas[i + 1]`. Flow matching: `x_sigma = (1 - sigma) x0 + sigma eps`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray


def sigmas(steps: int, shift: float, *, sigma_max: float = 1.0) -> Float[Array, " T+1"]:
    """Euler schedule: `s` falls evenly from `sigma_max` to 0, then `shift s / (1 + (shift-1) s)`.

    Wan-Video's own release makes its levels so. diffusers' FlowMatchEulerDiscreteScheduler(shift)
    has them when it is given the even levels, `set_timesteps(sigmas=linspace(1, 0, T + 1)[:-1])`.
    By itself, `set_timesteps(T)`, it takes others: its T even levels end at its sigma_min, which is
    0.001 after one shift, are shifted once more, and a 0 follows. With shift 1 that leaves a last
    step of 0.001, and the other T - 1 steps share the rest.

    Args:
      steps: T, number of denoising steps, at least 1.
      shift: > 0; 1 leaves the levels even, larger keeps them high for longer. Wan2.1 publishes 3
        for 480p and 5 for 720p.
      sigma_max: level of the first state before the shift, in (0, 1].

    Returns:
      `[T+1]` float32, strictly descending, last element 0.

    Raises:
      ValueError: when an argument is out of its range.
    """
    if not 0 < sigma_max <= 1:
        raise ValueError(f"sigma_max is {sigma_max}; it must lie in (0, 1]")
    # float64: the differences are used as well
    return jnp.asarray(_shifted(steps, shift, sigma_max, 0.0), jnp.float32)


def unipc_sigmas(
    steps: int, shift: float
) -> tuple[Float[np.ndarray, " T+1"], Float[np.ndarray, " T"]]:
    """Levels of UniPC's states, and the timesteps at which the model is asked there.

    They are those of diffusers' UniPCMultistepScheduler with Wan's scheduler_config.json, in
    0.42.1; earlier releases started from s = 0.999. `s` falls evenly from 1 towards 0.001, which
    it would reach after T steps; a 0 takes that place. The first level is 0.999999 after the shift,
    for at 1 the log-SNR is infinite. Timesteps are whole, as the reference hands them to the model:
    1000 sigma in float64, cut and not rounded, hence up to 1 below what Euler tells it.

    Args:
      steps: T, number of denoising steps, at least 1.
      shift: > 0, as in `sigmas`.

    Returns:
      sigmas, float32, strictly descending, and timesteps, float32 with whole values.

    Raises:
      ValueError: when an argument is out of its range.
    """
    levels = _shifted(steps, shift, 1.0, 1 / 1000)[:-1]
    if abs(levels[0] - 1) < 1e-6:
        levels[0] -= 1e-6
    timesteps = np.trunc(levels * 1000).astype(np.float32)
    return np.append(levels, 0.0).astype(np.float32), timesteps


def lowest(steps: int, shift: float) -> float:
    """The last noise level at which `sigmas` asks the policy; errors are those of `sigmas`."""
    return float(_shifted(steps, shift, 1.0, 0.0)[-2])


def _shifted(steps: int, shift: float, top: float, bottom: float) -> Float[np.ndarray, " T+1"]:
    """`s` even from `top` to `bottom`, shifted, in float64."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; the sampler needs at least 1 step")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift is {shift}; it must be positive (Wan2.1: 3 for 480p, 5 for 720p)")
    even = np.linspace(top, bottom, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


def check_window(steps: int, width: int, first: int, last: int) -> None:
    """Raises ValueError unless windows of `width` steps fit into steps `first .. last - 1`.

    The last step stays out: its noise would remain in the video, and CPS has std 0 there.
    """
    if width < 1:
        raise ValueError(f"the window has {width} steps; it needs at least 1")
    if not 0 <= first < last <= steps - 1:
        raise ValueError(
            f"window_range is ({first}, {last}): it has to lie within steps [0, {steps - 1}), for "
            f"the last of the {steps} steps must stay deterministic"
        )
    if width > last - first:
        raise ValueError(
            f"a window of {width} steps does not fit into window_range ({first}, {last}), which "
            f"has {last - first}"
        )


def random_window(
    key: PRNGKeyArray, width: int, first: int, last: int, shape: tuple[int, ...] = ()
) -> Int[Array, "..."]:
    """Starts of so many windows, each placed uniformly in steps `first .. last - 1` (key is
    consumed)."""
    return jax.random.randint(key, shape, first, last - width + 1, jnp.int32)


def progressive_window(
    update: int | Int[Array, ""],
    width: int,
    first: int,
    last: int,
    *,
    interval: int,
    stride: int = 1,
) -> Int[Array, ""]:
    """Start of a window that slides from noise to data and wraps round, as in MixGRPO.

    Args:
      update: number of rollouts done so far, from 0.
      width: W, steps of the window.
      first: first step that it may cover.
      last: one past the last step that it may cover.
      interval: rollouts for which the window rests at one place.
      stride: steps by which it then moves.
    """
    if interval < 1 or stride < 1:
        raise ValueError(f"interval {interval} and stride {stride} must both be at least 1")
    places = (last - width - first) // stride + 1
    return jnp.asarray(first + stride * ((update // interval) % places), jnp.int32)
