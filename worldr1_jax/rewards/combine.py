"""Sums rewards and says which samples may be learnt from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from worldr1_jax.types import Scores


def combine(scores: Mapping[str, Float[Array, " B"]], weights: Mapping[str, float]) -> Scores:
    """Weighted sum of the parts; a sample with a part that is not finite is marked invalid.

    A part of weight 0 (R_3D in the dynamic phase, or a measurement such as PSNR) or without a
    weight is reported and otherwise ignored: it need not be there, and its NaN masks nothing.

    Args:
        scores: parts by name.
        weights: weight of each part in the sum; static.

    Returns:
        The parts as they came; `total`, NaN where invalid, so that a failure never turns into a
        number that could win or lose a group; `valid`, which has to mask every use of `total`.

    Raises:
        ValueError: a weight that is not finite, a weighted part that is missing, no weighted part
            at all, or parts of different shapes.
    """
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of '{name}' is {weight}; it has to be a finite number")
    counted = [name for name, weight in weights.items() if weight != 0]
    missing = [name for name in counted if name not in scores]
    if missing:
        raise ValueError(f"'{missing[0]}' has a weight but no score; scores has {sorted(scores)}")
    if not counted:
        raise ValueError("all weights are 0; at least one reward has to count")
    shapes = {name: jnp.shape(scores[name]) for name in counted}
    if len(set(shapes.values())) != 1 or len(shapes[counted[0]]) != 1:
        raise ValueError(f"scores have the shapes {shapes}; each has to be [B]")
    parts = jnp.stack([jnp.asarray(scores[name], jnp.float32) for name in counted])
    valid = jnp.all(jnp.isfinite(parts), axis=0)
    factors = jnp.asarray([weights[name] for name in counted], jnp.float32)
    total = jnp.sum(factors[:, None] * parts, axis=0)
    return Scores(dict(scores), jnp.where(valid, total, jnp.nan), valid, tuple(counted))
