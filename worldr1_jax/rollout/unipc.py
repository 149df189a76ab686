"""UniPC (arXiv 2302.04867): a deterministic multistep solver that corrects each state once.

It solves what Euler solves, in fewer steps for the same error. Over one step the flow's ODE is

    x' = x + a (x0 - x),    a = 1 - sigma' / sigma,

where x0 is the mean of the model's data prediction over the step, weighted by `exp(-h (1 - p))`;
`p` runs from 0 to 1 in log-SNR `log((1 - sigma) / sigma)`, and the step is `h` long. Euler takes
the prediction at the start for that mean. The predictor extrapolates it from the last predictions;
the corrector, once the model has seen the predicted state, interpolates with that one as well. Both
are sums with weights that the schedule alone decides: they are computed here in float64, on the
host, and what remains of a step is a few multiply-adds. One forward a step, as with Euler.

What diffusers' UniPCMultistepScheduler does with Wan's scheduler_config.json is the reference:
flow sigmas and flow prediction, "bh2", data prediction, lower orders at both ends.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from worldr1_jax.rollout import schedule

ORDERS = (1, 2, 3)


class UniPC(NamedTuple):
    """The solver of one schedule, as static tables, float32. K is the order."""

    sigmas: Float[Array, " T+1"]  # of the states, descending from below 1
    timesteps: Float[Array, " T"]  # what the model is told at each state; 1000 sigma or near it
    advance: Float[Array, " T+1"]  # a of the step that leads to each state, 0 for the first state
    predictor: Float[Array, "T K"]  # weights of the predictions at states i, i-1, ..., i-K+1
    corrector: Float[Array, "T K+1"]  # weights of those at states i, i-1, ..., i-K


class Memory(NamedTuple):
    """What one step hands to the next."""

    state: Float[Array, "B ..."]  # the corrected state before it
    data: tuple[Float[Array, "B ..."], ...]  # K data predictions, the newest first


def make(steps: int, shift: float, order: int = 2, *, corrector: bool = True) -> UniPC:
    """The solver with the sigmas and timesteps that diffusers gives Wan.

    Args:
      steps: T, number of denoising steps, at least 1.
      shift: > 0; Wan2.1 publishes 3 for 480p and 5 for 720p.
      order: of the predictor, 1 to 3; Wan2.1 publishes 2. The corrector is of one order more. The
        first steps and the last are of the order that their neighbours allow.
      corrector: False leaves the predicted states as they are.

    Raises:
      ValueError: when an argument is out of its range.
    """
    return tables(*schedule.unipc_sigmas(steps, shift), order, corrector=corrector)


def tables(
    sigmas: Float[np.ndarray, " T+1"],
    timesteps: Float[np.ndarray, " T"],
    order: int = 2,
    *,
    corrector: bool = True,
) -> UniPC:
    """The solver of any schedule (see `make`).

    Raises:
      ValueError: an order that there is not, or sigmas that do not descend from below 1 to 0 or
        more: at 1 the log-SNR is infinite.
    """
    if order not in ORDERS:
        raise ValueError(f"UniPC's order is {order}; it has to be 1, 2 or 3")
    # The rounded sigmas are the schedule: 1 - 0.999999 is 1.3 percent larger in float32.
    levels = np.asarray(sigmas, np.float32).astype(np.float64)
    if levels[0] >= 1 or levels[-1] < 0 or not (np.diff(levels) < 0).all():
        raise ValueError(
            f"UniPC's sigmas run from {levels[0]:g} to {levels[-1]:g}; they have to descend "
            "strictly, from below 1 to 0 or more (see schedule.unipc_sigmas)"
        )
    count = len(levels) - 1
    # Not of the last level, 0: the step to it is of order 1, which asks for none.
    log_snr = np.log((1 - levels[:-1]) / levels[:-1])
    predict, correct = np.zeros((count, order)), np.zeros((count, order + 1))
    correct[0, 0] = 1  # nothing precedes the first state; a is 0 there
    for i in range(count):
        known = min(order, i + 1, count - i)  # order of this step
        predict[i, :known] = _weights(log_snr, i, range(i, i - known, -1))
        if i + 1 == count:
            break
        if corrector:
            correct[i + 1, : known + 1] = _weights(log_snr, i, range(i + 1, i - known, -1))
        else:
            correct[i + 1, 1:] = predict[i]
    advance = np.concatenate([[0.0], 1 - levels[1:] / levels[:-1]])
    arrays = (levels, timesteps, advance, predict, correct)
    return UniPC(*(jnp.asarray(array, jnp.float32) for array in arrays))


def start(solver: UniPC, noise: Float[Array, "B ..."]) -> Memory:
    """The memory before the first step, which starts at `noise`."""
    return Memory(noise, (jnp.zeros_like(noise),) * solver.predictor.shape[1])


def step(
    solver: UniPC,
    index: Int[Array, ""] | int,
    x: Float[Array, "B ..."],
    v: Float[Array, "B ..."],
    memory: Memory,
) -> tuple[Float[Array, "B ..."], Memory]:
    """Corrects the state `index`, then predicts the next one.

    Args:
      solver: the tables.
      index: of the step, from 0.
      x: the predicted state at `sigmas[index]`, float32; it serves the data prediction alone.
      v: velocity that the model gives for it, float32.
      memory: of the step before, or `start`.

    Returns:
      The predicted state at `sigmas[index + 1]`, which is the result after the last step, and the
      memory for the next step.
    """
    data = (x - solver.sigmas[index] * v, *memory.data)
    state = memory.state
    state += solver.advance[index] * (_sum(solver.corrector[index], data) - state)
    data = data[:-1]
    target = _sum(solver.predictor[index], data)
    return state + solver.advance[index + 1] * (target - state), Memory(state, data)


def _sum(weights: Float[Array, " n"], values: tuple[Array, ...]) -> Array:
    return functools.reduce(jnp.add, [weights[k] * value for k, value in enumerate(values)])


def _weights(
    log_snr: Float[np.ndarray, " T"], first: int, states: range
) -> Float[np.ndarray, " n"]:
    """Weights of the predictions at `states` in the mean over step `first`.

    They make the mean exact for every polynomial in log-SNR of degree below n. Departure from that,
    the published solver's own: with two predictions the first moment is taken to be 1/2.
    """
    count = len(states)
    if count == 1:
        return np.ones(1)
    length = log_snr[first + 1] - log_snr[first]
    places = (log_snr[list(states)] - log_snr[first]) / length
    # moments[k] is the weighted mean of p^k; by parts, its integral is (1 - k previous) / h
    moments, whole = np.ones(count), -np.expm1(-length) / length
    for k in range(1, count):
        moments[k] = (1 - k * moments[k - 1] * whole) / (length * whole)
    if count == 2:
        moments[1] = 0.5
    return np.linalg.solve(np.vander(places, increasing=True).T, moments)
