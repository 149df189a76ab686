"""Contrast of captions: one video on the way to noise, under its own caption c and a rival c'.

With v the policy's velocity at x_t = (1 - t) x0 + t eps, and lead = S(c) - S(c') by how much the
video obeys its own caption better (rewards/hindsight.py),

    l(c) = mean (v(c) - u)^2 / n(c),   u = eps - x0,   n(c) = mean |v(c) - u|, without gradient
    gap = sign(lead) (l(c') - l(c))
    loss = |lead| t softplus(margin - sharpness gap) / sharpness

asks the policy, taken as a classifier (arXiv 2303.16203), which of two captions the video belongs
to. Both share x_t and eps, so that what the video shows besides, nearly all of the noise of a
policy gradient, cancels. Traps, measured on nano: without the softplus the gap grows without bound
and the videos break; with a margin of 0, videos that obeyed count less than those that did not,
and a run like that came out as with less guidance. What is learnt is to widen gaps that were there
before, in videos that obeyed (tests/measure/told_apart.py): where the captions' distance is bounded
by what it would be of a policy that knows how its videos came about, or the direction of their
difference alone is taught, next to nothing is learnt in as many updates.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def contrast(
    own: Float[Array, "B ..."],
    rival: Float[Array, "B ..."],
    wanted: Float[Array, "B ..."],
    sigma: Float[Array, " B"],
    lead: Float[Array, " B"],
    *,
    sharpness: float,
    margin: float,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """The loss of each sample, and its gap.

    Args:
      own, rival: velocities under the two captions.
      wanted: u.
      sigma: t.
      lead: in [-1, 1]; where it is 0 there is no loss.
      sharpness: > 0.
      margin: the gap, times `sharpness`, at which a pair counts by half.
    """
    gap = jnp.sign(lead) * (_miss(rival - wanted) - _miss(own - wanted))
    return jnp.abs(lead) * sigma * jax.nn.softplus(margin - sharpness * gap) / sharpness, gap


def _miss(error):
    axes = tuple(range(1, error.ndim))
    size = jnp.maximum(jnp.mean(jnp.abs(error), axis=axes), 1e-5)
    return jnp.mean(error**2, axis=axes) / jax.lax.stop_gradient(size)
