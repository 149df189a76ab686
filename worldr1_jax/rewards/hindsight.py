"""Hindsight: which other caption a video obeys better, or worse, than its own.

Whatever its camera did, some caption asks for it (relabelling in hindsight, arXiv 1707.01495). The
path that was recovered for S_traj is compared with those of all captions that differ from the
video's own in the camera clause alone. Algorithms that contrast captions (algorithms/contrast.py)
learn from the pair: a video that did something else says what it did, which its own reward, near 0,
does not.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from worldr1_jax.camera import commands
from worldr1_jax.mesh import arrays
from worldr1_jax.rewards.base import Evidence
from worldr1_jax.rewards.trajectory import Trajectory

CLEAR = 0.3  # difference of two S_traj that is more than the error of a recovered path
LEAST = 0.4  # S_traj from which on a camera can be said to have obeyed


@dataclasses.dataclass(frozen=True)
class Rivals:
    """Another caption for each video, with the lead of its own: S_traj of the own caption minus
    that of the rival, in [-1, 1]; 0, with the own caption again, where nothing is clear."""

    prompts: list[str]
    lead: Float[np.ndarray, " B"]


def clauses() -> list[tuple[str, ...]]:
    """What a camera can be said to have done: each published command, and each two movements in
    sequence."""
    moving = [name for name in commands.PUBLISHED if name != "fixed"]
    return [(name,) for name in commands.PUBLISHED] + list(itertools.permutations(moving, 2))


class Hindsight:
    """Collects the recovered paths of a batch, turn by turn, and chooses rivals.

    Args:
      reward: S_traj as the run has it.
      paths: prompts -> the paths that they ask for, camtoworld [n F 4 4].

    Attributes:
      rows: place in the batch -> S_traj of what was seen, under its own caption and every clause.
    """

    def __init__(
        self,
        reward: Trajectory,
        paths: Callable[[Sequence[str]], Float[np.ndarray, "n F 4 4"]],
    ):
        self._clauses = clauses()
        self._paths = paths([commands.text(names) for names in self._clauses])

        def compare(evidence: Evidence, paths: Float[Array, "C V 4 4"]) -> Float[Array, "B C+1"]:
            found = evidence.found().camtoworld
            every = jax.vmap(
                lambda path: reward.compare(jnp.broadcast_to(path, found.shape), found)
            )
            own = reward.compare(evidence.path, found)
            return jnp.concatenate([own[:, None], every(paths).T], axis=1)

        self._compare = jax.jit(compare)
        self.rows: dict[int, Float[np.ndarray, " C+1"]] = {}

    def see(self, evidence: Evidence, places: np.ndarray) -> None:
        """Notes how well the cameras of one turn obeyed every clause."""
        paths = self._paths[:, :: evidence.frame_stride]
        rows = arrays.to_host(self._compare(evidence, paths))
        self.rows |= dict(zip(places.tolist(), rows, strict=True))

    def choose(self, prompts: Sequence[str], rng: np.random.Generator) -> Rivals:
        """A rival for each prompt; forgets what was seen.

        A camera that clearly did something else has the caption of what it did; one that obeyed has
        any caption that it clearly did not obey, as long as its own.
        """
        rivals, leads = list(prompts), np.zeros(len(prompts), np.float32)
        for place, row in sorted(self.rows.items()):  # turns come in an order of the mesh's
            own, others = row[0], row[1:]
            count = max(len(commands.moves(prompts[place])), 1)
            if (rival := self._rival(own, others, count, rng)) is not None:
                rivals[place] = commands.replaced(prompts[place], self._clauses[rival])
                leads[place] = own - others[rival]
        self.rows = {}
        return Rivals(rivals, leads)

    def _rival(
        self, own: float, others: np.ndarray, count: int, rng: np.random.Generator
    ) -> int | None:
        if not np.isfinite(others).all():  # nothing was recovered
            return None
        best = int(others.argmax())
        if max(own, others[best]) < LEAST:
            return None
        if others[best] - own >= CLEAR / 2:
            return best
        worse = [
            place
            for place, names in enumerate(self._clauses)
            if others[place] < own - CLEAR and len(names) <= count
        ]
        return int(rng.choice(worse)) if worse and own >= LEAST else None
