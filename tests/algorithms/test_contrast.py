"""The contrast of captions, against numbers by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algorithms import toy
from worldr1_jax.algorithms import base
from worldr1_jax.algorithms.base import Rival
from worldr1_jax.algorithms.contrast import contrast
from worldr1_jax.algorithms.forward import Noised


def velocities():
    """Of two samples with four numbers: the own caption misses by 1, the rival by 2."""
    wanted = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    return wanted + 1.0, wanted + 2.0, wanted


def test_by_hand():
    own, rival, wanted = velocities()
    sigma, lead = jnp.array([0.5, 1.0]), jnp.array([0.6, -0.2])
    loss, gap = contrast(own, rival, wanted, sigma, lead, sharpness=2.0, margin=1.0)
    # l = mean square over mean size: 1 and 2, so that the own caption fits better by 1
    np.testing.assert_allclose(gap, [1.0, -1.0], rtol=1e-5)
    softplus = np.log1p(np.exp([1.0 - 2.0, 1.0 + 2.0]))
    np.testing.assert_allclose(
        loss, [0.6 * 0.5 * softplus[0] / 2, 0.2 * softplus[1] / 2], rtol=1e-5
    )


@pytest.mark.parametrize("lead", [0.7, -0.7])
def test_it_leads_to_the_better_caption_and_away_from_the_other(lead):
    own, rival, wanted = velocities()

    def loss(own, rival):
        options = {"sharpness": 20.0, "margin": 4.0}
        return contrast(own, rival, wanted, jnp.ones(2), jnp.full(2, lead), **options)[0].sum()

    to_own, to_rival = jax.grad(loss, argnums=(0, 1))(own, rival)
    assert (jnp.sign(to_own) == jnp.sign(lead)).all()  # both miss by too much
    assert (jnp.sign(to_rival) == -jnp.sign(lead)).all()


def test_a_pair_that_is_told_apart_counts_no_more():
    own, _, wanted = velocities()
    slope = jax.grad(
        lambda own: contrast(
            own, wanted + 9, wanted, jnp.ones(2), jnp.ones(2), sharpness=20.0, margin=4.0
        )[0].sum()
    )
    assert float(jnp.abs(slope(own)).max()) < 1e-6


def test_no_lead_no_loss():
    own, rival, wanted = velocities()
    loss, gap = contrast(own, rival, wanted, jnp.ones(2), jnp.zeros(2), sharpness=20.0, margin=4.0)
    assert not np.any(loss) and not np.any(gap)


@pytest.mark.parametrize("name", ["nft", pytest.param("awm", marks=pytest.mark.slow)])
def test_in_an_update(name):
    """It moves the gradient, in whatever parts; the rival of a sample that is invalid is not read,
    and a rival without a lead changes nothing."""
    algorithm, start = toy.make(name, contrast=3.0), toy.params(moved=0.3)
    batch, _ = toy.rollout(*start, jax.random.key(1), algorithm=algorithm)
    lead = jnp.linspace(-1, 1, toy.COUNT)
    text = jnp.roll(batch.text, 1, axis=0).at[2].set(jnp.nan)
    batch = replace(batch, valid=batch.valid.at[2].set(False), rival=Rival(text, lead))
    whole, metrics = toy.gradient(algorithm, start, batch)
    parts, _ = toy.gradient(algorithm, start, batch, microbatches=4)
    toy.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    alone, _ = toy.gradient(algorithm, start, replace(batch, rival=Rival(text, 0 * lead)))
    plain, _ = toy.gradient(toy.make(name), start, replace(batch, rival=None))
    toy.assert_close(alone, plain, rtol=1e-4, atol=1e-6)
    assert np.abs(whole["b"] - plain["b"]).max() > 1e-3 and np.isfinite(metrics["loss"])


def test_the_anchor_holds_what_both_captions_share_by_hand():
    """The policy says the text's mean, and the base 0.5: 1 and 3 are 2 on average, 1.5 too much."""

    def says(scale, offset):
        def velocity(latents, sigma, text, *, guidance=None):
            return scale * text.mean((1, 2))[:, None, None, None, None] + 0 * latents + offset

        return velocity

    x = jnp.ones((2, 1, 1, 1, 3))
    text, other = (jnp.full((2, 4, 5), value) for value in (1.0, 3.0))
    samples = base.Samples(
        x, text, jnp.zeros(2), jnp.ones(2, bool), jax.random.split(jax.random.key(0), 2),
        base.Rival(other, jnp.zeros(2)),
    )  # fmt: skip
    policies = base.Policies(says(1.0, 0.0), says(1.0, 0.0), says(1.0, 0.0), says(0.0, 0.5))
    noised = Noised(x, jnp.ones(2), x)
    held = toy.make("nft", contrast=1.0, anchor=2.0)
    found = held.contrasted(policies, samples, noised, jnp.ones_like(x))
    np.testing.assert_allclose(found.shared, 1.5**2, rtol=1e-6)
    free = toy.make("nft", contrast=1.0)
    assert not np.any(free.contrasted(policies, samples, noised, x).shared)
    assert held.forwards == free.forwards + 2


@pytest.mark.parametrize("name", ["nft", pytest.param("awm", marks=pytest.mark.slow)])
def test_the_anchor_pulls_back_to_the_base(name):
    """Where nothing else is learnt, it takes what captions share back."""
    algorithm, start = toy.make(name, contrast=1.0, anchor=1.0), toy.params(moved=0.3)
    batch, _ = toy.rollout(*start, jax.random.key(1), algorithm=algorithm)
    rival = Rival(jnp.roll(batch.text, 1, axis=0), jnp.zeros(toy.COUNT))
    batch = replace(batch, rival=rival, advantages=0 * batch.advantages)
    pulled, metrics = toy.gradient(algorithm, start, batch)
    free, _ = toy.gradient(replace(algorithm, anchor=0.0), start, batch)
    assert metrics["shared"] > 0
    assert np.sum((pulled["b"] - free["b"]) * start[0]["b"]) > 0
