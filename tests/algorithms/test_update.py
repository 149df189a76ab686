"""train_step on a small network: first ratio, gradients, masks, averages, meshes, and learning."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from worldr1_jax.algorithms import update
from worldr1_jax.algorithms.advantage import group_advantage
from worldr1_jax.rollout import schedule, sde
from worldr1_jax.rollout.sample import Sampler, sample, sample_keys, step_noise, transition

COUNT, GROUP, SHAPE, HIDDEN = 16, 4, (2, 2, 2, 4), 16
SIGMAS = schedule.sigmas(6, 3.0)
FLOW = Sampler("flow", 0.7)
NULL = jnp.full((3, 4), 0.2)


def velocity(adapters, base, latents, timestep, text, adapters_on):
    """Two layers with an adapter of rank 4 on the second; each sample by itself."""
    level = timestep[:, None] / 1000 * base["time"]
    condition = level + text.mean(1) @ base["text"]
    hidden = jnp.tanh(latents @ base["in"] + condition[:, None, None, None])
    out = hidden @ base["out"]
    return out + (hidden @ adapters["a"]) @ adapters["b"] if adapters_on else out


def make_params():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"in": (4, HIDDEN), "out": (HIDDEN, 4), "text": (4, HIDDEN), "time": (HIDDEN,)}
    named = zip(shapes.items(), keys[:4], strict=True)
    base = {name: 0.5 * jax.random.normal(key, shape) for (name, shape), key in named}
    a = 0.5 * jax.random.normal(keys[4], (HIDDEN, 4))
    return {"a": a, "b": jnp.zeros((4, 4))}, base


def rollout(adapters, base, key, *, sampler=FLOW, width=2, start=1):
    """Batch of one rollout and its rewards: minus the distance of the latents from 1."""
    noise_key, text_key, step_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, (COUNT, *SHAPE))
    text = jnp.repeat(jax.random.normal(text_key, (COUNT // GROUP, 3, 4)), GROUP, 0)
    keys = sample_keys(step_key, COUNT)
    policy = functools.partial(_bound, adapters, base)
    trajectory = sample(
        policy, keys, noise, SIGMAS, text, NULL, sampler=sampler, window=(start, width)
    )
    rewards = -jnp.mean((trajectory.latents - 1) ** 2, axis=(1, 2, 3, 4))
    valid = jnp.ones(COUNT, bool)
    advantages = group_advantage(rewards, GROUP, valid)
    return update.make_batch(trajectory, text, advantages, valid, keys), rewards


def _bound(adapters, base, latents, timestep, text):
    return velocity(adapters, base, latents, timestep, text, True)


@functools.cache
def step_fn(optimizer, sampler=FLOW, **rules):
    return jax.jit(
        functools.partial(
            update.train_step,
            velocity=velocity,
            optimizer=optimizer,
            sampler=sampler,
            rules=update.Rules(**rules),
        )
    )


@pytest.fixture(scope="module")
def start():
    adapters, base = make_params()
    adapters["b"] = 0.3 * jax.random.normal(jax.random.key(7), (4, 4))  # a policy that has moved
    batch, _ = jax.jit(rollout)(adapters, base, jax.random.key(3))
    return adapters, base, batch


SGD = optax.sgd(1.0)  # shows the gradient itself


def gradient(start, batch=None, sampler=FLOW, **rules):
    adapters, base, own = start
    state = update.init_state(adapters, SGD)
    step = step_fn(SGD, sampler, **rules)
    state, metrics = step(state, base, own if batch is None else batch, SIGMAS, NULL)
    return jax.tree.map(lambda old, new: old - new, adapters, state.adapters), metrics


def assert_close(got, expected, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize(
    "sampler",
    [FLOW, Sampler("cps", 0.5), Sampler("flow", 0.7, guidance=3.0)],
    ids=["flow", "cps", "guidance"],
)
def test_first_ratio_is_one(start, sampler):
    adapters, base, _ = start
    roll = jax.jit(functools.partial(rollout, sampler=sampler))
    batch, _ = roll(adapters, base, jax.random.key(4))
    _, metrics = gradient(start, batch, sampler)
    assert metrics["ratio_deviation_first"] <= 1e-6  # the project's bound, float32
    np.testing.assert_allclose(metrics["ratio_mean"], 1, atol=1e-6)
    assert metrics["kl"] > 0 and metrics["clip_fraction"] == 0 and metrics["skipped"] == 0


def test_gradient_is_that_of_the_written_out_loss(start):
    adapters, base, batch = start

    def loss(adapters):
        total = 0.0
        for i in range(2):

            def mean(on, i=i):
                policy = lambda x, t, text: velocity(adapters, base, x, t, text, on)  # noqa: E731
                x = batch.window_latents[i]
                return transition(policy, FLOW, x, batch.text, None, SIGMAS, 1 + i)

            (mu, std), (ref, _) = mean(True), jax.lax.stop_gradient(mean(False))
            axes = (1, 2, 3, 4)
            logp = jnp.mean(-((batch.window_latents[i + 1] - mu) ** 2), axes) / (2 * std**2)
            ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))
            kl = jnp.mean((mu - ref) ** 2, axes) / (2 * std**2)
            total += jnp.mean(-batch.advantages * ratio + 0.5 * kl) / 2
        return total

    got, metrics = gradient(start, kl_weight=0.5)
    expected = jax.grad(loss)(adapters)
    assert_close(got, expected, rtol=1e-4, atol=1e-6)  # x - (x - g) loses digits of g
    np.testing.assert_allclose(metrics["loss"], loss(adapters), atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected), rtol=1e-5)


def test_microbatches_do_not_change_the_gradient(start):
    whole, _ = gradient(start)
    for parts in (2, 8):
        got, _ = gradient(start, microbatches=parts)
        assert_close(got, whole, atol=1e-6)  # order of float32 sums


@pytest.mark.parametrize("microbatches", [1, 4])
def test_invalid_samples_contribute_nothing(start, microbatches):
    """NaNs in them reach nothing, and the mean is over the others: as if they were not there."""
    _, _, batch = start
    valid = jnp.arange(COUNT) % 8 >= 4  # whole groups, so that the smaller batch is well formed
    dirty = batch.replace(
        valid=valid,
        window_latents=batch.window_latents.at[:, ~np.asarray(valid)].set(jnp.nan),
        advantages=jnp.where(valid, batch.advantages, jnp.nan),
        log_prob_old=jnp.where(valid, batch.log_prob_old, jnp.nan),
    )
    kept = np.flatnonzero(np.asarray(valid))
    clean = batch.replace(
        valid=valid[kept],
        window_latents=batch.window_latents[:, kept],
        log_prob_old=batch.log_prob_old[:, kept],
        text=batch.text[kept],
        advantages=batch.advantages[kept],
        keys=batch.keys[kept],
    )
    got, metrics = gradient(start, dirty, microbatches=microbatches)
    expected, expected_metrics = gradient(start, clean, microbatches=microbatches)
    assert_close(got, expected, atol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], atol=1e-6)
    assert metrics["valid"] == 8


def test_nothing_valid_or_not_finite_changes_nothing(start):
    adapters, base, batch = start
    optimizer = update.make_optimizer(1e-2)
    state = update.init_state(adapters, optimizer)
    none = batch.replace(valid=jnp.zeros(COUNT, bool))
    broken = batch.replace(advantages=batch.advantages.at[0].set(jnp.nan))
    for bad in (none, broken):
        after, metrics = step_fn(optimizer)(state, base, bad, SIGMAS)
        assert metrics["skipped"] == 1
        assert_close(after, state, rtol=0)


def test_several_inner_updates(start):
    adapters, base, batch = start
    optimizer = update.make_optimizer(1e-2)
    state = update.init_state(adapters, optimizer)
    step = step_fn(optimizer, epochs=2, minibatches=2)
    after, metrics = step(state, base, batch, SIGMAS)
    assert after.step == 4
    assert metrics["ratio_deviation_first"] <= 1e-6  # other batch shape than the rollout's
    assert metrics["ratio_deviation"] > 1e-3  # later ones are really off-policy
    assert metrics["clip_fraction"] > 0


def test_minibatch_is_every_other_sample(start):
    adapters, base, batch = start
    half = batch.replace(
        window_latents=batch.window_latents[:, ::2],
        log_prob_old=batch.log_prob_old[:, ::2],
        text=batch.text[::2],
        advantages=batch.advantages[::2],
        valid=batch.valid[::2],
        keys=batch.keys[::2],
    )
    tiny = optax.sgd(1e-3)
    state = update.init_state(adapters, tiny)
    both, _ = step_fn(tiny, minibatches=2)(state, base, batch, SIGMAS)
    one, _ = step_fn(tiny)(state, base, half, SIGMAS)
    assert both.step == 2 and one.step == 1
    other = jax.tree.map(lambda x: x, half).replace(
        window_latents=batch.window_latents[:, 1::2],
        log_prob_old=batch.log_prob_old[:, 1::2],
        text=batch.text[1::2],
        advantages=batch.advantages[1::2],
    )
    two, _ = step_fn(tiny)(one, base, other, SIGMAS)
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
    ema = {"w": jnp.float32(100.0)}
    seen = []
    for step, value in enumerate((2.0, 4.0, 9.0, 1.0), 1):
        ema = update.ema_update(ema, {"w": jnp.float32(value)}, jnp.int32(step), 0.9, 2)
        seen.append(float(ema["w"]))
    np.testing.assert_allclose(seen, [100, 4, 4, 2.5], rtol=1e-6)


def test_optimizer_clips_and_warms_up():
    optimizer = update.make_optimizer(0.1, weight_decay=0.0, warmup_steps=4)
    params = {"w": jnp.zeros(2)}
    opt_state = optimizer.init(params)
    sizes = []
    for _ in range(6):
        change, opt_state = optimizer.update({"w": jnp.array([30.0, 40.0])}, opt_state, params)
        sizes.append(float(jnp.abs(change["w"]).max()))
    # Adam's step on a constant gradient is the rate itself
    np.testing.assert_allclose(sizes, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-4)
    clip = optax.clip_by_global_norm(1.0)
    clipped, _ = clip.update({"w": jnp.array([30.0, 40.0])}, clip.init(params))
    moments = jax.tree.leaves(
        optimizer.update({"w": jnp.array([30.0, 40.0])}, optimizer.init(params), params)[1]
    )
    assert any(np.allclose(m, 0.1 * clipped["w"]) for m in moments if m.shape == (2,))


@pytest.mark.parametrize("equalise", ["flash", "grpo_guard"])
def test_equalised_steps(start, equalise):
    """At the first update every ratio is 1: both only reweight the gradient of each step."""
    got, metrics = gradient(start, kl_weight=0.0, equalise=equalise)
    assert metrics["ratio_deviation_first"] <= 1e-6
    assert metrics["grad_norm"] > 0 and metrics["skipped"] == 0
    plain, _ = gradient(start, kl_weight=0.0)
    assert jnp.abs(got["b"] - plain["b"]).max() > 1e-3


def test_grpo_guard_log_ratio(start):
    """Without bias and scale, what is left of the log-ratio is mean(noise * change of the mean)."""
    adapters, base, batch = start
    x = batch.window_latents[1]

    def policy(adapters):
        bound = functools.partial(_bound, adapters, base)
        return transition(bound, FLOW, x, batch.text, None, SIGMAS, 2)

    old, new = policy(adapters), policy(adapters | {"b": adapters["b"] + 0.3})
    after = batch.window_latents[2]
    log_ratio = sde.log_prob(after, new.mean, new.std) - batch.log_prob_old[1]
    noise = step_noise(batch.keys, batch.window_start + 1, SHAPE)
    expected = jnp.mean(noise * (new.mean - old.mean), axis=(1, 2, 3, 4))
    got = update._guarded(log_ratio, new, batch, 1)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert jnp.abs(expected).max() > 1e-2


def test_bad_input(start):
    adapters, base, batch = start
    for bad in (
        {"clip": 0.0},
        {"kl_weight": -1.0},
        {"epochs": 0},
        {"ema_decay": 1.0},
        {"equalise": "mean"},
    ):
        with pytest.raises(ValueError):
            update.Rules(**bad)
    state = update.init_state(adapters, SGD)
    with pytest.raises(ValueError, match="16 samples"):
        step_fn(SGD, minibatches=3)(state, base, batch, SIGMAS)
    with pytest.raises(ValueError, match=r"batch\.keys"):
        step_fn(SGD, equalise="grpo_guard")(state, base, batch.replace(keys=None), SIGMAS)


def train(updates, *, mesh=None, learning_rate=3e-2, **rules):
    """Rollout, advantages, update, repeated. On a mesh: samples over both axes, weights over fsdp.

    Returns the last state, and each update's metrics.
    """
    adapters, base = make_params()
    optimizer = update.make_optimizer(learning_rate)
    state = update.init_state(adapters, optimizer)
    roll, step = jax.jit(rollout), step_fn(optimizer, **rules)
    if mesh is not None:
        whole = NamedSharding(mesh, P())
        rows, columns = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P(None, "fsdp"))
        sharded = {"in": columns, "out": rows, "text": columns, "time": rows}
        states = jax.tree.map(lambda _: whole, state)
        samples = NamedSharding(mesh, P(("data", "fsdp")))
        states_of = NamedSharding(mesh, P(None, ("data", "fsdp")))
        batches = update.Batch(
            window_latents=states_of,
            log_prob_old=states_of,
            window_start=whole,
            text=samples,
            advantages=samples,
            valid=samples,
            keys=samples,
        )
        base, state = jax.device_put(base, sharded), jax.device_put(state, states)
        roll = jax.jit(
            rollout,
            in_shardings=(states.adapters, sharded, whole),
            out_shardings=(batches, samples),
        )
        step = jax.jit(
            step.__wrapped__,
            in_shardings=(states, sharded, batches, whole),
            out_shardings=(states, whole),
            donate_argnums=0,
        )
    history = []
    for key in jax.random.split(jax.random.key(11), updates):
        batch, _ = roll(state.adapters, base, key)
        state, metrics = step(state, base, batch, SIGMAS)
        history.append(metrics)
    return state, history


def test_reward_rises():
    """Mean reward with the same prompts and noise, before and after 20 updates on others."""
    state, _ = train(20, clip=0.2, kl_weight=0.0)
    _, base = make_params()
    judge = jax.jit(rollout)
    before, after, average = (
        float(judge(adapters, base, jax.random.key(99))[1].mean())
        for adapters in (make_params()[0], state.adapters, state.ema)
    )
    print(before, after, average)
    assert after > before + 0.5
    assert average > before + 0.25


def compare_meshes():
    """Largest difference of the state after three updates: 1 device against data 4 x fsdp 2."""
    results = []
    for shape in ((1, 1), (4, 2)):
        count = shape[0] * shape[1]
        mesh = jax.make_mesh(
            shape, ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:count]
        )
        with jax.set_mesh(mesh):
            results.append(train(3, mesh=mesh, microbatches=2, learning_rate=1e-2))
    leaves = [jax.tree.leaves((s.adapters, s.ema)) for s, _ in results]
    assert results[1][0].adapters["a"].sharding.num_devices == 8
    moved = float(jnp.abs(leaves[0][1] - 0).max())  # b starts at 0
    first = max(float(m["ratio_deviation_first"]) for _, h in results for m in h)
    difference = max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(*leaves, strict=True)
    )
    print(f"{difference} {moved} {first}")


def test_eight_devices_agree_with_one():
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    code = "from tests.algorithms.test_update import compare_meshes; compare_meshes()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    difference, moved, first = map(float, done.stdout.split())
    assert moved > 1e-2  # three updates at rate 1e-2 did something
    assert difference <= 1e-5  # the project's bound
    assert first <= 1e-6
