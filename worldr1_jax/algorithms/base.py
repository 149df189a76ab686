"""What an algorithm is: a frozen dataclass whose fields are its section of the config.

A new one is a file with such a class and a line in ALGORITHMS. `update.train_step` runs it and
never asks which it is:

    draw  ->  rollout  ->  rewards, advantages  ->  keep  ->  loss, once for each of its `terms`
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from worldr1_jax.files import short
from worldr1_jax.rollout import unipc
from worldr1_jax.rollout.sample import Sampler
from worldr1_jax.types import Trajectory

ALGORITHMS = {
    "grpo": "worldr1_jax.algorithms.grpo:Grpo",
    "guard": "worldr1_jax.algorithms.guard:Guard",
    "flash": "worldr1_jax.algorithms.flash:Flash",
    "dppo": "worldr1_jax.algorithms.dppo:Dppo",
    "nft": "worldr1_jax.algorithms.nft:Nft",
    "awm": "worldr1_jax.algorithms.awm:Awm",
}


class Plan(NamedTuple):
    """What every rollout of a run has in common, by the config."""

    groups: int  # prompts
    group_size: int  # K, videos of each
    steps: int  # T
    shift: float  # of the schedule
    guidance: float  # classifier-free; 1 is off


class Draw(NamedTuple):
    """How the videos of one rollout are drawn.

    A window of `width` stochastic steps begins at step `start`, one for the batch or one a sample.
    With width 0 nothing is kept but the final latents: any solver will do.
    """

    sampler: Sampler
    width: int = 0
    start: Int[Array, ""] | Int[Array, " B"] | int = 0
    solver: unipc.UniPC | None = None  # None: Euler, on the run's own schedule
    shared_by: int = 1  # neighbours that start from one noise
    prefix: bool = False  # and whose steps before the window are taken once for all of them


class Velocity(Protocol):
    """A policy, bound to its adapters and to the negative prompt."""

    def __call__(
        self,
        latents: Float[Array, "B f h w C"],
        sigma: Float[Array, ""] | Float[Array, " B"],
        text: Float[Array, "B N D"],
        *,
        guidance: float | None = None,
    ) -> Float[Array, "B f h w C"]:
        """`eps - x0`, float32, with the rollout's guidance unless another is given."""
        ...


class Policies(NamedTuple):
    """The policy under each set of adapters that a loss may compare. A gradient reaches `now`
    alone."""

    now: Velocity  # the adapters that learn
    drawn: Velocity  # those that drew the rollout
    average: Velocity  # TrainState.ema
    base: Velocity  # none


@flax.struct.dataclass
class Rival:
    """Another caption of each sample, for algorithms with two `captions`.

    Attributes:
      text: its embedding.
      lead: by how much the sample obeys its own caption better, in [-1, 1]; 0: no contrast.
    """

    text: Float[Array, "B N D"]
    lead: Float[Array, " B"]


@flax.struct.dataclass
class Samples:
    """Some samples of a rollout, as a loss reads them. Values of invalid ones are 0.

    Attributes:
      kept: what `Algorithm.keep` gave.
      text: embedding of each sample's prompt.
      advantages: of each sample.
      valid: samples that count.
      keys: fresh for every term and pass over the rollout; a loss may consume them once.
      rival: None unless the algorithm has two `captions`.
    """

    kept: PyTree
    text: Float[Array, "B N D"]
    advantages: Float[Array, " B"]
    valid: Bool[Array, " B"]
    keys: PRNGKeyArray
    rival: Rival | None = None


class Terms(NamedTuple):
    """A loss and its metrics, for each sample. Means are over valid samples and terms.

    The loss is the sum of the means of `losses`, each times its weight, which is 1 unless `weights`
    has it. Of `peaks` the largest value is reported, and that of the first optimizer step.
    """

    losses: dict[str, Float[Array, " B"]]
    weights: dict[str, float]
    metrics: dict[str, Array]
    peaks: dict[str, Float[Array, " B"]]


class Algorithm(Protocol):
    """How videos are drawn, what is kept of them, and the loss of what was kept.

    Subclasses are frozen dataclasses: a field, its default and its range, checked in
    `__post_init__` by a ValueError that begins with the field's name.
    """

    @property
    def terms(self) -> int:
        """Losses of a sample, each of which evaluates `now` once: window steps, or draws of a noise
        level."""
        ...

    @property
    def forwards(self) -> int:
        """Evaluations besides, in each term: of policies that have no gradient."""
        return 0

    @property
    def captions(self) -> int:
        """Captions under which a term evaluates `now`: 1, or 2 with a rival."""
        return 1

    def branches(self, guidance: float) -> int:
        """Forwards of each of these evaluations: two where it is guided."""
        return 1 + (guidance != 1)

    def draw(self, key: PRNGKeyArray, update: int, plan: Plan) -> Draw:
        """How the rollout of this update (from 0) is drawn; the key is consumed.

        Raises:
          ValueError: when fields do not fit the plan.
        """
        ...

    def keep(self, trajectory: Trajectory) -> PyTree:
        """What the loss needs of a rollout: leaves `[B ...]`, or scalars that all samples share."""
        ...

    def loss(
        self, policies: Policies, samples: Samples, sigmas: Float[Array, " T+1"], term: Array
    ) -> Terms:
        """Loss number `term` of these samples; `sigmas` is the schedule of the run."""
        ...

    def remember(self, adapters: PyTree) -> PyTree:
        """TrainState.algorithm before the first update: adapters of its own, or nothing."""
        return ()

    def renew(self, memory: PyTree, adapters: PyTree) -> PyTree:
        """TrainState.algorithm after the optimizer steps of a rollout."""
        return memory

    def drawing(self, adapters: PyTree, memory: PyTree) -> PyTree:
        """The adapters that draw the next rollout."""
        return adapters


def forward_equivalents(algorithm: Algorithm, steps: int, guidance: float) -> int:
    """Forwards of the policy that a video takes in an update, its rollout of so many steps
    included; one with its backward counts three."""
    evaluations = algorithm.terms * (3 * algorithm.captions + algorithm.forwards)
    return (1 + (guidance != 1)) * steps + algorithm.branches(guidance) * evaluations


def load(name: str) -> Any:
    """The class of an algorithm; ValueError for a name that is none."""
    if name not in ALGORITHMS:
        raise ValueError(
            f"algorithm.name is {short(repr(name))}: it is one of {', '.join(ALGORITHMS)}"
        )
    module, kind = ALGORITHMS[name].split(":")
    return getattr(importlib.import_module(module), kind)


def section(name: str) -> dict[str, Any]:
    """The config section of an algorithm: its name, and its fields with their defaults."""
    return {"name": name, **{f.name: f.default for f in dataclasses.fields(load(name))}}


def build(config: Mapping[str, Any]) -> Algorithm:
    """The algorithm of such a section.

    Raises:
      ValueError: for an unknown name or field, or a field that is out of its range.
    """
    fields = dict(config)
    name = fields.pop("name", None)
    kind = load(name)
    known = [field.name for field in dataclasses.fields(kind)]
    strange = [field for field in fields if field not in known]
    if strange:
        raise ValueError(
            f"algorithm.{strange[0]} is no field of {name}, which has {', '.join(known)}: name the "
            f"algorithm with the config, --config=configs/world.py:nano,{name}"
        )
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"algorithm.{error}") from error
