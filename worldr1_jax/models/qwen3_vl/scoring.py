"""Qwen3-VL as a judge: the grade from 0 to 9 that it would write, as an expectation.

World-R1 reads the ten digits' logits alone; here their share of all is asked for as well, because a
network that would answer with a word has not graded anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from worldr1_jax.models.qwen3_vl.model import Qwen3VL

LEAST_MASS = 0.5  # of the ten digits' probability, below which the answer is no grade


def judge(
    network: Qwen3VL,
    question_ids: Int[Array, "B N"],
    images: Float[Array, "B V H W 3"],
    *,
    digits: Sequence[int],
    mask: Any = None,
) -> Float[Array, " B"]:
    """Score in [0, 1] of each row's images: the expected digit over 9.

    Pure and differentiable in images and weights. NaN where the ten digits hold less than
    LEAST_MASS of the probability, or where a row has a wrong number of image tokens.

    Args:
      question_ids, images, mask: as Qwen3VL takes them; prompt.Tokens.ask writes the ids.
      digits: the tokens of 0 to 9 (prompt.Tokens.digits).

    Raises:
      ValueError: as Qwen3VL does, or other than ten digits.
    """
    return grade(network(question_ids, images, mask), digits)


def grade(logits: Float[Array, "B R"], digits: Sequence[int]) -> Float[Array, " B"]:
    """The same, of the logits over the whole vocabulary."""
    if len(digits) != 10:
        raise ValueError(f"digits are {len(digits)} tokens; they have to be the ten of 0 to 9")
    ours = logits[:, jnp.asarray(digits)]
    mass = jnp.exp(jax.nn.logsumexp(ours, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
    expected = jax.nn.softmax(ours, axis=-1) @ (jnp.arange(10) / 9)
    return jnp.where(mass >= LEAST_MASS, jnp.clip(expected, 0.0, 1.0), jnp.nan)
