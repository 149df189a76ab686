"""Losses on the forward process against hand numbers, and what they do to a policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algorithms import toy
from tests.algorithms.toy import COUNT, NULL, SGD, SIGMAS
from worldr1_jax.algorithms import update
from worldr1_jax.algorithms.base import Policies, Samples
from worldr1_jax.rollout.unipc import UniPC

B, SHAPE = 4, (1, 1, 1, 6)
AXES = (1, 2, 3, 4)
KEYS = jax.random.split(jax.random.key(5), B)


def constant(value):
    """A policy whose velocity is `value` times the state, with a word on guidance."""

    def policy(latents, sigma, text, *, guidance=3.0):
        return value * guidance * latents

    return policy


def look(algorithm, policies, advantages, term=1):
    """The loss, and the latents at which it looked."""
    x0 = jax.random.normal(jax.random.key(1), (B, *SHAPE))
    samples = Samples(x0, jnp.zeros((B, 1, 1)), jnp.asarray(advantages), jnp.ones(B, bool), KEYS)
    found = algorithm.loss(policies, samples, SIGMAS, jnp.int32(term))
    return found, x0, algorithm.noised(KEYS, x0, SIGMAS, jnp.int32(term))


def test_noise_levels_are_stratified():
    """Draw k of n lies in the k-th part of the steps up to the last level that a rollout asks at;
    latents are (1 - t) x0 + t eps."""
    algorithm, keys = toy.make("nft", draws=2), jax.random.split(jax.random.key(0), 500)
    x0 = jax.random.normal(jax.random.key(1), (500, *SHAPE))
    halves = [algorithm.noised(keys, x0, SIGMAS, jnp.int32(k)) for k in range(2)]
    middle = (SIGMAS[2] + SIGMAS[3]) / 2  # of the levels 0 .. 5
    assert (halves[0].sigma >= middle).all() and (halves[1].sigma <= middle).all()
    assert halves[0].sigma.max() > 0.99 and halves[1].sigma.min() < SIGMAS[5] + 0.01
    assert halves[1].sigma.min() >= SIGMAS[5]
    high = toy.make("nft", draws=1, levels=(0.8, 0.9)).noised(keys, x0, SIGMAS, jnp.int32(0)).sigma
    assert high.min() < 0.805 and high.max() > 0.895 and ((high >= 0.8) & (high <= 0.9)).all()
    t = halves[1].sigma[:, None, None, None, None]
    np.testing.assert_allclose(halves[1].latents, (1 - t) * x0 + t * halves[1].noise, atol=1e-6)
    np.testing.assert_allclose(jnp.std(halves[0].noise), 1, atol=0.05)


@pytest.mark.parametrize("absorb,guidance", [(True, 1.0), (False, 3.0)])
def test_nft_hand_numbers(absorb, guidance):
    nft = toy.make("nft", beta=0.5, advantage_max=2.0, kl_weight=0.1, absorb=absorb)
    policies = Policies(constant(0.4), constant(0.1), constant(9.0), constant(0.2))
    found, x0, noised = look(nft, policies, [-3.0, -1.0, 0.0, 1.0])
    x, t = np.asarray(noised.latents), np.asarray(noised.sigma)[:, None, None, None, None]
    v, old, base = (c * guidance * x for c in (0.4, 0.1, 0.2))
    plus = x - t * (0.5 * old + 0.5 * v) - x0
    minus = x - t * (1.5 * old - 0.5 * v) - x0
    terms = [(e**2).mean(AXES) / np.abs(e).mean(AXES) for e in (plus, minus)]
    r = np.array([0.0, 0.25, 0.5, 0.75])
    expected = 2.0 / 0.5 * (r * terms[0] + (1 - r) * terms[1])
    np.testing.assert_allclose(found.losses["policy_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found.losses["kl"], ((v - base) ** 2).mean(AXES), rtol=1e-5)
    assert found.weights == {"kl": 0.1, "contrast": 0.0, "shared": 0.0}


def test_awm_hand_numbers():
    awm = toy.make("awm", power=0.5, clip=0.1, advantage_max=2.0, draws=3)
    policies = Policies(constant(0.4), constant(0.1), constant(0.3), constant(0.2))
    found, x0, noised = look(awm, policies, [-3.0, -1.0, 0.0, 1.0])
    x, t = np.asarray(noised.latents), np.asarray(noised.sigma)

    def log_prob(v):
        error = ((v - (noised.noise - x0)) ** 2).mean(AXES)
        return -(np.sqrt(error + 1e-10) - 1e-5) * t / 0.5

    ratio = np.exp(log_prob(0.4 * x) - log_prob(0.1 * x))
    a = np.array([-1.0, -0.5, 0.0, 0.5])
    expected = -np.minimum(a * ratio, a * np.clip(ratio, 0.9, 1.1))
    np.testing.assert_allclose(found.losses["policy_loss"], expected, rtol=1e-5)
    for name, other in (("kl", 0.2), ("kl_average", 0.3)):
        distance = (((0.4 - other) * x) ** 2).mean(AXES)
        np.testing.assert_allclose(found.losses[name], distance, rtol=1e-5)


def test_nft_keeps_an_old_policy_that_follows():
    """old <- 0.75 old + 0.25 new after each rollout, and it draws the next."""
    nft = toy.make("nft", decay=0.75)
    adapters, frozen = toy.params(moved=0.3)
    roll = toy.jit(functools.partial(toy.rollout, algorithm=nft))
    batch, _ = roll(adapters, frozen, jax.random.key(3))
    state = update.init_state(adapters, SGD, nft)
    after, metrics = toy.step_fn(nft)(state, frozen, batch, SIGMAS, NULL)
    assert metrics["grad_norm"] > 1e-3 and metrics["moved"] == 0
    for name in ("a", "b"):
        expected = 0.75 * adapters[name] + 0.25 * after.adapters[name]
        np.testing.assert_allclose(after.algorithm[name], expected, rtol=1e-6)
    assert nft.drawing(after.adapters, after.algorithm) is after.algorithm
    _, metrics = toy.step_fn(nft)(after, frozen, batch, SIGMAS, NULL)
    assert metrics["moved"] > 0


def test_awm_ratio_is_one_before_the_first_step():
    awm = toy.make("awm")
    start = toy.params(moved=0.3)
    batch, _ = toy.jit(functools.partial(toy.rollout, algorithm=awm))(*start, jax.random.key(3))
    _, metrics = toy.gradient(awm, start, batch)
    assert metrics["ratio_deviation_first"] <= 1e-6 and metrics["grad_norm"] > 1e-4


def test_any_solver():
    draw = toy.make("nft", solver="unipc").draw(jax.random.key(0), 0, toy.plan(guidance=3.0))
    assert isinstance(draw.solver, UniPC) and draw.width == 0 and draw.sampler.guidance == 3.0
    assert draw.sampler.kind == "none" and len(draw.solver.timesteps) == 6
    start = toy.params()
    nft = toy.make("nft", solver="unipc")
    batch, _ = toy.jit(functools.partial(toy.rollout, algorithm=nft))(*start, jax.random.key(3))
    assert batch.trajectory.latents.shape[0] == COUNT


@pytest.mark.parametrize(
    "name,field,value",
    [
        ("nft", "draws", 0), ("nft", "beta", 0.0), ("nft", "decay", 1.0), ("nft", "solver", "heun"),
        ("nft", "kl_weight", -1.0), ("nft", "levels", (0.5, 0.2)),
        ("nft", "advantage_max", 0.0), ("awm", "power", 0.0), ("awm", "clip", 2.0),
        ("awm", "average_weight", -1.0),
    ],
)  # fmt: skip
def test_refuses(name, field, value):
    with pytest.raises(ValueError, match=rf"algorithm\.{field}"):
        toy.make(name, **{field: value})
