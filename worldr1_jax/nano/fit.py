"""How every nano network learns: Muon and a cosine schedule, with an average of the weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from worldr1_jax.mesh import arrays
from worldr1_jax.mesh.make import make_mesh

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast one stage learns."""

    steps: int
    learning_rate: float
    batch: int
    average: float = 0.99  # decay of the averaged weights that are saved
    weight_decay: float = 1e-4
    clip_norm: float = 1.0


def fit(
    loss: Callable[[Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    params: Any,
    batches: Iterator[Batch],
    schedule: Schedule,
    *,
    seed: int,
    log: Callable[[str], None] = print,
    snapshot: Callable[[Any], None] = lambda params: None,
    every: int = 200,
) -> Any:
    """Minimises `loss(params, batch, key) -> (value, metrics)`; returns the averaged parameters."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, schedule.learning_rate, min(100, schedule.steps // 10), schedule.steps
    )
    # Muon orthogonalises the steps of weight matrices and leaves the rest to Adam; with the scale
    # `consistent_rms` both take one learning rate.
    muon = optax.contrib.muon(
        rate, weight_decay=schedule.weight_decay, adam_b2=0.98, consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )  # fmt: skip
    optimizer = optax.chain(optax.clip_by_global_norm(schedule.clip_norm), muon)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, average, opt_state, batch, key, count):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(schedule.average, (1.0 + count) / (10.0 + count))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return params, average, opt_state, metrics

    mesh = make_mesh({"data": -1})
    params = jax.device_put(params, arrays.replicated(mesh))
    average = jax.tree.map(jnp.copy, params)
    opt_state = optimizer.init(params)
    base, start, window = jax.random.key(seed), time.time(), []
    with jax.set_mesh(mesh):
        for count in range(schedule.steps):
            key = jax.random.fold_in(base, count)
            params, average, opt_state, metrics = step(
                params, average, opt_state, _split(next(batches), mesh), key, count
            )
            window.append(metrics)
            if (count + 1) % 50 == 0 or count + 1 == schedule.steps:
                means = {k: float(np.mean([m[k] for m in window])) for k in window[0]}
                text = " ".join(f"{k} {v:.4f}" for k, v in means.items())
                log(f"step {count + 1}/{schedule.steps} {time.time() - start:.0f} s {text}")
                window = []
            if (count + 1) % every == 0 or count + 1 == schedule.steps:
                snapshot(average)
    return average


def _matrices(params: Any) -> Any:
    """What Muon takes for a matrix: kernels, with their last axis as output, and the one before as
    input (linear layers, which may be stacked) or all others (convolutions)."""

    def axes(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if "kernel" not in jax.tree_util.keystr(path):
            return None
        last = leaf.ndim - 1
        inputs = (last - 1,) if leaf.ndim <= 3 else tuple(range(last))
        return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=(last,))

    return jax.tree_util.tree_map_with_path(axes, params)


def _split(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """The batch over all devices, or whole on each where it does not divide."""
    divides = all(len(array) % mesh.size == 0 for array in batch.values())
    place = arrays.batched(mesh) if divides else arrays.replicated(mesh)
    return {name: jax.device_put(array, place) for name, array in batch.items()}
