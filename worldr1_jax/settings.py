"""From the config to the objects that training and benchmarks run, every field checked first.

Nothing here compiles before `check` has passed; below this module, functions take plain arguments.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import optax

from worldr1_jax import nano, rewards, sharding
from worldr1_jax.data import prompts as prompt_files
from worldr1_jax.data.loader import Loader
from worldr1_jax.grpo import update as grpo
from worldr1_jax.models import wan, wan_dit, wan_vae
from worldr1_jax.models.convert import read_config
from worldr1_jax.nano import captions
from worldr1_jax.pipeline import MAGNITUDES, Camera, Pipeline, latent_shape
from worldr1_jax.rollout import schedule
from worldr1_jax.rollout.sample import Sampler

# What a resume may change without becoming another run.
MAY_CHANGE = (
    "num_updates",
    "checkpoint_every",
    "checkpoint_keep",
    "videos_every",
    "evaluate",
    "mesh",
)


def load_prompts(config: ml_collections.ConfigDict) -> prompt_files.PromptSets:
    """The prompt sets that the config names; "nano" makes them from a fixed seed."""
    if config.prompts == "nano":
        return captions.prompt_sets()
    if not config.prompts:
        raise ValueError(
            "prompts is empty: give a folder with train.txt, dynamic.txt and test.txt, or one file"
        )
    prompts = prompt_files.read(config.prompts)
    if config.evaluate.prompts and not prompts.test:
        raise ValueError(
            "evaluate.prompts is not 0, but there are no test prompts: add test.txt or set it to 0"
        )
    return prompts


def check(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError for what would only fail later, after minutes of loading and compiling."""
    folder = nano.resolve(config.policy.weights)
    wan.check(folder)
    vae = wan_vae.Config.from_dict(read_config(folder / "vae"))
    dit = wan_dit.Config.from_dict(read_config(folder / "transformer"))
    latent_shape(vae, dit, (config.frames, config.height, config.width))
    schedule.check_window(config.sample.steps, config.sample.window, *config.sample.window_range)
    parts = sharding.batch_parts(mesh)
    for name, videos in (
        ("groups x group_size", config.groups * config.group_size),
        ("evaluate.batch x evaluate.samples", config.evaluate.batch * config.evaluate.samples),
    ):
        if videos % parts:
            raise ValueError(
                f"{name} is {videos} videos, which the mesh's data x fsdp = {parts} cannot divide"
            )
    if config.sample.window_place not in ("random", "progressive"):
        raise ValueError(
            f"sample.window_place is '{config.sample.window_place}': it is random or progressive"
        )
    for make in (make_camera, make_sampler, make_rules):
        make(config)  # each refuses what it cannot honour
    rewards.check(config.rewards.weights, config.rewards.da3)
    if config.rewards.general != "palette":
        raise ValueError(
            f"rewards.general is '{config.rewards.general}': palette is the only one there is"
        )
    unknown = [name for name in config.dynamic.off if name not in rewards.NAMES]
    if unknown:
        raise ValueError(f"dynamic.off names '{unknown[0]}': it knows {', '.join(rewards.NAMES)}")
    for name in ("num_updates", "checkpoint_every", "videos_every"):
        if config[name] < 1:
            raise ValueError(f"{name} is {config[name]}: it has to be at least 1")


def make_loader(config: ml_collections.ConfigDict, prompts: prompt_files.PromptSets) -> Loader:
    """The prompts of every update: groups of K, main and dynamic phases."""
    return Loader(
        prompts, seed=config.seed, groups=config.groups, group_size=config.group_size,
        main_updates=config.dynamic.main_updates, dynamic_updates=config.dynamic.dynamic_updates,
    )  # fmt: skip


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW of the adapters."""
    t = config.train
    return grpo.make_optimizer(
        t.learning_rate, weight_decay=t.weight_decay, clip_norm=t.clip_norm, warmup_steps=t.warmup
    )


def make_sampler(config: ml_collections.ConfigDict) -> Sampler:
    """The stochastic sampler that rollout and update share."""
    s = config.sample
    return Sampler(kind=s.sde, eta=s.eta, level=s.level, guidance=s.guidance)


def make_rules(config: ml_collections.ConfigDict) -> grpo.Rules:
    """Settings of the update."""
    t = config.train
    return grpo.Rules(
        clip=t.clip, kl_weight=t.kl_weight, epochs=t.epochs, minibatches=t.minibatches,
        microbatches=t.microbatches, ema_decay=t.ema_decay, ema_every=t.ema_every,
        equalise=t.equalise,
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
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, key: jax.Array
) -> Pipeline:
    """Loads the policy with fresh adapters, and prepares its stages."""
    model = wan.load(
        nano.resolve(config.policy.weights), mesh=mesh, tokens=config.policy.text_tokens,
        dtype=jnp.dtype(config.policy.dtype), remat=config.policy.remat,
        lora_rank=config.policy.lora_rank, lora_alpha=config.policy.lora_alpha, key=key,
    )  # fmt: skip
    s = config.sample
    camera = make_camera(config)
    size = (config.frames, config.height, config.width)
    return Pipeline(model, mesh, size=size, sigmas=schedule.sigmas(s.steps, s.shift), camera=camera)


def build_reward(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> rewards.Reward:
    """The rewards that the config names."""
    r = config.rewards
    return rewards.build(
        dict(r.weights),
        da3=r.da3,
        mesh=mesh,
        frame_stride=r.frame_stride,
        views=r.views or None,
        depth_scale=r.depth_scale,
    )


def window_start(config: ml_collections.ConfigDict, update: int, key: jax.Array) -> jax.Array:
    """First stochastic step of this update, the same for every sample."""
    s = config.sample
    if s.window_place == "random":
        return schedule.random_window(key, s.window, *s.window_range)
    return schedule.progressive_window(
        update, s.window, *s.window_range, interval=s.window_interval
    )
