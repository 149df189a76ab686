"""The programs that a plan compiles: those of the trainer, from shapes alone (see report.py).

Stages name their programs; here they are given described networks, and told what else rests on the
device meanwhile, such as networks that do not wait on the hosts (config.idle_on_host).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from worldr1_jax import settings
from worldr1_jax.algorithms import update as learning
from worldr1_jax.algorithms.base import Rival
from worldr1_jax.mesh import arrays, placement
from worldr1_jax.mesh.arrays import bytes_on_device
from worldr1_jax.mesh.compiler import Program
from worldr1_jax.policies import wan
from worldr1_jax.policies.base import POLICY, TEXT, VAE
from worldr1_jax.policies.stages import COLUMNS, Pipeline
from worldr1_jax.rewards import Scorer
from worldr1_jax.rewards import scorer as scoring
from worldr1_jax.rewards.choice import RECONSTRUCT
from worldr1_jax.settings import Settings
from worldr1_jax.types import Trajectory
from worldr1_jax.workdir import checkpoint

FAMILY = wan  # whose published sizes are planned
# Turns of loops whose number depends on the data. Assumptions, not measurements: a moving camera
# uncovers 8 of 64 blocks of pixels a frame; a tile is opaque after some 10,000 Gaussians, 256 a
# round (splat/tiles.py).
TURNS = {"warp": 8, "recon": 40, "meta_view": 40, "judge": 40}


@dataclasses.dataclass(frozen=True)
class Lowering:
    """A program, and bytes on each device that are no arguments of it."""

    program: Program
    resting: int = 0

    @property
    def turns(self) -> int | None:
        """Of its loops whose number of turns depends on the data; None where there are none."""
        return TURNS.get(self.program.name)


class Shapes:
    """What flows between the stages of one update, described."""

    def __init__(self, found: Settings, pipeline: Pipeline):
        mesh, run = pipeline.mesh, found.run
        self.batch, self.whole = arrays.batched(mesh), arrays.replicated(mesh)
        self.count, self.groups, self.steps = run.videos, run.groups, found.sample.steps
        # Drawn on this host: no program of the mesh.
        self.draw = found.algorithm.draw(jax.random.key(0), 0, found.plan)
        width, tokens = self.draw.width, found.policy.text_tokens
        # A prompt on each device at a time, until those of all groups are done.
        at_once = placement.batch_parts(mesh, "sequences")
        self.tokens = _over(mesh, (at_once, tokens), "sequences", None, dtype=jnp.int32)
        width_of_text = pipeline.policy.shape.text_width
        self.text = _over(mesh, (self.count, tokens, width_of_text), "videos", "words", None)
        self.null: Any = None
        if found.sample.guidance != 1:
            self.null = jax.ShapeDtypeStruct(self.text.shape[1:], jnp.float32, sharding=self.whole)
        self.keys = self.of(self.count, dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
        self.paths = self.of(self.count, run.frames, 4, 4)
        self.latents = _over(mesh, (self.count, *pipeline.latent_shape), *COLUMNS)
        starts = jnp.shape(self.draw.start)
        self.start: Any = jax.ShapeDtypeStruct(
            starts, jnp.int32, sharding=self.batch if starts else self.whole
        )
        self.states = _over(mesh, (width + 1, *self.latents.shape), None, *COLUMNS)
        self.logs = _over(mesh, (width, self.count), None, "videos")
        mine = self.count // placement.batch_parts(mesh)
        # Videos of one turn of the rewards, and turns.
        self.turns = max(mine // (found.sample.videos_at_once or mine), 1)
        self.some = self.of(self.count // self.turns, *run.size, 3)
        self.some_latents = _over(mesh, (len(self.some), *pipeline.latent_shape), *COLUMNS)
        self.asked = self.of(len(self.some), run.frames, 4, 4)

    def of(self, *dims: int, dtype: Any = jnp.float32) -> Any:
        """A described array whose leading axis is the batch of videos."""
        return jax.ShapeDtypeStruct(dims, dtype, sharding=self.batch)

    def batched(self, leaf: Any) -> Any:
        """The same of an array or of its shape."""
        return self.of(*leaf.shape, dtype=leaf.dtype)


def described_pipeline(found: Settings, mesh: jax.sharding.Mesh) -> Pipeline:
    """The trainer's pipeline with leaves that have a shape, a dtype and a place, but no values."""
    p = found.policy
    model = FAMILY.described(
        found.run.variant, mesh, tokens=p.text_tokens, dtype=jnp.dtype(p.dtype), remat=p.remat,
        lora_rank=p.lora_rank, lora_alpha=p.lora_alpha, lora_layers=p.lora_layers,
    )  # fmt: skip
    # The warp is planned apart: the rollout's text would have its loops of unknown length.
    camera = dataclasses.replace(found.camera, mode="none")
    return Pipeline(
        model, mesh, size=found.run.size, sampling=found.sample, camera=camera,
        chunked_vae=p.chunked_vae,
    )  # fmt: skip


