"""Losses on windows against hand numbers, and where their windows lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algorithms import toy
from tests.algorithms.toy import COUNT, GROUP, SHAPE, SIGMAS
from worldr1_jax.algorithms import grpo
from worldr1_jax.algorithms.flash import Flash, step_gains, step_weights
from worldr1_jax.algorithms.grpo import WindowStep, clipped_surrogate
from worldr1_jax.rollout import schedule, sde
from worldr1_jax.rollout.sample import Sampler, step_noise

ADVANTAGES = jnp.array([2.0, 2.0, -2.0, 2.0, -2.0])
RATIOS = np.array([1.0, 1.5, 1.5, 0.5, 0.5], np.float32)


def window_step(log_ratio, *, moved=0.0, std=0.5, index=2):
    """A step of five samples with two dimensions; `moved` is how far its mean went."""
    mean = jnp.zeros((5, 2))
    return WindowStep(index, jnp.asarray(log_ratio), mean + moved, mean, jnp.asarray(std))


def test_clipped_surrogate():
    got = clipped_surrogate(jnp.log(RATIOS), ADVANTAGES, 0.2)
    # only moves that went too far the rewarded way are clipped
    np.testing.assert_allclose(got.loss, [-2, -2.4, 3, -1, 1.6], rtol=1e-6)
    np.testing.assert_allclose(got.ratio, RATIOS, rtol=1e-6)
    np.testing.assert_array_equal(got.clipped, [False, True, False, False, True])


def test_clipped_samples_have_no_gradient():
    log_ratio = jnp.log(RATIOS)
    grad = jax.grad(lambda x: clipped_surrogate(x, ADVANTAGES, 0.2).loss.sum())(log_ratio)
    np.testing.assert_allclose(grad, [-2, 0, 3, -1, 0], atol=1e-6)


def test_guard():
    """b = 0.3^2 / (2 0.5^2) = 0.18, std 0.5; the loss is divided by the step's length."""
    got = toy.make("guard", clip=0.05).surrogate(
        window_step(np.full(5, -0.1), moved=0.3), ADVANTAGES, SIGMAS
    )
    ratio = np.exp((-0.1 + 0.18) * 0.5)
    np.testing.assert_allclose(got.ratio, np.full(5, ratio), rtol=1e-6)
    length = SIGMAS[2] - SIGMAS[3]
    np.testing.assert_allclose(got.loss, -ADVANTAGES * ratio / length, rtol=1e-5)


def test_guard_sees_the_noise_alone():
    """On a rollout, what is left of the log-ratio is mean(noise x change of the mean)."""
    guard = toy.make("guard", kl_weight=0.0)
    adapters, frozen = toy.params(moved=0.3)
    batch, _ = toy.jit(functools.partial(toy.rollout, algorithm=guard))(
        adapters, frozen, jax.random.key(3)
    )
    t, index = batch.trajectory, batch.trajectory.window_start + 1

    def mean(adapters):
        told = jnp.full(COUNT, SIGMAS[index] * 1000)
        v = toy.velocity(adapters, frozen, t.window_latents[1], told, batch.text, True)
        return grpo.stochastic_step(guard.sampler(), t.window_latents[1], v, SIGMAS, index)

    old, new = mean(adapters), mean(adapters | {"b": adapters["b"] + 0.3})
    noise = step_noise(t.keys, index, SHAPE)
    np.testing.assert_allclose(t.window_latents[2], old.mean + old.std * noise, atol=1e-6)
    log_ratio = sde.log_prob(t.window_latents[2], new.mean, new.std) - t.log_prob_old[1]
    step = WindowStep(index, log_ratio, new.mean, t.window_latents[2] - new.std * noise, new.std)
    got = guard.surrogate(step, jnp.ones(COUNT), SIGMAS).ratio
    expected = jnp.mean(noise * (new.mean - old.mean), axis=(1, 2, 3, 4))
    assert jnp.abs(expected).max() > 1e-2
    np.testing.assert_allclose(jnp.log(got), expected, atol=1e-6)


