"""train_step on a small network: first ratio, gradients, masks, averages, meshes, and learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from tests.algorithms import toy
from tests.algorithms.toy import COUNT, SGD, SIGMAS, assert_close, gradient, step_fn, take
from worldr1_jax.algorithms import base, update
from worldr1_jax.algorithms.optimizer import make_optimizer
from worldr1_jax.rollout.sample import stochastic_step

GRPO = toy.make("grpo")


@functools.cache
def drawn(algorithm, guidance=1.0):
    """A policy that has moved, and a rollout of it."""
    start = toy.params(moved=0.3)
    roll = toy.jit(functools.partial(toy.rollout, algorithm=algorithm, guidance=guidance))
    return start, roll(*start, jax.random.key(3))[0]


@pytest.mark.parametrize(
    "algorithm,guidance",
    [
        (GRPO, 1.0),
        (toy.make("grpo", sde="cps", eta=0.5), 1.0),
        (GRPO, 3.0),
        (toy.make("grpo", window_place="group"), 1.0),
    ],
    ids=["flow", "cps", "guidance", "a window for each group"],
)
def test_first_ratio_is_one(algorithm, guidance):
    start, batch = drawn(algorithm, guidance)
    _, metrics = gradient(algorithm, start, batch, guidance=guidance)
    assert metrics["ratio_deviation_first"] <= 1e-6  # the project's bound, float32
    np.testing.assert_allclose(metrics["ratio_mean"], 1, atol=1e-6)
    assert metrics["kl"] > 0 and metrics["clip_fraction"] == 0 and metrics["skipped"] == 0
    assert metrics["grad_norm"] > 0


def test_gradient_is_that_of_the_written_out_loss():
    algorithm = toy.make("grpo", kl_weight=0.5)
    start, batch = drawn(algorithm)
    adapters, frozen = start
    states, first = batch.trajectory.window_latents, int(batch.trajectory.window_start)

    def loss(adapters):
        total = 0.0
        for i in range(2):

            def mean(on, i=i):
                x, sigma = states[i], SIGMAS[first + i]
                told = jnp.full(COUNT, sigma * 1000)
                v = toy.velocity(adapters, frozen, x, told, batch.text, on)
                return stochastic_step(algorithm.sampler(), x, v, SIGMAS, first + i)

            (mu, std), (ref, _) = mean(True), jax.lax.stop_gradient(mean(False))
            axes = (1, 2, 3, 4)
            logp = jnp.mean(-((states[i + 1] - mu) ** 2), axes) / (2 * std**2)
            ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))
            kl = jnp.mean((mu - ref) ** 2, axes) / (2 * std**2)
            total += jnp.mean(-batch.advantages * ratio + 0.5 * kl) / 2
        return total

    got, metrics = gradient(algorithm, start, batch)
    expected = jax.grad(loss)(adapters)
    assert_close(got, expected, rtol=1e-4, atol=1e-6)  # x - (x - g) loses digits of g
    np.testing.assert_allclose(metrics["loss"], loss(adapters), atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected), rtol=1e-5)


def test_microbatches_do_not_change_the_gradient():
    start, batch = drawn(GRPO)
    whole, _ = gradient(GRPO, start, batch)
    for parts in (2, 8):
        got, _ = gradient(GRPO, start, batch, microbatches=parts)
        assert_close(got, whole, atol=1e-6)  # order of float32 sums


@pytest.mark.parametrize("name", ["grpo", "nft"])
@pytest.mark.parametrize("microbatches", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_invalid_samples_contribute_nothing(name, microbatches):
    """NaNs in them reach nothing, and the mean is over the others: as if they were not there."""
    algorithm = toy.make(name)
    start, batch = drawn(algorithm)
    valid = jnp.arange(COUNT) % 8 >= 4  # whole groups, so that the smaller batch is well formed
    bad, t = ~np.asarray(valid), batch.trajectory
    dirty = batch.replace(
        valid=valid,
        advantages=jnp.where(valid, batch.advantages, jnp.nan),
        trajectory=t.replace(
            latents=t.latents.at[bad].set(jnp.nan),
            window_latents=t.window_latents.at[:, bad].set(jnp.nan),
            log_prob_old=jnp.where(valid, t.log_prob_old, jnp.nan),
        ),
    )
    got, metrics = gradient(algorithm, start, dirty, microbatches=microbatches)
    clean = take(batch, np.flatnonzero(valid))
    expected, expected_metrics = gradient(algorithm, start, clean, microbatches=microbatches)
    assert_close(got, expected, atol=1e-6)
    for key in metrics:
        np.testing.assert_allclose(metrics[key], expected_metrics[key], atol=1e-5, err_msg=key)
    assert metrics["valid"] == 8 and metrics["grad_norm"] > 0


def test_means_are_over_the_minibatches_that_saw_a_sample():
    """One without any has no loss: neither 0, nor half of the other's."""
    (adapters, frozen), batch = drawn(GRPO)
    optimizer = make_optimizer(1e-2)
    state = update.init_state(adapters, optimizer, GRPO)
    step = step_fn(GRPO, optimizer, minibatches=2)
    odd = jnp.arange(COUNT) % 2 == 1  # the second minibatch
    _, metrics = step(state, frozen, batch.replace(valid=odd), SIGMAS)
    _, alone = gradient(GRPO, (adapters, frozen), take(batch, np.flatnonzero(odd)))
    assert metrics["skipped"] == 1 and metrics["valid"] == COUNT // 2
    for name in ("loss", "kl", "ratio_mean", "grad_norm", "ratio_deviation_first"):
        np.testing.assert_allclose(metrics[name], alone[name], atol=1e-5, err_msg=name)
    _, metrics = step(state, frozen, batch.replace(valid=jnp.zeros(COUNT, bool)), SIGMAS)
    assert metrics["skipped"] == 2 and np.isnan(metrics["loss"])


