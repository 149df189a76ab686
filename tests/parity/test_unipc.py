"""UniPC against diffusers' UniPCMultistepScheduler as Wan configures it, and the numbers that
tests/rollout/test_unipc.py keeps of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rollout.test_unipc import GOLDEN, START, toy
from worldr1_jax.rollout import unipc

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def reference(steps, shift, order, x, corrector=True):
    """Their states before each step and after the last one, and what the model was told."""
    scheduler = diffusers.UniPCMultistepScheduler(  # Wan2.1's scheduler_config.json, but for order
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True,
        flow_shift=shift, solver_order=order, solver_type="bh2", lower_order_final=True,
        predict_x0=True, disable_corrector=() if corrector else list(range(steps)),
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    states = [torch.tensor(x)[None, None]]  # they ask for three axes or more
    for timestep in scheduler.timesteps:
        velocity = toy(torch.tanh, states[-1], float(timestep))
        states.append(scheduler.step(velocity, timestep, states[-1], return_dict=False)[0])
    return np.stack(states)[:, 0, 0], scheduler


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("order", unipc.ORDERS)
def test_every_state_matches_diffusers(steps, shift, order):
    """On a velocity far from linear, from 4,096 normal values. Seen: 8e-6 of the spread, from sums
    in another order and from weights that they compute in float32; ten times that is the bound."""
    noise = np.random.default_rng(steps + order).standard_normal(4096).astype(np.float32)
    expected, scheduler = reference(steps, shift, order, noise)
    solver = unipc.make(steps, shift, order)
    np.testing.assert_allclose(solver.sigmas, scheduler.sigmas, atol=1e-7)
    np.testing.assert_array_equal(solver.timesteps, scheduler.timesteps)

    def body(carry, index):
        x, memory = carry
        velocity = toy(jnp.tanh, x, solver.timesteps[index])
        x, memory = unipc.step(solver, index, x, velocity, memory)
        return (x, memory), x

    start = jnp.asarray(noise)
    _, states = jax.jit(
        lambda: jax.lax.scan(body, (start, unipc.start(solver, start)), jnp.arange(steps))
    )()
    off = np.abs(np.asarray(states) - expected[1:]).max(1) / expected[1:].std(1)
    print(f"order {order}, {steps} steps, shift {shift}: {off.max():.1e}, at the end {off[-1]:.1e}")
    assert off.max() <= 8e-5


@pytest.mark.parametrize("order", unipc.ORDERS)
def test_without_corrector(order):
    noise = np.random.default_rng(order).standard_normal(512).astype(np.float32)
    expected, _ = reference(20, 3.0, order, noise, corrector=False)
    solver = unipc.make(20, 3.0, order, corrector=False)
    x = jnp.asarray(noise)
    memory = unipc.start(solver, x)
    for index in range(20):
        velocity = toy(jnp.tanh, x, solver.timesteps[index])
        x, memory = unipc.step(solver, index, x, velocity, memory)
    assert np.abs(np.asarray(x) - expected[-1]).max() <= 1e-4 * expected[-1].std()


@pytest.mark.parametrize("order", unipc.ORDERS)
def test_the_golden_numbers(order):
    expected, _ = reference(8, 3.0, order, START)
    np.testing.assert_allclose(expected[-1], GOLDEN[order], atol=2e-6)  # they have six digits
