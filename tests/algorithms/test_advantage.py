"""Advantages against hand numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.algorithms.advantage import group_advantage

REWARDS = jnp.array([1.0, 3.0, 10.0, 10.0])


def test_group_std():
    # first group: mean 2, population std 1; second: no spread
    got = group_advantage(REWARDS, 2, eps=0.0001)
    np.testing.assert_allclose(got, [-1 / 1.0001, 1 / 1.0001, 0, 0], rtol=1e-6)


def test_global_std():
    # mean 6; deviations -5 -3 4 4; std sqrt(66 / 4)
    std = np.sqrt(66 / 4) + 1e-4
    got = group_advantage(REWARDS, 2, std="global")
    np.testing.assert_allclose(got, [-1 / std, 1 / std, 0, 0], rtol=1e-6)


def test_invalid_samples_change_nothing():
    rewards = jnp.array([1.0, jnp.nan, 3.0, 7.0, 7.0, jnp.inf])
    valid = jnp.array([True, False, True, False, True, False])
    for std in ("group", "global"):
        got = group_advantage(rewards, 3, valid, std=std)
        np.testing.assert_allclose(got, [-1, 0, 1, 0, 0, 0], rtol=2e-4)


def test_clip():
    rewards = jnp.array([0.0] * 99 + [1.0])  # z-score of the last: sqrt(99)
    assert group_advantage(rewards, 100)[-1] == 5
    assert group_advantage(rewards, 100, clip=2.0)[-1] == 2


def test_nothing_valid():
    got = group_advantage(jnp.full(4, jnp.nan), 2, jnp.zeros(4, bool), std="global")
    np.testing.assert_array_equal(got, np.zeros(4))


@pytest.mark.parametrize("size,std", [(3, "group"), (1, "group"), (2, "batch")])
def test_bad_input(size, std):
    with pytest.raises(ValueError):
        group_advantage(REWARDS, size, std=std)
