"""From the config to the objects that training and launchers run, every field checked first.

A section of the config is passed whole to its dataclass, which says what each field means and may
be (SECTIONS; the rewards' are in rewards.choice, the algorithm's in algorithms.base). Nothing here
compiles before `read` has passed; below this module, functions take plain arguments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from worldr1_jax.algorithms import advantage, base
from worldr1_jax.algorithms import update as learning
from worldr1_jax.camera import commands
from worldr1_jax.camera.injection import Camera
from worldr1_jax.data import prompts as prompt_files
from worldr1_jax.data import text_cache
from worldr1_jax.data.loader import Loader
from worldr1_jax.data.phases import Phases
from worldr1_jax.data.world_prompts import generate as world_prompts
from worldr1_jax.evaluation.held_out import Evaluate
from worldr1_jax.fields import check_names, each_of, in_range, of_kind
from worldr1_jax.mesh import arrays, chips, placement
from worldr1_jax.mesh import make as meshes
from worldr1_jax.mesh.compiler import Jit
from worldr1_jax.nano import captions
from worldr1_jax.nn.layers import HELD
from worldr1_jax.nn.lora import Adapters
from worldr1_jax.policies.base import POLICY, TEXT, VAE, Options, Work, family
from worldr1_jax.policies.stages import Pipeline, Sampling
from worldr1_jax.rewards import Scorer
from worldr1_jax.rewards import scorer as scoring
from worldr1_jax.rewards.base import REWARDS
from worldr1_jax.rewards.choice import Choice, choose
from worldr1_jax.rewards.hindsight import Hindsight
from worldr1_jax.rewards.trajectory import Trajectory
from worldr1_jax.weights.shipped import resolve
from worldr1_jax.workdir.watch import Watch

IDLE = (TEXT, VAE, POLICY, "rewards")  # networks that may wait on the hosts

# Bytes per number of the residual stream that a block's backward pass takes, for `least_context`:
# an estimate, from a block that was compiled for a TPU at size; it agrees with the one update that
# the compiler has refused.
BLOCK = 160

SECTIONS: Mapping[str, type] = {
    "mesh": meshes.Sizes,
    "policy": Options,
    "sample": Sampling,
    "camera": Camera,
    "advantage": advantage.Advantage,
    "train": learning.Rules,
    "dynamic": Phases,
    "watch": Watch,
    "evaluate": Evaluate,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The fields of the config that are in no section; see configs/world.py."""

    variant: str
    seed: int
    num_updates: int
    checkpoint_every: int
    checkpoint_keep: int
    videos_every: int
    groups: int
    group_size: int
    frames: int
    height: int
    width: int
    fps: float
    idle_on_host: tuple[str, ...]
    prompts: str

    def __post_init__(self) -> None:
        in_range(
            self, seed=(0, 2**32 - 1), num_updates=(1, 10**9), checkpoint_every=(1, 10**9),
            checkpoint_keep=(1, 10**6), videos_every=(1, 10**9), groups=(1, 10**6),
            group_size=(2, 10**4), frames=(1, 10**5), height=(1, 10**5), width=(1, 10**5),
            fps=(1e-3, 1e4),
        )  # fmt: skip
        of_kind(self, str, "variant", "prompts")
        each_of(self, idle_on_host=IDLE)

    @property
    def size(self) -> tuple[int, int, int]:
        """Of a video: frames, height, width."""
        return self.frames, self.height, self.width

    @property
    def videos(self) -> int:
        """Of one update."""
        return self.groups * self.group_size


@dataclasses.dataclass(frozen=True)
class Settings:
    """A config, read and checked field by field."""

    run: Run
    mesh: meshes.Sizes
    policy: Options
    sample: Sampling
    camera: Camera
    rewards: Choice
    algorithm: base.Algorithm
    advantage: advantage.Advantage
    train: learning.Rules
    dynamic: Phases
    watch: Watch
    evaluate: Evaluate

    @property
    def plan(self) -> base.Plan:
        """What every rollout has in common."""
        s = self.sample
        return base.Plan(self.run.groups, self.run.group_size, s.steps, s.shift, s.guidance)


