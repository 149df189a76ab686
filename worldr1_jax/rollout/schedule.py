"""Noise levels of the sampler, and the place of the stochastic window among its steps.

A schedule is the array `sigmas [T+1]`: step `i` takes the state from `sigmas[i]` to
`sigmas[i + 1]`. Flow matching: `x_sigma = (1 - sigma) x0 + sigma eps`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray


def sigmas(steps: int, shift: float, *, sigma_max: float = 1.0) -> Float[Array, " T+1"]:
    """Euler schedule: `s` falls evenly from `sigma_max` to 0, then `shift s / (1 + (shift-1) s)`.

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
    if steps < 1:
        raise ValueError(f"steps is {steps}; the sampler needs at least 1 step.")
    if shift <= 0:
        raise ValueError(f"shift is {shift}; it must be positive (Wan2.1: 3 for 480p, 5 for 720p).")
    if not 0 < sigma_max <= 1:
        raise ValueError(f"sigma_max is {sigma_max}; it must lie in (0, 1].")
    even = np.linspace(sigma_max, 0.0, steps + 1)  # float64: the differences are used as well
    return jnp.asarray(shift * even / (1 + (shift - 1) * even), jnp.float32)


def check_window(steps: int, width: int, first: int, last: int) -> None:
    """Raises ValueError unless windows of `width` steps fit into steps `first .. last - 1`.

    The last step stays out: its noise would remain in the video, and CPS has std 0 there.
    """
    if width < 1:
        raise ValueError(f"the window has {width} steps; it needs at least 1.")
    if not 0 <= first < last <= steps - 1:
        raise ValueError(
            f"window range [{first}, {last}) does not lie within steps [0, {steps - 1}); the last "
            f"of the {steps} steps must stay deterministic."
        )
    if width > last - first:
        raise ValueError(
            f"a window of {width} steps does not fit into range [{first}, {last}), which has "
            f"{last - first}."
        )


def random_window(key: PRNGKeyArray, width: int, first: int, last: int) -> Int[Array, ""]:
    """Start of a window placed uniformly in steps `first .. last - 1` (key is consumed)."""
    return jax.random.randint(key, (), first, last - width + 1, jnp.int32)


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
        raise ValueError(f"interval {interval} and stride {stride} must both be at least 1.")
    places = (last - width - first) // stride + 1
    return jnp.asarray(first + stride * ((update // interval) % places), jnp.int32)
