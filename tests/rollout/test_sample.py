"""The scan against plain loops, and what it promises about keys, windows and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.rollout import schedule, sde
from worldr1_jax.rollout.sample import (
    Sampler,
    guided,
    sample,
    sample_keys,
    step_noise,
    stochastic_step,
)

SHAPE = (3, 2, 2, 2)
SIGMAS = schedule.sigmas(6, 3.0)
FLOW = Sampler("flow", 0.7)


def velocity(latents, timestep, text):
    """Each sample by itself, smooth, and dependent on all three arguments."""
    shift = jnp.mean(text, axis=(1, 2))[:, None, None, None, None]
    level = timestep[:, None, None, None, None] / 1000
    return jnp.tanh(latents * 0.7 + shift) + 0.3 * level * latents


def step_outputs(trajectory, i, text, sampler):
    """Step and log-probability of window step i, recomputed."""
    before, after = trajectory.window_latents[i], trajectory.window_latents[i + 1]
    index = trajectory.window_start + i
    v = guided(velocity, 1.0, before, SIGMAS[index], text, None)
    step = stochastic_step(sampler, before, v, SIGMAS, index)
    return step, sde.log_prob(after, step.mean, step.std)


@pytest.fixture(scope="module")
def inputs():
    noise = jax.random.normal(jax.random.key(1), (4, *SHAPE))
    text = jax.random.normal(jax.random.key(2), (4, 5, 3))
    return sample_keys(jax.random.key(0), 4), noise, text


def run(inputs, sampler, window, **options):
    keys, noise, text = inputs
    jitted = jax.jit(
        lambda start, keys, noise, text: sample(
            velocity,
            keys,
            noise,
            SIGMAS,
            text,
            sampler=sampler,
            window=(start, window[1]),
            **options,
        )
    )
    return jitted(window[0], keys, noise, text)


def test_ode_is_the_plain_loop(inputs):
    _, x, text = inputs
    got = run(inputs, Sampler("none"), (0, 0))
    for i in range(6):
        x = x + velocity(x, jnp.full(4, SIGMAS[i] * 1000), text) * (SIGMAS[i + 1] - SIGMAS[i])
    np.testing.assert_allclose(got.latents, x, atol=1e-5)  # float32 rounding over six steps
    assert got.window_latents.shape == (1, 4, *SHAPE) and got.log_prob_old.shape == (0, 4)


@pytest.mark.parametrize("sampler", [FLOW, Sampler("cps", 0.5)], ids=["flow", "cps"])
@pytest.mark.parametrize("start", [0, 2, 3])
def test_window_is_the_plain_loop(inputs, sampler, start):
    keys, x, text = inputs
    got = run(inputs, sampler, (start, 2))
    states, log_probs = [x], []
    for i in range(6):
        v = velocity(x, jnp.full(4, SIGMAS[i] * 1000), text)
        if start <= i < start + 2:
            if sampler.kind == "flow":
                step = sde.flow_sde(x, v, SIGMAS[i], SIGMAS[i + 1], 0.7, SIGMAS[1])
            else:
                step = sde.cps(x, v, SIGMAS[i], SIGMAS[i + 1], 0.5)
            x = step.mean + step.std * step_noise(keys, jnp.asarray(i), SHAPE)
            log_probs.append(sde.log_prob(x, step.mean, step.std))
        else:
            x = sde.ode(x, v, SIGMAS[i], SIGMAS[i + 1])
        states.append(x)
    np.testing.assert_allclose(got.latents, x, atol=1e-5)
    np.testing.assert_allclose(got.window_latents, states[start : start + 3], atol=1e-5)
    np.testing.assert_allclose(got.log_prob_old, log_probs, atol=1e-5)
    assert got.window_start == start and got.window_start.dtype == jnp.int32


@pytest.mark.parametrize("sampler", [FLOW, Sampler("cps", 0.5)], ids=["flow", "cps"])
def test_each_sample_may_have_its_own_window(inputs, sampler):
    """As if each had been drawn with the others at its place."""
    starts = np.array([0, 2, 2, 3])
    got = run(inputs, sampler, (jnp.array(starts), 2))
    np.testing.assert_array_equal(got.window_start, starts)
    np.testing.assert_array_equal(jax.random.key_data(got.keys), jax.random.key_data(inputs[0]))
    for start in set(starts):
        alone, mine = run(inputs, sampler, (start, 2)), starts == start
        for name in ("window_latents", "log_prob_old"):
            theirs = getattr(alone, name)[:, mine]
            np.testing.assert_allclose(getattr(got, name)[:, mine], theirs, atol=1e-6)
        np.testing.assert_allclose(got.latents[mine], alone.latents[mine], atol=1e-6)


@pytest.mark.parametrize("sampler", [FLOW, Sampler("cps", 0.5)], ids=["flow", "cps"])
def test_recomputed_log_prob(inputs, sampler):
    got = run(inputs, sampler, (1, 3))
    text = inputs[2]
    for i in range(3):
        _, log_prob = jax.jit(lambda t, i: step_outputs(t, i, text, sampler))(got, i)
        # the project's bound on the first ratio
        np.testing.assert_allclose(jnp.exp(log_prob - got.log_prob_old[i]), 1, atol=1e-6)


@pytest.mark.parametrize("sampler", [FLOW, Sampler("cps", 0.5)], ids=["flow", "cps"])
def test_drawn_steps_have_the_stated_mean_and_variance(sampler):
    """8,000 copies of one sample with their own keys; tolerances are 5 standard errors."""
    count = 8000
    noise = jnp.tile(jax.random.normal(jax.random.key(1), (1, 1, 1, 1, 3)), (count, 1, 1, 1, 1))
    text = jnp.zeros((count, 1, 1))
    keys = sample_keys(jax.random.key(5), count)
    got = sample(velocity, keys, noise, SIGMAS, text, sampler=sampler, window=(2, 1))
    step, _ = step_outputs(got, 0, text, sampler)
    drawn = np.asarray(got.window_latents[1]).reshape(count, 3)
    mean, std = np.asarray(step.mean[0]).ravel(), float(step.std)
    assert (np.abs(drawn.mean(0) - mean) < 5 * std / count**0.5).all()
    assert (np.abs(drawn.var(0) / std**2 - 1) < 5 * (2 / count) ** 0.5).all()
    off = np.corrcoef(drawn.T) - np.eye(3)
    assert np.abs(off).max() < 5 / count**0.5


def test_results_do_not_depend_on_the_split(inputs):
    keys, noise, text = inputs
    whole = sample(velocity, keys, noise, SIGMAS, text, sampler=FLOW, window=(1, 2))
    for part in (slice(0, 1), slice(1, 4)):
        got = sample(
            velocity, keys[part], noise[part], SIGMAS, text[part], sampler=FLOW, window=(1, 2)
        )
        np.testing.assert_allclose(got.latents, whole.latents[part], atol=1e-6)
    np.testing.assert_array_equal(
        jax.random.key_data(sample_keys(jax.random.key(0), 2, first=2)),
        jax.random.key_data(keys[2:]),
    )


def test_same_keys_same_bits_and_other_keys_other_noise(inputs):
    first, again = (run(inputs, FLOW, (1, 2)) for _ in range(2))
    np.testing.assert_array_equal(first.latents, again.latents)
    other = run((sample_keys(jax.random.key(9), 4), *inputs[1:]), FLOW, (1, 2))
    np.testing.assert_array_equal(other.window_latents[0], first.window_latents[0])
    assert jnp.abs(other.window_latents[1] - first.window_latents[1]).max() > 0.1


def test_group_members_differ_only_by_noise(inputs):
    keys, noise, text = inputs
    same = (keys, jnp.repeat(noise[:1], 4, 0), jnp.repeat(text[:1], 4, 0))
    got = run(same, FLOW, (2, 2))
    before = got.window_latents[0]
    np.testing.assert_array_equal(before, jnp.repeat(before[:1], 4, 0))
    assert jnp.std(got.window_latents[1], axis=0).min() > 0


@pytest.mark.parametrize("starts", [2, [2, 2, 3, 3], 0], ids=["one window", "two", "no prefix"])
def test_a_shared_prefix_changes_nothing_but_its_cost(inputs, starts):
    """Two groups of two: as if all four had been denoised by themselves, with fewer samples in the
    steps before the first window."""
    keys, noise, text = inputs
    pairs = (keys, jnp.repeat(noise[::2], 2, 0), jnp.repeat(text[::2], 2, 0))
    window = (jnp.array(starts), 2)
    expected, got = run(pairs, FLOW, window), run(pairs, FLOW, window, shared_by=2)
    for name in ("latents", "window_latents", "log_prob_old"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), atol=1e-6)
    assert jnp.abs(got.latents[0] - got.latents[1]).max() > 0.01  # members part in the window


def test_sharing_needs_a_window(inputs):
    with pytest.raises(ValueError, match="need a window"):
        run(inputs, Sampler("none"), (0, 0), shared_by=2)


def test_guidance_hand_numbers(inputs):
    _, noise, text = inputs
    null = jnp.ones((5, 3))
    got = guided(velocity, 4.0, noise, SIGMAS[1], text, null)
    t = jnp.full(4, SIGMAS[1] * 1000)
    cond, uncond = velocity(noise, t, text), velocity(noise, t, jnp.ones_like(text))
    np.testing.assert_allclose(got, 4 * cond - 3 * uncond, atol=1e-5)
    with pytest.raises(ValueError, match="text_null"):
        guided(velocity, 4.0, noise, SIGMAS[1], text, None)


def test_guidance_one_runs_one_forward(inputs):
    calls = []

    def counted(*args):
        calls.append(args)
        return velocity(*args)

    guided(counted, 1.0, inputs[1], SIGMAS[0], inputs[2], jnp.ones((5, 3)))
    assert len(calls) == 1


def test_on_step_acts_outside_the_window_only(inputs):
    got = run(inputs, FLOW, (2, 2), on_step=lambda x, step: jnp.where(step < 4, 0 * x + step, x))
    np.testing.assert_array_equal(got.window_latents[0], jnp.ones((4, *SHAPE)))  # after step 1
    assert jnp.std(got.window_latents[1]) > 0.1 and jnp.std(got.window_latents[2]) > 0.1


def test_bad_input(inputs):
    keys, noise, text = inputs
    for bad in (dict(kind="ddim"), dict(level="wan"), dict(eta=0.0), dict(kind="cps", eta=1.5)):
        with pytest.raises(ValueError):
            Sampler(**bad)
    with pytest.raises(ValueError, match="sample_keys"):
        sample(velocity, jax.random.key(0), noise, SIGMAS, text, sampler=FLOW, window=(0, 2))
    for sampler, window in [(FLOW, (0, 0)), (Sampler("none"), (0, 2)), (FLOW, (4, 2))]:
        with pytest.raises(ValueError, match="window"):
            sample(velocity, keys, noise, SIGMAS, text, sampler=sampler, window=window)