def read(config: ml_collections.ConfigDict) -> Settings:
    """The settings of a config.

    Raises:
      ValueError: a field that is unknown or out of its range, by its name, in one sentence.
    """
    fields = dict(config.items())
    for name in (*SECTIONS, "rewards", "algorithm"):
        if not isinstance(fields.get(name), ml_collections.ConfigDict):
            raise ValueError(f"the config has no section {name}, which configs/world.py has")
    sections = {name: _section(fields.pop(name), name, kind) for name, kind in SECTIONS.items()}
    rewards = _plain(fields.pop("rewards"))
    algorithm = base.build(_plain(fields.pop("algorithm")))
    run = _section(fields, "", Run)
    found = Settings(run=run, rewards=choose(**rewards), algorithm=algorithm, **sections)
    _check_dynamic(found)
    found.train.check_parts(found.run.videos)
    if found.algorithm.captions > 1:
        _check_contrast(found)
    if found.watch.kl and getattr(found.algorithm, "kl_weight", None) == 0:
        raise ValueError("watch.kl needs algorithm.kl_weight above 0: 1e-9 only measures the KL")
    try:
        found.algorithm.draw(jax.random.key(0), 0, found.plan)  # which says whether its window fits
    except ValueError as error:
        raise ValueError(f"algorithm.{error}") from error
    return found


def _section(section: Any, name: str, kind: type) -> Any:
    """A dataclass from its section; what is wrong is said with the section's name."""
    prefix = f"{name}." if name else ""
    values = _plain(section)
    check_names(values, kind, prefix)
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _plain(section: Any) -> dict[str, Any]:
    """Nested ConfigDicts as dicts, lists as tuples."""
    if isinstance(section, ml_collections.ConfigDict):
        section = section.to_dict()
    return {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}


def _check_dynamic(found: Settings) -> None:
    """No phase may be left without a reward that counts: it would stop a run in its middle."""
    choice, dynamic = found.rewards, found.dynamic
    for name in dynamic.off:
        known = dict.fromkeys([*choice.rewards, "general", *REWARDS])  # one may be left out
        if name not in known:
            raise ValueError(f"dynamic.off names '{name}': the rewards are {', '.join(known)}")
    off = set(choice.meant(dynamic.off))
    if dynamic.dynamic_updates and not set(choice.counted()) - off:
        raise ValueError("dynamic.off leaves no reward that counts: name fewer, or weigh another")


def _check_contrast(found: Settings) -> None:
    """Captions can be contrasted where cameras are measured and any caption can be encoded."""
    if not found.rewards.weights.get("trajectory"):
        raise ValueError(
            "algorithm.contrast is not 0, but rewards.weights.trajectory is: no camera is measured"
        )
    if found.policy.text_cache:
        raise ValueError(
            "algorithm.contrast is not 0 and policy.text_cache is set: rival captions are written "
            "while a run goes on, and are in no cache"
        )


# ------------------------------------------------------------------------------------- prompts


def load_prompts(found: Settings) -> prompt_files.PromptSets:
    """The prompt sets that the config names: ours, those of the nano world, or files."""
    name = found.run.prompts
    if name == "nano":
        return captions.prompt_sets()
    if name in ("world", "world_short"):
        return world_prompts.prompt_sets("long" if name == "world" else "short")
    if not name:
        raise ValueError(
            "prompts is empty: give world, world_short, a folder with train.txt, dynamic.txt and "
            "test.txt, or one file"
        )
    prompts = prompt_files.read(name, commands.complaint)
    if found.evaluate.prompts and not prompts.test:
        raise ValueError(
            "evaluate.prompts is not 0, but there are no test prompts: add test.txt or set it to 0"
        )
    return prompts


def texts(found: Settings, prompts: prompt_files.PromptSets) -> list[str]:
    """Every text that a run encodes."""
    return [*prompts.train, *prompts.dynamic, *prompts.test, found.sample.negative_prompt]


