"""The second half of every loop's body: latents -> videos, decoded as they are scored -> scores.

The first half is `policies.stages.Pipeline.roll`. Training and the held-out report share them, so
that what is trained is what is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from worldr1_jax.mesh import arrays
from worldr1_jax.policies.stages import Pipeline, Rolled
from worldr1_jax.rewards import Scorer
from worldr1_jax.rewards.base import Evidence
from worldr1_jax.timing import StageTimer
from worldr1_jax.types import Scores

# (place in the batch, its video [F H W 3] on the host)
Seen = Callable[[int, Float[np.ndarray, "F H W 3"]], None]


def diversity(latents: Float[Array, "B f h w C"], group_size: int) -> Float[Array, ""]:
    """Mean distance of two videos of a prompt, as latents: root of the mean square difference; over
    prompts of which all videos are finite.

    Twice the variance within a group is the mean square difference of its pairs.
    """
    groups = latents.reshape(-1, group_size, *latents.shape[1:])
    variance = jnp.var(groups.astype(jnp.float32), axis=1, ddof=1)
    return jnp.nanmean(jnp.sqrt(2 * jnp.mean(variance, axis=(1, 2, 3, 4))))


def judge(
    pipeline: Pipeline,
    scorer: Scorer,
    rolled: Rolled,
    *,
    off: Sequence[str] = (),
    timer: StageTimer | None = None,
    wanted: Collection[int] = (),
    seen: Seen | None = None,
    witness: Callable[[Evidence, np.ndarray], None] | None = None,
) -> Scores:
    """Scores of a batch.

    At full size videos are 46 times their latents: no more of them exist than are scored at a time.
    Those at the `wanted` places go to the hosts as they are made, each to `seen`; the evidence of
    each turn, with its places in the batch, to `witness`.
    """

    def decode(latents: jax.Array, places: np.ndarray) -> jax.Array:
        videos = pipeline.decode(latents)
        for row, place in enumerate(places.tolist()):
            if seen is not None and place in wanted:
                seen(place, arrays.to_host(videos[row]))
        return videos

    return scorer(
        rolled.trajectory.latents, rolled.prompts, rolled.paths, decode=decode, off=off,
        timer=timer, seen=witness,
    )  # fmt: skip
