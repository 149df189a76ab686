"""AdamW for gradients of any size.

Log-probabilities are means over latent dimensions, so a gradient is near 1e-9 for each parameter of
a full-size model. Two customary settings then decide in silence how much is learnt: Adam's epsilon
of 1e-8, which is larger than the root of its second moment, and a clipping norm of 1, which is
never reached. Here epsilon is far below any gradient, and norms are clipped by those seen before:
a loss times a constant learns the same.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

MEMORY = 0.9  # decay of the mean of norms


class Optimizer(NamedTuple):
    """An optax.GradientTransformation that can be asked about its epsilon."""

    init: Callable[..., Any]
    update: Callable[..., Any]
    # opt_state -> share of parameters for which epsilon is more than the gradient's own size
    eps_share: Callable[[Any], Float[Array, ""]] = lambda opt_state: jnp.zeros(())


class NormsSeen(NamedTuple):
    """Mean of the norms so far, as a sum with decaying weights and the sum of these."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


def make_optimizer(
    learning_rate: float,
    *,
    weight_decay: float = 1e-4,
    clip_norm: float = 3.0,
    warmup_steps: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-15,
) -> Optimizer:
    """AdamW after clipping; linear warm-up, then constant rate.

    Args:
      learning_rate: > 0; the first step of a warm-up of n has rate `learning_rate / n`, not 0.
      weight_decay: 0 or more.
      clip_norm: the largest global norm that a gradient may have, in multiples of the mean norm of
        those before it (see `clip_by_norms_seen`); 0 clips nothing.
      warmup_steps: 0 or more.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, > 0.

    Raises:
      ValueError: when an argument is out of its range.
    """
    for name, value in (("learning_rate", learning_rate), ("adam_eps", eps)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be finite and above 0")
    for name, value in (("weight_decay", weight_decay), ("clip_norm", clip_norm)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be finite and 0 or more")
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must lie in [0, 1)")
    if warmup_steps < 0:
        raise ValueError(f"warmup is {warmup_steps}; it must be 0 or more steps")
    rate: Any = learning_rate
    if warmup_steps > 0:
        first = learning_rate / warmup_steps
        rate = optax.linear_schedule(first, learning_rate, max(warmup_steps - 1, 1))
    adam = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=jnp.float32)
    chain = optax.chain(clip_by_norms_seen(clip_norm), adam) if clip_norm else optax.chain(adam)

    def eps_share(opt_state: Any) -> Float[Array, ""]:
        # by its kind: a schedule has a count of its own
        adams = jax.tree.leaves(opt_state, is_leaf=_is_adam)
        (adam,) = filter(_is_adam, adams)
        least = eps**2 * (1 - b2 ** jnp.maximum(adam.count, 1))  # sqrt(nu / (1 - b2^n)) < eps
        leaves = jax.tree.leaves(adam.nu)
        below = sum(jnp.sum(leaf < least) for leaf in leaves)
        return below / sum(leaf.size for leaf in leaves)

    return Optimizer(chain.init, chain.update, eps_share)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def clip_by_norms_seen(factor: float) -> optax.GradientTransformation:
    """Scales a gradient down to `factor` times the mean norm of the gradients before it.

    The mean's weights decay by MEMORY; it counts what clipping left, and norms above 0 only. The
    first gradient is never clipped. Departure: others clip by a fixed norm, which means something
    else for every loss, model and batch size.
    """

    def init(params: Any) -> NormsSeen:
        del params
        return NormsSeen(jnp.zeros(()), jnp.zeros(()))

    def update(grads: Any, seen: NormsSeen, params: Any = None) -> tuple[Any, NormsSeen]:
        del params
        norm = optax.tree.norm(grads)
        usual = seen.total / jnp.where(seen.weight > 0, seen.weight, 1.0)
        bound = jnp.where(seen.weight > 0, factor * usual, jnp.inf)
        kept = jnp.minimum(norm, bound)
        scale = jnp.where(norm > bound, bound / norm, 1.0)
        counts = jnp.where(norm > 0, 1 - MEMORY, 0.0)
        decay = jnp.where(norm > 0, MEMORY, 1.0)
        seen = NormsSeen(decay * seen.total + counts * kept, decay * seen.weight + counts)
        return jax.tree.map(lambda g: g * scale, grads), seen

    return optax.GradientTransformation(init, update)