def text_fingerprint(found: Settings) -> str:
    """What the embeddings of a cache depend on: encoder, tokenizer, padded length and dtype."""
    folder, policy = resolve(found.policy.weights), found.policy
    files = family(folder).text_files(folder)
    return text_cache.fingerprint(files, policy.text_tokens, policy.dtype)


def open_text_cache(found: Settings) -> text_cache.TextCache | None:
    """The cache that policy.text_cache names; ValueError for a stale one, None for an empty
    name."""
    if not found.policy.text_cache:
        return None
    return text_cache.TextCache(found.policy.text_cache, made_by=text_fingerprint(found))


def make_loader(found: Settings, prompts: prompt_files.PromptSets) -> Loader:
    """The prompts of every update: groups of K, main and dynamic phases."""
    run, phases = found.run, found.dynamic
    return Loader(
        prompts, seed=run.seed, groups=run.groups, group_size=run.group_size,
        main_updates=phases.main_updates, dynamic_updates=phases.dynamic_updates,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- mesh


def make_mesh(
    found: Settings,
    devices: Sequence[Any] | None = None,
    work: Work | None = None,
    *,
    videos: int | None = None,
) -> jax.sharding.Mesh:
    """The mesh that the config asks for; with mesh.data = 0, one that suits devices and model.

    Args:
      devices: by default all that there are.
      work: of the policy's forward; by default it is read from policy.weights.
      videos: that there are at a time; by default those that an optimizer step evaluates.
    """
    if found.mesh.data:
        return meshes.make_mesh(dataclasses.asdict(found.mesh), devices)
    there = list(jax.devices() if devices is None else devices)
    if work is None:
        folder = resolve(found.policy.weights)
        work = family(folder).read(folder).work(found.run.size, found.policy.text_tokens)
    context = least_context(found, work, there) if there[0].platform == "tpu" else 1
    if videos is None:
        videos = found.run.videos // (found.train.minibatches * max(found.train.microbatches, 1))
    return meshes.make_mesh(meshes.default_sizes(there, videos, work.heads, context), there)


def scoring_mesh(found: Settings) -> jax.sharding.Mesh:
    """The mesh that the config asks for, to score videos one by one; with mesh.data = 0, one whose
    devices share each video. It asks for no policy."""
    sizes = dataclasses.asdict(found.mesh) if found.mesh.data else {"data": 1, "context": -1}
    return meshes.make_mesh(sizes)


def least_context(found: Settings, work: Work, devices: Sequence[Any]) -> int:
    """Devices that have to share a video so that the backward pass fits into a TPU's memory.

    A rule of thumb, checked by launch/plan_pod.py on the topologies of docs/pods: for each number
    of the residual stream, the bfloat16 inputs of all layers (of both branches of guidance, and
    once more while one is put away; of one branch with policy.remat=whole), and BLOCK bytes of one
    block's backward pass.
    """
    remat = found.policy.remat
    branches = 2 if found.sample.guidance != 1 else 1
    held = 1 if remat == "whole" or branches == 1 else branches + 1
    needed = work.tokens * work.width * (2 * held * work.layers * HELD[remat] + BLOCK)
    chip = chips.CHIPS[chips.generation(devices[0].device_kind)]
    weights = 2 * work.weights / len(devices)
    room = max(0.85 * chip.hbm - weights, 0.05 * chip.hbm)
    return min(math.ceil(needed / room), len(devices))


# ------------------------------------------------------------------- networks and programs


def build_pipeline(
    found: Settings,
    mesh: jax.sharding.Mesh,
    key: jax.Array | None,
    adapters: Adapters | None = None,
) -> Pipeline:
    """Loads the policy and prepares its stages; its adapters are drawn from `key`, or grown from
    those that policy.adapters names, or the given ones, or, with neither, none."""
    cache, p = open_text_cache(found), found.policy
    if key is not None and p.adapters:
        adapters = load_adapters(found, [p.adapters])
    folder = resolve(p.weights)
    model = family(folder).load(
        folder, mesh=mesh, tokens=p.text_tokens, dtype=jnp.dtype(p.dtype), remat=p.remat,
        lora_rank=0 if key is None else p.lora_rank, lora_alpha=p.lora_alpha,
        lora_layers=p.lora_layers, key=key,
        adapters=adapters, text=cache is None,
    )  # fmt: skip
    for name in found.run.idle_on_host:
        if name in model.networks:
            arrays.rest(model.networks[name])
    return Pipeline(
        model, mesh, size=found.run.size, sampling=found.sample, camera=found.camera,
        text_cache=cache, chunked_vae=p.chunked_vae,
    )  # fmt: skip


def load_adapters(found: Settings, paths: Sequence[str], kind: str = "ema") -> Adapters | None:
    """Adapters of runs or of LoRA files, "path:0.8" for a strength, for the policy that the config
    names; None without any. See policies/adapters.py."""
    folder = resolve(found.policy.weights)
    return family(folder).load_adapters(paths, folder, kind) if paths else None


def build_scorer(found: Settings, mesh: jax.sharding.Mesh) -> Scorer:
    """The rewards that the config names."""
    return scoring.load(
        found.rewards, mesh, videos_at_once=found.sample.videos_at_once,
        idle_on_host="rewards" in found.run.idle_on_host, dtype=found.policy.dtype,
    )  # fmt: skip


def make_advantages(found: Settings, mesh: jax.sharding.Mesh) -> Any:
    """The compiled (scores, off) -> (advantages, valid)."""
    return advantage.make(mesh, found.run.group_size, found.rewards.weights, found.advantage)


def make_hindsight(found: Settings, pipeline: Pipeline) -> Hindsight | None:
    """What chooses rival captions, where the algorithm contrasts captions."""
    reward = found.rewards.rewards.get("trajectory")
    if found.algorithm.captions < 2 or not isinstance(reward, Trajectory):
        return None
    return Hindsight(reward, pipeline.paths)


def make_state(found: Settings, pipeline: Pipeline) -> learning.TrainState:
    """That before the first update, on the pipeline's mesh."""
    places = jax.tree.map(lambda leaf: leaf.sharding, described_state(found, pipeline))
    with jax.set_mesh(pipeline.mesh):
        return jax.jit(_start(found), out_shardings=places)(pipeline.adapters)


def described_state(found: Settings, pipeline: Pipeline) -> Any:
    """Shapes and places of `make_state`: moments, average and what the algorithm remembers lie
    where the adapters do. (Of zeros, which depend on no input, the compiler would give every device
    a copy.)"""
    shapes = jax.eval_shape(_start(found), pipeline.adapters)
    places = placement.beside(shapes, pipeline.adapters, arrays.replicated(pipeline.mesh))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes, places,
    )  # fmt: skip


