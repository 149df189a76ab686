"""Steps against hand numbers, and their distributions against samples and exact marginals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.rollout import schedule, sde


def scalar(value):
    return jnp.full((1, 1), value)


def test_flow_sde_hand_numbers():
    # s = .7 sqrt(.8 / .2) = 1.4; s^2 / (2 sigma) = 1.225; D = .2
    # mean = 2 (1 - .245) + 3 (1 + 1.225 * .2) (-.2) = 1.51 - .747
    step = sde.flow_sde(scalar(2.0), scalar(3.0), 0.8, 0.6, 0.7, 0.9)
    np.testing.assert_allclose(step.mean, [[0.763]], rtol=1e-6)
    np.testing.assert_allclose(step.std, 1.4 * np.sqrt(0.2), rtol=1e-6)


def test_flow_sde_first_step_is_clamped():
    # sigma = 1: s^2 = .49 / (1 - .9) = 4.9, not infinite; (1 - sigma) itself is still 0
    step = sde.flow_sde(scalar(2.0), scalar(3.0), 1.0, 0.9, 0.7, 0.9)
    np.testing.assert_allclose(step.mean, [[2 * (1 - 4.9 / 2 * 0.1) - 0.3]], rtol=1e-5)
    np.testing.assert_allclose(step.std, np.sqrt(4.9 * 0.1), rtol=1e-5)


def test_cps_hand_numbers():
    # eta 1/3: sin = 1/2, cos = sqrt(3)/2. data = 2 - 2.4 = -.4; noise = 2 + .6 = 2.6
    step = sde.cps(scalar(2.0), scalar(3.0), 0.8, 0.6, 1 / 3)
    np.testing.assert_allclose(step.mean, [[0.4 * -0.4 + 0.6 * np.sqrt(0.75) * 2.6]], rtol=1e-6)
    np.testing.assert_allclose(step.std, 0.3, rtol=1e-6)


@pytest.mark.parametrize("name,value", [("sd3", 0.7), ("linear", 0.315), ("constant", 0.7)])
def test_noise_levels(name, value):
    got = sde.noise_level(name, jnp.float32(0.5), 0.7, jnp.float32(0.9))
    np.testing.assert_allclose(got, value, rtol=1e-6)


def test_unknown_noise_level():
    with pytest.raises(ValueError, match="sd3, linear, constant"):
        sde.noise_level("wan", jnp.float32(0.5), 0.7, jnp.float32(0.9))


def test_log_prob_and_kl_hand_numbers():
    x = jnp.array([[1.0, 3.0]])
    mean = jnp.array([[0.0, 1.0]])
    # squares 1 and 4, mean 2.5, std 2
    expected = -2.5 / 8 - np.log(2) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(sde.log_prob(x, mean, 2.0), [expected], rtol=1e-6)
    np.testing.assert_allclose(sde.kl(x, mean, 2.0), [2.5 / 8], rtol=1e-6)
    assert sde.log_prob(x.astype(jnp.bfloat16), mean, 2.0).dtype == jnp.float32


def test_ode_hand_numbers():
    np.testing.assert_allclose(sde.ode(scalar(2.0), scalar(3.0), 0.8, 0.6), [[1.4]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["flow", "cps"])
def test_no_noise_is_the_ode(kind):
    args = (scalar(2.0), scalar(3.0), 0.8, 0.6)
    step = sde.flow_sde(*args, 0.0, 0.9) if kind == "flow" else sde.cps(*args, 0.0)
    np.testing.assert_allclose(step.mean, sde.ode(*args), rtol=1e-6)
    assert step.std == 0


COUNT = 40_000


@pytest.mark.parametrize("kind", ["flow", "cps"])
def test_marginals_of_a_chain(kind):
    """Data at one point c: then v = (x - c) / sigma is exact and x_sigma ~ N((1-sigma) c, sigma^2).

    The chain must land on that distribution: CPS exactly, the flow-SDE up to its step size. The
    error of a std over 40,000 draws is 0.35%, of a mean 0.5% of the std: tolerances are 5 of them.
    """
    centre, steps, stop = 1.5, 400, 300
    sigmas = schedule.sigmas(steps, 1.0)

    def body(x, inputs):
        key, sigma, sigma_next = inputs
        v = (x - centre) / sigma
        if kind == "flow":
            step = sde.flow_sde(x, v, sigma, sigma_next, 0.7, sigmas[1])
        else:
            step = sde.cps(x, v, sigma, sigma_next, 0.3)
        return step.mean + step.std * jax.random.normal(key, x.shape), None

    keys = jax.random.split(jax.random.key(1), stop)
    x = jax.random.normal(jax.random.key(0), (COUNT, 1))
    x, _ = jax.lax.scan(body, x, (keys, sigmas[:stop], sigmas[1 : stop + 1]))
    level = float(sigmas[stop])
    assert abs(x.mean() - (1 - level) * centre) < 0.025 * level
    # the flow-SDE has a discretisation error of order 1 / steps on top
    assert abs(x.std() / level - 1) < 0.0175 + (0.01 if kind == "flow" else 0)


def test_mean_log_prob_of_own_samples_is_minus_entropy():
    std = 0.3
    x = std * jax.random.normal(jax.random.key(2), (COUNT, 1))
    got = sde.log_prob(x, jnp.zeros_like(x), std).mean()
    # the std of one log-probability is sqrt(1/2); 5 standard errors
    assert abs(got + 0.5 * np.log(2 * np.pi * np.e * std**2)) < 5 * 0.71 / COUNT**0.5