def test_dppo():
    """Held: samples that are beyond tau = 0.1, (0.3, 0.1) having d = 0.18, 0.02, and that go the
    way of their advantage."""
    dppo = toy.make("dppo", tau=0.1)

    def loss(log_ratio, moved):
        return dppo.surrogate(window_step(log_ratio, moved=moved), ADVANTAGES, SIGMAS)

    got = loss(jnp.log(RATIOS), 0.3)
    np.testing.assert_allclose(got.loss, -ADVANTAGES * RATIOS, rtol=1e-6)
    np.testing.assert_array_equal(got.clipped, [False, True, False, False, True])
    near = loss(jnp.log(RATIOS), 0.1)
    assert not near.clipped.any()
    grad = jax.grad(lambda x: loss(x, 0.3).loss.sum())(jnp.log(RATIOS))
    np.testing.assert_allclose(grad, [-2, 0, 3, -1, 0], atol=1e-6)


def test_flash_gains_are_those_of_its_release():
    """Shift 3, 20 steps, s = sigma_1 sigma: 1 / c of the first ten, the table in its code."""
    got = step_gains(Sampler("flow", 1.0, "linear"), schedule.sigmas(20, 3.0))
    expected = [7.49, 7.05, 6.62, 6.19, 5.77, 5.36, 4.96, 4.56, 4.16, 3.78]
    np.testing.assert_allclose(1 / got[:10], expected, rtol=1.5e-3)


def test_flash_gain_is_the_published_formula():
    sampler, sigmas = Sampler("flow", 0.7), schedule.sigmas(10, 3.0)
    sigma, drop = np.asarray(sigmas[1:-2]), -np.diff(sigmas)[1:-1]
    s = 0.7 * np.sqrt(sigma / (1 - sigma))
    expected = np.sqrt(drop) / s + s * np.sqrt(drop) * (1 - sigma) / (2 * sigma)
    np.testing.assert_allclose(step_gains(sampler, sigmas)[1:], expected, rtol=1e-5)


def test_flash_weighs_each_step():
    flash = toy.make("flash", window=1, window_range=(0, 3), clip=0.2)
    index = jnp.array([0, 1, 2, 0, 1])
    step = window_step(jnp.log(RATIOS), index=index)
    weights = step_weights(flash.sampler(), SIGMAS, (0, 3))
    assert weights.shape == (5,) and (weights > 0).all()
    np.testing.assert_allclose(weights[:3].mean(), 1, rtol=1e-6)
    got = flash.surrogate(step, ADVANTAGES, SIGMAS)
    expected = np.array([-2, -2.4, 3, -1, 1.6]) * weights[index]
    np.testing.assert_allclose(got.loss, expected, rtol=1e-6)


def test_places_of_windows():
    plan = toy.plan()._replace(groups=50)
    starts = Flash(window_range=(1, 4)).draw(jax.random.key(0), 0, plan).start
    assert starts.shape == (50 * GROUP,)
    groups = np.asarray(starts).reshape(50, GROUP)
    np.testing.assert_array_equal(groups, groups[:, :1].repeat(GROUP, 1))
    assert set(groups[:, 0]) == {1, 2, 3}
    one = toy.make("grpo", window=2, window_range=(0, 5)).draw(jax.random.key(0), 0, plan)
    assert one.width == 2 and one.start.shape == () and 0 <= one.start <= 3
    slide = toy.make("grpo", window_place="progressive", window_interval=2, window_range=(0, 5))
    assert [int(slide.draw(None, u, plan).start) for u in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 0]


@pytest.mark.parametrize(
    "name,field,value",
    [
        ("grpo", "clip", 0.0), ("grpo", "kl_weight", -1.0), ("grpo", "kl_weight", float("nan")),
        ("grpo", "window_place", "late"), ("grpo", "eta", 0.0), ("grpo", "sde", "none"),
        ("dppo", "tau", 0.0), ("guard", "clip", 1.0),
    ],
)  # fmt: skip
def test_refuses(name, field, value):
    with pytest.raises(ValueError, match=rf"algorithm\.{field}"):
        toy.make(name, **{field: value})


def test_refuses_a_window_that_does_not_fit():
    with pytest.raises(ValueError, match="must stay deterministic"):
        toy.make("grpo", window_range=(0, 6)).draw(jax.random.key(0), 0, toy.plan())