def described_scorer(found: Settings, mesh: jax.sharding.Mesh) -> Scorer:
    """The trainer's scorer, of published sizes and without values."""
    return scoring.described(
        found.rewards, mesh, found.policy.dtype, videos_at_once=found.sample.videos_at_once
    )


def lowerings(found: Settings, mesh: jax.sharding.Mesh) -> Iterator[Lowering]:
    """Every program of an update in their order, and that of restoring a checkpoint."""
    pipeline, scorer = described_pipeline(found, mesh), described_scorer(found, mesh)
    shapes = Shapes(found, pipeline)
    state = settings.described_state(found, pipeline)
    sizes = _sizes(found, pipeline, scorer, shapes, state)

    def resting(*names: str) -> int:
        return sum(sizes[name] for name in names)

    nets, drawn = ("text", "vae", "rewards", "moments"), ("embeddings", "trajectory")
    # Each turn decodes and scores some videos; all that was drawn rests meanwhile, and the 3D
    # network stays awake until the turns are over.
    kept = resting("text", "vae", "policy", "adapters", "moments", *drawn)
    beside = {
        "text": resting("policy", "vae", "rewards", "adapters", "moments"),
        "warp": resting(*nets, "policy", "adapters", "embeddings"),
        "rollout": resting(*nets),
        "decode": kept - sizes["vae"] + sizes["awake"],
        RECONSTRUCT: kept + sizes["awake"] - sizes[RECONSTRUCT],
    }
    scored = {program.name: kept + sizes["awake"] for program in scorer.programs(shapes)}
    beside = scored | beside | {"update": resting("text", "vae", "rewards")}
    for program in every(found, pipeline, scorer, shapes, state):
        yield Lowering(program, beside[program.name])
    restore = Program(
        "restore", lambda: checkpoint.digests_of.trace(jax.tree.leaves(state)), times=0
    )
    yield Lowering(restore, resting("text", "vae", "policy", "rewards"))


def every(
    found: Settings, pipeline: Pipeline, scorer: Scorer, shapes: Shapes, state: Any
) -> Iterator[Program]:
    """The programs of an update in their order, of real networks or described ones."""
    yield from pipeline.programs(shapes, sampler=shapes.draw.sampler, width=shapes.draw.width)
    yield from scorer.programs(shapes)
    yield _update(found, pipeline, shapes, state)


def _update(found: Settings, pipeline: Pipeline, shapes: Shapes, state: Any) -> Program:
    algorithm, rules = found.algorithm, found.train
    work = pipeline.policy.shape.work(found.run.size, found.policy.text_tokens)
    branches = algorithm.branches(found.sample.guidance)
    drawn: Any = Trajectory(shapes.latents, shapes.states, shapes.logs, shapes.start, shapes.keys)
    advantages: Any = shapes.of(shapes.count)
    valid: Any = shapes.of(shapes.count, dtype=jnp.bool_)
    rival = Rival(shapes.text, advantages) if algorithm.captions > 1 else None
    step = learning.Batch(drawn, shapes.text, advantages, valid, rival)
    update = settings.make_update(found, pipeline, state)
    sigmas: Any = jax.ShapeDtypeStruct(
        (found.sample.steps + 1,), jnp.float32, sharding=shapes.whole
    )
    # Forward, backward through frozen products (as much again) and through attention (twice), and
    # the forwards of policies that are only compared with.
    forward = work.linear + work.scores
    once = algorithm.captions * (2 * work.linear + 3 * work.scores)
    once += algorithm.forwards * forward
    return Program(
        "update",
        lambda: update.trace(state, arrays.shapes(pipeline.base), step, sigmas, shapes.null),
        needed=algorithm.terms * rules.epochs * shapes.count * branches * once,
    )  # fmt: skip


def _sizes(
    found: Settings, pipeline: Pipeline, scorer: Scorer, shapes: Shapes, state: Any
) -> dict[str, int]:
    """Bytes on each device of what stages leave there; 0 for networks that rest on the hosts."""
    held = {name: bytes_on_device(tree) for name, tree in pipeline.held().items()}
    networks = {name: bytes_on_device(tree) for name, tree in scorer.networks.items()}
    sizes = {TEXT: held[TEXT], VAE: held[VAE], POLICY: held[POLICY]}
    sizes |= {"rewards": sum(networks.values())}
    sizes |= dict.fromkeys(found.run.idle_on_host, 0)
    look = networks.get(RECONSTRUCT, 0)
    return sizes | {
        RECONSTRUCT: look,
        # The 3D network is, from the first turn to the last, and the others where they have no
        # other place.
        "awake": max(look, sizes["rewards"]),
        "adapters": held["adapters"],
        "moments": bytes_on_device(state) - held["adapters"],
        "embeddings": bytes_on_device((shapes.text, shapes.null)),
        "trajectory": bytes_on_device((shapes.states, shapes.latents)),
    }


def _over(
    mesh: jax.sharding.Mesh, shape: tuple[int, ...], *axes: str | None, dtype: Any = jnp.float32
) -> Any:
    """A described array by what its axes are (see `placement.spec_for`)."""
    place = jax.sharding.NamedSharding(mesh, placement.spec_for(shape, axes, mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
