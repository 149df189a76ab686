"""Failed scores mask their sample, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.rewards import combine

NAN = float("nan")
PARTS = {
    "recon": jnp.array([0.5, NAN, 0.2, 0.1]),
    "trajectory": jnp.array([0.25, 0.5, float("inf"), 0.3]),
    "general": jnp.array([0.1, 0.2, 0.3, 0.4]),
}


def test_weighted_sum_and_mask():
    weights = {"recon": 1.0, "trajectory": 2.0, "general": 0.5}
    scores = jax.jit(lambda parts: combine.combine(parts, weights))(PARTS)
    assert scores.valid.tolist() == [True, False, False, True]
    np.testing.assert_allclose(scores.total[jnp.array([0, 3])], [1.05, 0.9], rtol=1e-6)
    assert np.isnan(scores.total[1]) and np.isnan(scores.total[2])
    assert scores.total.dtype == jnp.float32


def test_dropped_reward_masks_nothing():
    scores = combine.combine(PARTS, {"recon": 0.0, "trajectory": 0.0, "general": 1.0})
    assert scores.valid.all()
    np.testing.assert_allclose(scores.total, PARTS["general"])
    assert set(scores.parts) == set(PARTS)


def test_dropped_reward_may_be_missing():
    scores = combine.combine({"general": PARTS["general"]}, {"recon": 0.0, "general": 1.0})
    assert scores.valid.all()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"recon": 0.0}, "all weights are 0"),
        ({"meta_view": 1.0}, "has a weight but no score"),
        ({"recon": NAN}, "finite"),
    ],
)
def test_bad_weights_are_named(weights, words):
    with pytest.raises(ValueError, match=words):
        combine.combine(PARTS, weights)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes"):
        combine.combine({"a": jnp.zeros(2), "b": jnp.zeros(3)}, {"a": 1.0, "b": 1.0})