def test_nothing_valid_or_not_finite_changes_nothing():
    (adapters, frozen), batch = drawn(GRPO)
    optimizer = make_optimizer(1e-2)
    state = update.init_state(adapters, optimizer, GRPO)
    none = batch.replace(valid=jnp.zeros(COUNT, bool))
    broken = batch.replace(advantages=batch.advantages.at[0].set(jnp.nan))
    for bad in (none, broken):
        after, metrics = step_fn(GRPO, optimizer)(state, frozen, bad, SIGMAS)
        assert metrics["skipped"] == 1
        assert_close(after, state, rtol=0)


def test_a_step_out_of_the_numbers_is_not_taken():
    """Its gradient is finite, the adapters that it would leave are not."""
    (adapters, frozen), batch = drawn(GRPO)
    optimizer = make_optimizer(1e30, weight_decay=1e30)
    state = update.init_state(adapters, optimizer, GRPO)
    after, metrics = step_fn(GRPO, optimizer)(state, frozen, batch, SIGMAS)
    assert np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1
    assert_close(after, state, rtol=0)


def test_several_inner_updates():
    (adapters, frozen), batch = drawn(GRPO)
    optimizer = make_optimizer(1e-2)
    state = update.init_state(adapters, optimizer, GRPO)
    step = step_fn(GRPO, optimizer, epochs=2, minibatches=2)
    after, metrics = step(state, frozen, batch, SIGMAS)
    assert after.step == 4
    assert metrics["ratio_deviation_first"] <= 1e-6  # other batch shape than the rollout's
    assert metrics["ratio_deviation"] > 1e-3  # later ones are really off-policy
    assert metrics["clip_fraction"] > 0


