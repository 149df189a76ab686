"""A policy of a few hundred parameters, and rollouts of it that take no time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from worldr1_jax.algorithms import base, update
from worldr1_jax.algorithms.advantage import group_advantage
from worldr1_jax.algorithms.flash import Flash
from worldr1_jax.algorithms.optimizer import Optimizer, make_optimizer
from worldr1_jax.rollout import schedule
from worldr1_jax.rollout.sample import sample, sample_keys

COUNT, GROUP, SHAPE, HIDDEN = 16, 4, (2, 2, 2, 4), 16
SIGMAS = schedule.sigmas(6, 3.0)
NULL = jnp.full((3, 4), 0.2)
# Programs this small spend their time in LLVM's optimiser.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SGD = Optimizer(*optax.sgd(1.0))  # shows the gradient itself


def make(name, **fields):
    """An algorithm that fits SIGMAS."""
    if "window_range" in base.section(name):
        fields = {"window": 2, "window_range": (1, 3)} | fields
    return base.build({"name": name, **fields})


def velocity(adapters, base, latents, timestep, text, adapters_on):
    """Two layers with an adapter of rank 4 on the second; each sample by itself."""
    level = timestep[:, None] / 1000 * base["time"]
    condition = level + text.mean(1) @ base["text"]
    hidden = jnp.tanh(latents @ base["in"] + condition[:, None, None, None])
    out = hidden @ base["out"]
    return out + (hidden @ adapters["a"]) @ adapters["b"] if adapters_on else out


def params(moved=0.0):
    """Adapters and base; `moved` is the size of the adapters' second half, 0 before training."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"in": (4, HIDDEN), "out": (HIDDEN, 4), "text": (4, HIDDEN), "time": (HIDDEN,)}
    named = zip(shapes.items(), keys[:4], strict=True)
    base = {name: 0.5 * jax.random.normal(key, shape) for (name, shape), key in named}
    a = 0.5 * jax.random.normal(keys[4], (HIDDEN, 4))
    return {"a": a, "b": moved * jax.random.normal(jax.random.key(7), (4, 4))}, base


def bound(adapters, base, on=True):
    """The policy as `sample` takes it."""
    return lambda x, timestep, text: velocity(adapters, base, x, timestep, text, on)


def rollout(adapters, base, key, *, algorithm, guidance=1.0):
    """Batch of one rollout and its rewards: minus the distance of the latents from 1."""
    noise_key, text_key, step_key, draw_key = jax.random.split(key, 4)
    noise = jax.random.normal(noise_key, (COUNT, *SHAPE))
    text = jnp.repeat(jax.random.normal(text_key, (COUNT // GROUP, 3, 4)), GROUP, 0)
    draw = algorithm.draw(draw_key, 0, plan(guidance))
    trajectory = sample(
        bound(adapters, base), sample_keys(step_key, COUNT), noise,
        SIGMAS if draw.solver is None else draw.solver, text, NULL,
        sampler=draw.sampler, window=(draw.start, draw.width),
    )  # fmt: skip
    rewards = -jnp.mean((trajectory.latents - 1) ** 2, axis=(1, 2, 3, 4))
    valid = jnp.ones(COUNT, bool)
    return update.Batch(trajectory, text, group_advantage(rewards, GROUP, valid), valid), rewards


def plan(guidance=1.0):
    """Of SIGMAS."""
    return base.Plan(COUNT // GROUP, GROUP, steps=6, shift=3.0, guidance=guidance)


@functools.cache
def step_fn(algorithm, optimizer=SGD, guidance=1.0, **rules):
    """The compiled update."""
    return jit(
        functools.partial(
            update.train_step, algorithm=algorithm, velocity=velocity, optimizer=optimizer,
            rules=update.Rules(**rules), guidance=guidance,
        )
    )  # fmt: skip


def gradient(algorithm, start, batch, state=None, **rules):
    """Of the loss at `start`, and the metrics."""
    adapters, frozen = start
    state = state or update.init_state(adapters, SGD, algorithm)
    after, metrics = step_fn(algorithm, **rules)(state, frozen, batch, SIGMAS, NULL)
    return jax.tree.map(lambda old, new: old - new, adapters, after.adapters), metrics


def take(batch, rows):
    """These samples of a batch."""
    t = batch.trajectory
    trajectory = t.replace(
        latents=t.latents[rows], window_latents=t.window_latents[:, rows],
        log_prob_old=t.log_prob_old[:, rows], keys=t.keys[rows],
        window_start=t.window_start[rows] if t.window_start.ndim else t.window_start,
    )  # fmt: skip
    return update.Batch(trajectory, batch.text[rows], batch.advantages[rows], batch.valid[rows])


def assert_close(got, expected, **tolerance):
    """Trees of one structure, leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def train(updates, *, algorithm, mesh=None, learning_rate=3e-2, **rules):
    """Rollout, advantages, update, repeated. On a mesh: samples over both axes, weights over fsdp.

    Returns the last state, and each update's metrics.
    """
    adapters, frozen = params()
    optimizer = make_optimizer(learning_rate)
    state = update.init_state(adapters, optimizer, algorithm)
    roll = jit(functools.partial(rollout, algorithm=algorithm))
    step = step_fn(algorithm, optimizer, **rules)
    if mesh is not None:
        whole = NamedSharding(mesh, P())
        rows, columns = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P(None, "fsdp"))
        sharded = {"in": columns, "out": rows, "text": columns, "time": rows}
        frozen = jax.device_put(frozen, sharded)
        state = jax.device_put(state, jax.tree.map(lambda _: whole, state))
        roll = _roll_on(mesh, "flash" if type(algorithm) is Flash else "grpo")  # few programs
        step = jit(step.__wrapped__, out_shardings=(whole, whole), donate_argnums=0)
    history = []
    for key in jax.random.split(jax.random.key(11), updates):
        drawing = algorithm.drawing(state.adapters, state.algorithm)
        batch, _ = roll(drawing, frozen, key)
        state, metrics = step(state, frozen, batch, SIGMAS)
        history.append(metrics)
    return state, history


@functools.cache
def _roll_on(mesh, name):
    """The rollout over the mesh, by whatever axis is as long as there are samples."""

    def place(leaf):
        axes = [("data", "fsdp") if n == COUNT else None for n in leaf.shape]
        return NamedSharding(mesh, P(*axes))

    roll = functools.partial(rollout, algorithm=make(name))
    made, _ = jax.eval_shape(roll, *params(), jax.random.key(0))
    return jit(roll, out_shardings=(jax.tree.map(place, made), None))
