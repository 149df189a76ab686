"""Advantages against hand numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.algorithms import advantage
from worldr1_jax.algorithms.advantage import Advantage, each_standardised, group_advantage
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.types import Scores

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


def test_batch_std():
    # deviations from the groups' means -1 1 0 0; std sqrt(1 / 2)
    std = np.sqrt(1 / 2) + 1e-4
    got = group_advantage(REWARDS, 2, std="batch")
    np.testing.assert_allclose(got, [-1 / std, 1 / std, 0, 0], rtol=1e-6)


def test_invalid_samples_change_nothing():
    rewards = jnp.array([1.0, jnp.nan, 3.0, 7.0, 7.0, jnp.inf])
    valid = jnp.array([True, False, True, False, True, False])
    for std, scale in (("group", 1), ("global", 1), ("batch", 1)):
        got = group_advantage(rewards, 3, valid, std=std)
        np.testing.assert_allclose(got, np.array([-1, 0, 1, 0, 0, 0]) / scale, rtol=2e-4)


def test_clip():
    rewards = jnp.array([0.0] * 99 + [1.0])  # z-score of the last: sqrt(99)
    assert group_advantage(rewards, 100)[-1] == 5
    assert group_advantage(rewards, 100, clip=2.0)[-1] == 2


def test_nothing_valid():
    got = group_advantage(jnp.full(4, jnp.nan), 2, jnp.zeros(4, bool), std="global")
    np.testing.assert_array_equal(got, np.zeros(4))


@pytest.mark.parametrize("size,std", [(3, "group"), (1, "group"), (2, "median")])
def test_bad_input(size, std):
    with pytest.raises(ValueError):
        group_advantage(REWARDS, size, std=std)


@pytest.mark.parametrize(
    "field,value", [("rewards", "all"), ("std", "median"), ("floor", -1.0), ("clip", 0.0)]
)
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=field):
        Advantage(**{field: value})


def test_each_by_its_own_spread():
    """Spreads of 1 and 100, weights 2 and 1: z is 2 (-1, 1) + (1, -1) where the plain sum would be
    the second reward's alone."""
    small, large = jnp.array([1.0, 3.0, 0.0, 0.0]), jnp.array([200.0, 0.0, 0.0, 0.0])
    parts, weights = {"small": small, "large": large}, {"small": 2.0, "large": 1.0, "other": 1.0}
    got = each_standardised(parts, weights, 2, jnp.ones(4, bool), eps=0.0 + 1e-9)
    np.testing.assert_allclose(got, [-1, 1, 0, 0], atol=1e-6)


def test_the_floor_keeps_noise_small():
    """A spread of 0.001 counts as it is, not as 1: deviations of 0.001 over a floor of 0.1."""
    noise = jnp.array([0.001, -0.001])
    got = each_standardised({"n": noise}, {"n": 1.0}, 2, jnp.ones(2, bool), floor=0.1, eps=0.0)
    np.testing.assert_allclose(got, [0.01, -0.01], rtol=1e-5)


def one(rewards, **fields):
    """Advantages of a run that learns from one reward."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1])
    make = advantage.make(mesh, 2, {"n": 1.0}, Advantage(rewards="each", std="batch", **fields))
    rewards = jnp.array(rewards)
    return make(Scores({"n": rewards}, rewards, jnp.ones(4, bool)))[0]


def test_a_floor_holds_in_what_is_learnt_from():
    """Standardised once more, what the floor has made small would be as large as without it."""
    noise = [0.001, -0.001, -0.001, 0.001]
    np.testing.assert_allclose(one(noise, floor=0.1), np.array(noise) / 0.1001 * 1.1, rtol=1e-3)
    assert np.abs(one(noise)).min() > 0.9


def test_rounding_teaches_nothing():
    same = 0.7 + np.float32(6e-8) * np.array([1, 0, 0, 1], np.float32)
    np.testing.assert_array_equal(one(same), 0)


def test_a_floor_of_a_sum_is_none():
    with pytest.raises(ValueError, match="floor is not 0, but rewards is 'sum'"):
        Advantage(floor=0.1)


def scores():
    """Two groups of three; "b" failed on sample 5, and only sample 3 of its group is left."""
    a, b = jnp.array([1.0, 2, 3, 5, 7, 6]), jnp.array([4.0, 4, 1, 0, jnp.nan, jnp.nan])
    valid = jnp.isfinite(a + b)
    return Scores({"a": a, "b": b, "c": 0 * a}, jnp.where(valid, a + b, jnp.nan), valid)


WEIGHTS = {"a": 1.0, "b": 0.5, "c": 0.0}


def test_of_a_run_each():
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1])
    settings = Advantage(rewards="each", std="group")
    got, valid = advantage.make(mesh, 3, WEIGHTS, settings)(scores())
    a = (np.array([1, 2, 3]) - 2) / (np.sqrt(2 / 3) + 1e-4)
    b = (np.array([4, 4, 1]) - 3) / (np.sqrt(2) + 1e-4)
    z = a + 0.5 * b
    np.testing.assert_allclose(got, [*z / (z.std() + 1e-4), 0, 0, 0], rtol=1e-5)
    np.testing.assert_array_equal(valid, [1, 1, 1, 0, 0, 0])
    # In the dynamic phase one may be off, and count for nothing.
    got, _ = advantage.make(mesh, 3, WEIGHTS, settings)(scores(), off=("b",))
    np.testing.assert_allclose(got[:3], a / (a.std() + 1e-4), rtol=1e-5)


def test_of_a_run_is_one_program(caplog):
    """No operation by itself: on a pod each would be a dispatch, and a meeting of all hosts."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1])
    found = scores()
    advantages = advantage.make(mesh, 3, WEIGHTS, Advantage(std="global"))
    with jax.log_compiles():
        got, valid = advantages(found)
        advantages(found)
    compiled = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
    assert len(compiled) == 1 and "compare" in compiled[0]
    np.testing.assert_allclose(
        got, group_advantage(found.total, 3, found.valid, std="global"), rtol=1e-6
    )
    np.testing.assert_array_equal(valid, [1, 1, 1, 0, 0, 0])
