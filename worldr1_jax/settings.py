"""From the config to the objects that training and benchmarks run, every field checked first.

Nothing here compiles before `check` has passed; below this module, functions take plain arguments.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from worldr1_jax import rewards
from worldr1_jax.algorithms import advantage, base, optimizer
from worldr1_jax.algorithms import update as learning
from worldr1_jax.camera import commands
from worldr1_jax.camera.injection import MAGNITUDES, Camera
from worldr1_jax.data import prompts as prompt_files
from worldr1_jax.data import text_cache
from worldr1_jax.data.loader import Loader
from worldr1_jax.data.world_prompts import generate as world_prompts
from worldr1_jax.mesh import arrays, chips, compiler
from worldr1_jax.mesh import make as meshes
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.models.wan import config as wan_dit_config
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.nano import captions
from worldr1_jax.nn.lora import Adapters
from worldr1_jax.policies import adapters as trained
from worldr1_jax.policies import wan
from worldr1_jax.policies.stages import IDLE, Pipeline, latent_shape
from worldr1_jax.rollout import schedule
from worldr1_jax.weights.shipped import resolve

# For `least_context`: arrays of the residual stream's size that a layer keeps, by policy.remat, and
# bytes per number of the stream that a block's backward pass takes: an estimate, from a block that
# was compiled for a TPU at size; it agrees with the one update that the compiler has refused.
HELD = {"none": 25, "dots": 11, "attention": 2, "full": 1, "whole": 1}
BLOCK = 160

# What a resume may change without becoming another run.
MAY_CHANGE = (
    "num_updates",
    "checkpoint_every",
    "checkpoint_keep",
    "videos_every",
    "evaluate",
    "mesh",
    "idle_on_host",
    "policy.text_cache",
)


def load_prompts(config: ml_collections.ConfigDict) -> prompt_files.PromptSets:
    """The prompt sets that the config names: ours, those of the nano world, or files."""
    if config.prompts == "nano":
        return captions.prompt_sets()
    if config.prompts in ("world", "world_short"):
        return world_prompts.prompt_sets("long" if config.prompts == "world" else "short")
    if not config.prompts:
        raise ValueError(
            "prompts is empty: give world, world_short, a folder with train.txt, dynamic.txt and "
            "test.txt, or one file"
        )
    prompts = prompt_files.read(config.prompts, commands.complaint)
    if config.evaluate.prompts and not prompts.test:
        raise ValueError(
            "evaluate.prompts is not 0, but there are no test prompts: add test.txt or set it to 0"
        )
    return prompts


def check(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError for what would only fail later, after minutes of loading and compiling."""
    check_policy(config)
    cache = open_text_cache(config)
    if cache is not None:
        cache.check(texts(config, load_prompts(config)))
    parts, videos = sharding.batch_parts(mesh), config.groups * config.group_size
    if videos % parts:
        raise ValueError(
            f"groups x group_size is {videos} videos, which the mesh's data x fsdp = {parts} "
            "cannot divide"
        )
    strange = [name for name in config.idle_on_host if name not in IDLE]
    if strange:
        raise ValueError(f"idle_on_host names '{strange[0]}': it knows {', '.join(IDLE)}")
    for make in (make_rules, make_optimizer, make_advantage):
        make(config)  # each refuses what it cannot honour
    make_algorithm(config).draw(jax.random.key(0), 0, make_plan(config))
    check_rewards(config)
    unknown = [name for name in config.dynamic.off if name not in rewards.NAMES]
    if unknown:
        raise ValueError(f"dynamic.off names '{unknown[0]}': it knows {', '.join(rewards.NAMES)}")
    positive = ["num_updates", "checkpoint_every", "videos_every"]
    for name in [*positive, "evaluate.batch", "evaluate.samples"]:
        value = attrgetter(name)(config)
        if value < 1:
            raise ValueError(f"{name} is {value}: it has to be at least 1")


def check_rewards(config: ml_collections.ConfigDict) -> None:
    """The part of `check` that scoring videos depends on."""
    rewards.check(config.rewards.weights, config.rewards.da3, config.rewards.mode)
    lpips_folder(config)
    kept = config.rewards.gaussian_frames
    if kept < 0:
        raise ValueError(f"rewards.gaussian_frames is {kept}: it has to be 0, for all, or more")
    if config.rewards.general != "palette":
        raise ValueError(
            f"rewards.general is '{config.rewards.general}': palette is the only one there is"
        )


def check_policy(config: ml_collections.ConfigDict) -> None:
    """The part of `check` that sampling videos depends on."""
    dit, vae = wan.read_configs(resolve(config.policy.weights))
    latent_shape(vae, dit, (config.frames, config.height, config.width))
    make_camera(config)


def texts(config: ml_collections.ConfigDict, prompts: prompt_files.PromptSets) -> list[str]:
    """Every text that a run encodes."""
    return [*prompts.train, *prompts.dynamic, *prompts.test, config.sample.negative_prompt]