def _start(found: Settings) -> Any:
    return partial(
        learning.init_state, optimizer=found.train.optimizer(), algorithm=found.algorithm
    )


def make_update(found: Settings, pipeline: Pipeline, state: Any, *, donate: bool = True) -> Jit:
    """The compiled update, (state, base, batch, sigmas, text_null) -> (state, metrics), that keeps
    the state where it lies and, if it may `donate` it, in its own memory."""
    step = partial(
        learning.train_step, algorithm=found.algorithm, velocity=pipeline.velocity,
        optimizer=found.train.optimizer(), rules=rules_on(found, pipeline.mesh),
        guidance=found.sample.guidance, group_size=found.run.group_size,
    )  # fmt: skip
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    donated = 0 if donate else ()
    return Jit(step, pipeline.mesh, out_shardings=(places, None), donate_argnums=donated)


def rules_on(found: Settings, mesh: jax.sharding.Mesh) -> learning.Rules:
    """Settings of the update; with train.microbatches = 0, so many that a device evaluates at most
    sample.videos_at_once at a time."""
    rules = found.train
    if rules.microbatches:
        return rules
    mine = max(found.run.videos // rules.minibatches // placement.batch_parts(mesh), 1)
    most = found.sample.videos_at_once or mine
    parts = next(n for n in range(1, mine + 1) if mine % n == 0 and mine // n <= most)
    return dataclasses.replace(rules, microbatches=parts)
