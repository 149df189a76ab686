"""Surrogate against hand numbers, and the step weights against the published formula."""

import jax
import jax.numpy as jnp
import numpy as np

from worldr1_jax.algorithms import grpo as loss
from worldr1_jax.rollout import schedule
from worldr1_jax.rollout.sample import Sampler


def test_clipped_surrogate_hand_numbers():
    ratios = np.array([1.0, 1.5, 1.5, 0.5, 0.5], np.float32)
    advantages = jnp.array([2.0, 2.0, -2.0, 2.0, -2.0])
    got = loss.clipped_surrogate(jnp.log(ratios), advantages, 0.2)
    # only moves that went too far the rewarded way are clipped
    np.testing.assert_allclose(got.loss, [-2, -2.4, 3, -1, 1.6], rtol=1e-6)
    np.testing.assert_allclose(got.ratio, ratios, rtol=1e-6)
    np.testing.assert_array_equal(got.clipped, [False, True, False, False, True])


def test_clipped_samples_have_no_gradient():
    advantages = jnp.array([2.0, 2.0, -2.0])
    log_ratio = jnp.log(jnp.array([1.5, 1.0, 0.5]))
    grad = jax.grad(lambda x: loss.clipped_surrogate(x, advantages, 0.2).loss.sum())(log_ratio)
    np.testing.assert_allclose(grad, [0, -2, 0], atol=1e-6)


def test_flash_gain_is_the_published_formula():
    sampler, sigmas = Sampler("flow", 0.7), schedule.sigmas(10, 3.0)
    sigma, drop = np.asarray(sigmas[1:-2]), -np.diff(sigmas)[1:-1]
    s = 0.7 * np.sqrt(sigma / (1 - sigma))
    expected = np.sqrt(drop) / s + s * np.sqrt(drop) * (1 - sigma) / (2 * sigma)
    np.testing.assert_allclose(loss.step_gains(sampler, sigmas)[1:], expected, rtol=1e-5)


def test_flash_weights_have_mean_one():
    for sampler in (Sampler("flow", 0.7), Sampler("cps", 0.5)):
        weights = np.asarray(loss.flash_weights(sampler, schedule.sigmas(10, 3.0)))
        assert weights.shape == (9,) and (weights > 0).all()
        np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)