def text_fingerprint(config: ml_collections.ConfigDict) -> str:
    """What the embeddings of a cache depend on: encoder, tokenizer, padded length and dtype."""
    found = wan.parts(resolve(config.policy.weights))
    return text_cache.fingerprint(
        [found["text_encoder"], found["tokenizer"]], config.policy.text_tokens, config.policy.dtype
    )


def open_text_cache(config: ml_collections.ConfigDict) -> text_cache.TextCache | None:
    """The cache that policy.text_cache names; ValueError for a stale one, None for an empty
    name."""
    if not config.policy.text_cache:
        return None
    return text_cache.TextCache(config.policy.text_cache, made_by=text_fingerprint(config))


def make_loader(config: ml_collections.ConfigDict, prompts: prompt_files.PromptSets) -> Loader:
    """The prompts of every update: groups of K, main and dynamic phases."""
    return Loader(
        prompts, seed=config.seed, groups=config.groups, group_size=config.group_size,
        main_updates=config.dynamic.main_updates, dynamic_updates=config.dynamic.dynamic_updates,
    )  # fmt: skip


@contextlib.contextmanager
def of_section(name: str) -> Iterator[None]:
    """Puts the section's name before what its dataclass has against a field."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def make_algorithm(config: ml_collections.ConfigDict) -> base.Algorithm:
    """The algorithm that the config names; see algorithms/base.py."""
    return base.build(config.algorithm)


def make_plan(config: ml_collections.ConfigDict) -> base.Plan:
    """What every rollout has in common."""
    s = config.sample
    return base.Plan(config.groups, config.group_size, s.steps, s.shift, s.guidance)


def make_advantage(config: ml_collections.ConfigDict) -> advantage.Advantage:
    """How rewards become advantages."""
    with of_section("advantage"):
        return advantage.Advantage(**config.advantage)


def make_advantages(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Any:
    """The compiled (scores, off) -> (advantages, valid)."""
    weights = dict(config.rewards.weights)
    return advantage.make(mesh, config.group_size, weights, make_advantage(config))


def make_optimizer(config: ml_collections.ConfigDict) -> optimizer.Optimizer:
    """AdamW of the adapters."""
    t = config.train
    with of_section("train"):
        return optimizer.make_optimizer(
            t.learning_rate, weight_decay=t.weight_decay, clip_norm=t.clip_norm, eps=t.adam_eps,
            warmup_steps=t.warmup,
        )  # fmt: skip


def make_state(config: ml_collections.ConfigDict, pipeline: Pipeline) -> learning.TrainState:
    """That before the first update, on the pipeline's mesh."""
    start = partial(
        learning.init_state, optimizer=make_optimizer(config), algorithm=make_algorithm(config)
    )
    with jax.set_mesh(pipeline.mesh):
        return jax.jit(start)(pipeline.adapters)


def make_update(
    config: ml_collections.ConfigDict, pipeline: Pipeline, state: Any, *, donate: bool = True
) -> compiler.Jit:
    """The compiled update, (state, base, batch, sigmas, text_null) -> (state, metrics), that keeps
    the state where it lies and, if it may `donate` it, in its own memory."""
    step = partial(
        learning.train_step, algorithm=make_algorithm(config), velocity=pipeline.velocity,
        optimizer=make_optimizer(config), guidance=config.sample.guidance,
        rules=make_rules(config, sharding.batch_parts(pipeline.mesh)),
    )  # fmt: skip
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return compiler.Jit(
        step, pipeline.mesh, out_shardings=(places, None), donate_argnums=0 if donate else ()
    )  # fmt: skip