def test_minibatch_is_every_other_sample():
    (adapters, frozen), batch = drawn(GRPO)
    tiny = SGD._replace(**optax.sgd(1e-3)._asdict())
    state = update.init_state(adapters, tiny, GRPO)
    both, _ = step_fn(GRPO, tiny, minibatches=2)(state, frozen, batch, SIGMAS)
    one, _ = step_fn(GRPO, tiny)(state, frozen, take(batch, np.s_[::2]), SIGMAS)
    assert both.step == 2 and one.step == 1
    two, _ = step_fn(GRPO, tiny)(one, frozen, take(batch, np.s_[1::2]), SIGMAS)
    assert_close(both.adapters, two.adapters, atol=1e-7)


def test_ema_hand_numbers():
    """decay 0.75: plain mean up to the 4th renewal, exponential after."""
    params = [{"w": jnp.float32(v)} for v in (2.0, 4.0, 9.0, 1.0, 8.0)]
    ema = {"w": jnp.float32(100.0)}  # the start has no weight
    seen = []
    for step, value in enumerate(params, 1):
        ema = update.ema_update(ema, value, jnp.int32(step), 0.75, 1)
        seen.append(float(ema["w"]))
    np.testing.assert_allclose(seen, [2, 3, 5, 4, 0.75 * 4 + 0.25 * 8], rtol=1e-6)


def test_ema_every_other_step():
    """Before its first renewal the average is what was seen last, and never the start."""
    ema = {"w": jnp.float32(100.0)}
    seen = []
    for step, value in enumerate((2.0, 4.0, 9.0, 1.0), 1):
        ema = update.ema_update(ema, {"w": jnp.float32(value)}, jnp.int32(step), 0.9, 2)
        seen.append(float(ema["w"]))
    np.testing.assert_allclose(seen, [2, 4, 4, 2.5], rtol=1e-6)


def test_bad_input():
    for bad in ({"epochs": 0}, {"minibatches": 0}, {"ema_decay": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            update.Rules(**bad)
    (adapters, frozen), batch = drawn(GRPO)
    state = update.init_state(adapters, SGD, GRPO)
    with pytest.raises(ValueError, match="16 samples"):
        step_fn(GRPO, minibatches=3)(state, frozen, batch, SIGMAS)


@pytest.mark.parametrize(
    "algorithm",
    [
        toy.make("grpo", clip=0.2, kl_weight=0.0),
        toy.make("nft", decay=0.5, advantage_max=2.0),
        toy.make("awm", clip=0.2),
    ],
    ids=["grpo", "nft", "awm"],
)
def test_reward_rises(algorithm):
    """Mean reward with the same prompts and noise, before and after 20 updates on others."""
    state, _ = toy.train(20, algorithm=algorithm)
    start, frozen = toy.params()
    judge = toy.jit(functools.partial(toy.rollout, algorithm=algorithm))
    before, after, average = (
        float(judge(adapters, frozen, jax.random.key(99))[1].mean())
        for adapters in (start, state.adapters, state.ema)
    )
    print(before, after, average)
    assert after > before + 0.5
    assert average > before + 0.25


@pytest.mark.parametrize(
    "name",
    [n if n == "grpo" else pytest.param(n, marks=pytest.mark.slow) for n in base.ALGORITHMS],
)
def test_eight_devices_agree_with_one(name):
    """The state after three updates, of 1 device and of data 4 x fsdp 2."""
    results = []
    for shape in ((1, 1), (4, 2)):
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = jax.make_mesh(shape, ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices)
        with jax.set_mesh(mesh):
            settings = {"mesh": mesh, "microbatches": 2, "learning_rate": 1e-2}
            results.append(toy.train(3, algorithm=toy.make(name), **settings))
    assert results[1][0].adapters["a"].sharding.num_devices == 8
    states = [(s.adapters, s.ema, s.algorithm) for s, _ in results]
    assert_close(*states, rtol=0, atol=1e-5)  # the project's bound
    assert float(jnp.abs(states[0][0]["b"]).max()) > 1e-2  # b starts at 0: three updates at 1e-2
    for _, history in results:
        assert min(float(metrics["grad_norm"]) for metrics in history) > 1e-4
