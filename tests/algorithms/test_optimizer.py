"""AdamW at gradients of any size: epsilon, clipping, warm-up, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from worldr1_jax.algorithms.optimizer import clip_by_norms_seen, make_optimizer


def steps(optimizer, gradients):
    """Parameters after each of these gradients, from 0."""
    params = {"w": jnp.zeros(2)}
    state, seen = optimizer.init(params), []
    for gradient in gradients:
        change, state = optimizer.update({"w": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, change)
        seen.append(np.asarray(params["w"]))
    return np.array(seen), state


def test_warm_up_is_linear():
    seen, _ = steps(make_optimizer(0.1, weight_decay=0.0, warmup_steps=4), [[30.0, 40.0]] * 6)
    sizes = -np.diff(seen[:, 0], prepend=0)  # Adam's step on a constant gradient is the rate itself
    np.testing.assert_allclose(sizes, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_scaled_loss_learns_the_same(scale):
    """Down to 1e-9 a parameter, the size at 14B; norms that are clipped are clipped alike."""
    gradients = 1e-3 * np.random.default_rng(0).standard_normal((20, 2))
    gradients[7] *= 50
    expected, _ = steps(make_optimizer(0.1), gradients)
    got, _ = steps(make_optimizer(0.1), scale * gradients)
    np.testing.assert_allclose(got, expected, atol=1e-5)  # of steps of 0.1
    usual, _ = steps(make_optimizer(0.1, eps=1e-8), 1e-6 * gradients)
    assert np.abs(usual[-1] - expected[-1]).max() > 0.1  # what optax's own epsilon would do


@pytest.mark.parametrize("warmup", [0, 2])
def test_share_of_parameters_below_epsilon(warmup):
    """Root mean squares of 3e-9 and 3e-7 against epsilons around them."""
    for eps, share in ((1e-15, 0.0), (1e-8, 0.5), (1e-6, 1.0)):
        optimizer = make_optimizer(0.1, eps=eps, warmup_steps=warmup)
        _, state = steps(optimizer, [[3e-9, 3e-7]] * 3)
        assert optimizer.eps_share(state) == share


def test_norms_are_clipped_by_those_seen():
    """Hand numbers: norms 5, 5, 50, 5 and 0 with factor 3."""
    clip = clip_by_norms_seen(3.0)
    state, kept = clip.init(None), []
    for norm in (5.0, 5.0, 50.0, 5.0, 0.0, 50.0):
        got, state = clip.update({"w": jnp.array([0.6 * norm, 0.8 * norm])}, state)
        kept.append(float(optax.tree.norm(got)))
    # Means of what was kept, weights 0.9^n: (5 0.9 + 5) / 1.9 = 5; with 15: (0.81 5 + 0.9 5 + 15)
    # / 2.71 = 8.69; with 5 again 7.62, three times which bounds the last; 0 does not count.
    mean = (0.729 * 5 + 0.81 * 5 + 0.9 * 15 + 5) / (1 + 0.9 + 0.81 + 0.729)
    np.testing.assert_allclose(kept, [5, 5, 15, 5, 0, 3 * mean], rtol=1e-5)


def test_moments_are_float32():
    state = make_optimizer(0.1).init({"w": jnp.zeros(2)})
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "field,value",
    [
        ("learning_rate", float("nan")), ("learning_rate", 0.0), ("learning_rate", float("inf")),
        ("weight_decay", -1.0), ("clip_norm", float("nan")), ("clip_norm", -1.0),
        ("warmup_steps", -1), ("eps", 0.0), ("b1", 1.0), ("b2", float("nan")),
    ],
)  # fmt: skip
def test_refuses(field, value):
    with pytest.raises(ValueError, match=field.split("_")[0]):
        make_optimizer(**{"learning_rate": 1e-3, field: value})