def make_mesh(
    config: ml_collections.ConfigDict,
    dit: wan_dit.Config | None = None,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """The mesh that the config asks for; with mesh.data = 0, one that suits the devices.

    Args:
      dit: shape of the policy; by default it is read from policy.weights.
      devices: by default all that there are.
    """
    if config.mesh.data:
        return meshes.make_mesh(config.mesh, devices)
    found = list(jax.devices() if devices is None else devices)
    if dit is None:
        dit, _ = wan.read_configs(resolve(config.policy.weights))
    context = least_context(config, dit, found) if found[0].platform == "tpu" else 1
    videos = config.groups * config.group_size
    sizes = meshes.default_sizes(found, videos, dit.num_attention_heads, context)
    return meshes.make_mesh(sizes, found)


def least_context(
    config: ml_collections.ConfigDict, dit: wan_dit.Config, devices: Sequence[Any]
) -> int:
    """Devices that have to share a video so that the backward pass fits into a TPU's memory.

    A rule of thumb, checked by launch/plan_pod.py on the topologies of the README: for each number
    of the residual stream, the bfloat16 inputs of all layers (of both branches of guidance, and
    once more while one is put away; of one branch with policy.remat=whole), and BLOCK bytes of one
    block's backward pass.
    """
    branches = 2 if config.sample.guidance != 1 else 1
    held = 1 if config.policy.remat == "whole" or branches == 1 else branches + 1
    size = (1 + (config.frames - 1) // 4, config.height // 8, config.width // 8)
    numbers = wan_dit_config.tokens(dit, size) * dit.dim
    needed = numbers * (2 * held * dit.num_layers * HELD[config.policy.remat] + BLOCK)
    chip = chips.CHIPS[chips.generation(devices[0].device_kind)]
    weights = 2 * dit.num_layers * dit.dim * (8 * dit.dim + 2 * dit.ffn_dim) / len(devices)
    room = max(0.85 * chip.hbm - weights, 0.05 * chip.hbm)
    return min(math.ceil(needed / room), len(devices))


def make_rules(config: ml_collections.ConfigDict, parts: int = 1) -> learning.Rules:
    """Settings of the update, on a mesh that splits a batch into `parts`."""
    t = config.train
    microbatches = t.microbatches
    if not microbatches:
        mine = config.groups * config.group_size // t.minibatches // parts
        microbatches = max(mine // max(config.sample.videos_at_once, 1), 1)
    return learning.Rules(
        epochs=t.epochs, minibatches=t.minibatches, microbatches=microbatches,
        ema_decay=t.ema_decay, ema_every=t.ema_every,
    )  # fmt: skip


def make_camera(config: ml_collections.ConfigDict) -> Camera:
    """How the asked path enters the noise."""
    s = config.sample
    if s.magnitudes not in MAGNITUDES:
        raise ValueError(f"sample.magnitudes is '{s.magnitudes}': it is {' or '.join(MAGNITUDES)}")
    return Camera(
        s.camera, s.camera_strength, s.camera_degradation, s.flow_scale, MAGNITUDES[s.magnitudes]
    )


def build_pipeline(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    key: jax.Array | None,
    adapters: Adapters | None = None,
) -> Pipeline:
    """Loads the policy and prepares its stages; its adapters are fresh ones drawn from `key`, or
    the given ones, or, with neither, none."""
    cache = open_text_cache(config)
    model = wan.load(
        resolve(config.policy.weights), mesh=mesh, tokens=config.policy.text_tokens,
        dtype=jnp.dtype(config.policy.dtype), remat=config.policy.remat,
        lora_rank=0 if key is None else config.policy.lora_rank,
        lora_alpha=config.policy.lora_alpha, key=key, adapters=adapters, text=cache is None,
    )  # fmt: skip
    parts = {"text": model.text_encoder, "vae": model.vae, "policy": model.dit}
    for name in config.idle_on_host:
        network = parts.get(name)
        if network is not None:
            arrays.rest(network)
    s = config.sample
    return Pipeline(
        model, mesh, size=(config.frames, config.height, config.width),
        sigmas=schedule.sigmas(s.steps, s.shift), camera=make_camera(config),
        text_cache=cache, chunked_vae=config.policy.chunked_vae,
        videos_at_once=s.videos_at_once,
    )  # fmt: skip


def load_adapters(
    config: ml_collections.ConfigDict, path: str, kind: str = "ema"
) -> Adapters | None:
    """Adapters of a run or of a LoRA file for the policy that the config names; None for an empty
    path. See policies/adapters.py."""
    if not path:
        return None
    dit, _ = wan.read_configs(resolve(config.policy.weights))
    return trained.load(path, dit, kind)


def build_reward(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> rewards.Reward:
    """The rewards that the config names."""
    r = config.rewards
    return rewards.build(
        dict(r.weights),
        da3=r.da3,
        lpips=lpips_folder(config),
        mode=r.mode,
        **asked_of_recon(config),
        mesh=mesh,
        frame_stride=r.frame_stride,
        views=r.views or None,
        depth_scale=r.depth_scale,
        gaussian_frames=r.gaussian_frames or None,
        videos_at_once=config.sample.videos_at_once,
        idle_on_host="rewards" in config.idle_on_host,
        dtype=config.policy.dtype,
    )


def asked_of_recon(config: ml_collections.ConfigDict) -> dict[str, float]:
    """What S_recon asks of a video besides likeness, by the names of `recon.s_recon`."""
    r = config.rewards
    return {name: r[name] for name in ("change_floor", "change_min", "texture_min")}


def lpips_folder(config: ml_collections.ConfigDict) -> str | None:
    """Where LPIPS is, or None when S_recon compares by SSIM."""
    r = config.rewards
    for name, value in asked_of_recon(config).items():
        if value < 0:
            raise ValueError(f"rewards.{name} is {value}: it has to be 0 or more")
    if r.likeness not in ("lpips", "ssim"):
        raise ValueError(f"rewards.likeness is '{r.likeness}': it is lpips or ssim")
    if r.likeness == "ssim":
        return None
    if not Path(r.lpips).is_dir() or not r.lpips:
        raise ValueError(
            f"rewards.lpips is '{r.lpips}', which is no folder: give LPIPS, or set "
            "rewards.likeness=ssim"
        )
    return r.lpips

