"""run(): the whole of training, top to bottom. The update itself is grpo/update.py,
`train_step`."""

from __future__ import annotations

import json
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from worldr1_jax import evaluate, nano, rewards, sharding
from worldr1_jax.checkpoint import Checkpointer, StopSignal, check_workdir
from worldr1_jax.data import prompts as prompt_files
from worldr1_jax.data.loader import Loader
from worldr1_jax.grpo import update as grpo
from worldr1_jax.grpo.advantage import group_advantage
from worldr1_jax.metrics import (
    MetricsWriter,
    Progress,
    StageTimer,
    contact_sheet,
    write_atomically,
    write_summary,
)
from worldr1_jax.models import wan, wan_dit, wan_vae
from worldr1_jax.models.convert import read_config
from worldr1_jax.nano import captions
from worldr1_jax.pipeline import MAGNITUDES, Camera, Pipeline, latent_shape
from worldr1_jax.rollout import schedule
from worldr1_jax.rollout.sample import Sampler, sample_keys

# What a resume may change without becoming another run.
MAY_CHANGE = (
    "num_updates",
    "checkpoint_every",
    "checkpoint_keep",
    "videos_every",
    "evaluate",
    "mesh",
)
SHOWN = ("reward", "recon", "trajectory", "general", "kl", "ratio_deviation", "grad_norm")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, or goes on training, and returns what summary.json holds; {} when it was asked to
    stop.

    Raises:
      ValueError: a wrong field or file, in one sentence, before anything is compiled and with
        nothing overwritten.
    """
    began = time.time()

    # ---------------------------------------------------------------- what was asked for, checked
    mesh = sharding.make_mesh(config.mesh)
    prompts = load_prompts(config)
    check(config, mesh)
    loader = Loader(
        prompts, seed=config.seed, groups=config.groups, group_size=config.group_size,
        main_updates=config.dynamic.main_updates, dynamic_updates=config.dynamic.dynamic_updates,
    )  # fmt: skip
    sampler, rules = make_sampler(config), make_rules(config)
    check_workdir(workdir, json.loads(config.to_json()), MAY_CHANGE)

    # ---------------------------------------------------------------- networks, state, checkpoint
    run_key = jax.random.key(config.seed)
    lora_key, train_key, heldout_key = jax.random.split(run_key, 3)
    pipeline = build_pipeline(config, mesh, lora_key)
    reward = build_reward(config, mesh)
    text_null = None
    if config.sample.guidance != 1:
        text_null = pipeline.encode_one(config.sample.negative_prompt)
    optimizer = grpo.make_optimizer(
        config.train.learning_rate, weight_decay=config.train.weight_decay,
        clip_norm=config.train.clip_norm, warmup_steps=config.train.warmup,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        state = jax.jit(partial(grpo.init_state, optimizer=optimizer))(pipeline.adapters)
    train_step = jax.jit(
        partial(
            grpo.train_step,
            velocity=pipeline.velocity,
            optimizer=optimizer,
            sampler=sampler,
            rules=rules,
        ),
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
        donate_argnums=0,
    )
    checkpoints = Checkpointer(workdir, keep=config.checkpoint_keep)
    restored = checkpoints.restore_latest(jax.tree.map(_abstract, state))
    first = 0
    if restored:
        state, first = restored.state, restored.step
        loader.set_state(restored.data)
        _say(f"resumed after update {first} of {config.num_updates}")

    # ---------------------------------------------------------------- the loop
    writer = MetricsWriter(workdir, first)
    progress = Progress(config.num_updates, first)
    timer = StageTimer(on_stage=progress.stage)
    count = config.groups * config.group_size
    with StopSignal() as stop, jax.set_mesh(mesh):
        for update in range(first, config.num_updates):
            # -- prompts and the keys of this update
            batch = loader.batch(update)
            sample_key, window_key = jax.random.split(jax.random.fold_in(train_key, update))
            keys = sample_keys(sample_key, count)
            start = window_start(config, update, window_key)

            # -- rollout: text, camera path, starting noise, latents, videos
            with timer("rollout") as wait_for:
                text, paths = pipeline.encode(batch.prompts), pipeline.paths(batch.prompts)
                trajectory = wait_for(
                    pipeline.rollout(
                        state.adapters,
                        text,
                        paths,
                        keys,
                        sampler=sampler,
                        text_null=text_null,
                        start=start,
                        width=config.sample.window,
                    )
                )
            with timer("decode") as wait_for:
                videos = wait_for(pipeline.decode(trajectory.latents))

            # -- rewards; the dynamic phase has no 3D rewards, for those would freeze what moves
            off = tuple(config.dynamic.off) if batch.is_dynamic else ()
            scores = reward(videos, batch.prompts, paths, off=off, timer=timer)

            # -- advantages and update
            with timer("update") as wait_for:
                advantages = group_advantage(
                    scores.total, config.group_size, scores.valid,
                    std=config.train.advantage_std, clip=config.train.advantage_clip,
                )  # fmt: skip
                step = grpo.make_batch(
                    trajectory, text, advantages, scores.valid, _placed(keys, mesh)
                )
                state, learnt = wait_for(
                    train_step(state, pipeline.base, step, pipeline.sigmas, text_null)
                )

            # -- what people see; metrics go before the checkpoint, so that a killed run loses none
            scalars = summarise(scores, learnt, batch.is_dynamic) | timer.collect()
            writer.write(update, scalars)
            progress.update(update, {k: scalars[k] for k in SHOWN if k in scalars})
            if (update + 1) % config.videos_every == 0 or update == 0:
                save_videos(writer, workdir, update, videos, scores, batch.prompts, config)
            stopping = stop.agreed()
            done = update + 1
            if done % config.checkpoint_every == 0 or done == config.num_updates or stopping:
                meta = {"version": metadata.version("worldr1_jax"), "seed": config.seed}
                checkpoints.save(done, state, loader.get_state(), meta)
            if stopping and done < config.num_updates:
                checkpoints.close()
                writer.close()
                _say(f"stopped after update {done}; the same command goes on from there")
                return {}
    progress.close()
    checkpoints.wait()

    # ---------------------------------------------------------------- before and after
    summary = {
        "seconds": time.time() - began, "updates": config.num_updates, "seed": config.seed,
        "version": metadata.version("worldr1_jax"), "heldout": {},
    }  # fmt: skip
    if config.evaluate.prompts:
        summary["heldout"] = compare(
            config, workdir, pipeline, reward, state, prompts, heldout_key, text_null
        )
        summary["seconds"] = time.time() - began
    write_summary(Path(workdir) / "summary.json", summary)
    checkpoints.close()
    writer.close()
    return summary


def load_prompts(config: ml_collections.ConfigDict) -> prompt_files.PromptSets:
    """The prompt sets that the config names; "nano" makes them from a fixed seed."""
    if config.prompts == "nano":
        return captions.prompt_sets()
    if not config.prompts:
        raise ValueError(
            "prompts is empty: give a folder with train.txt, dynamic.txt and test.txt, or one file"
        )
    return prompt_files.read(config.prompts)


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
    make_camera(config)
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


def summarise(scores, learnt: dict[str, jax.Array], is_dynamic: bool) -> dict[str, float]:
    """Scalars of one update; rewards are means over the samples that could be scored."""
    valid = np.asarray(scores.valid)
    values = {
        "reward": np.asarray(scores.total),
        **{k: np.asarray(v) for k, v in scores.parts.items()},
    }
    means = {
        name: float(value[valid].mean()) if valid.any() else float("nan")
        for name, value in values.items()
    }
    return {
        **means,
        "reward_std": float(values["reward"][valid].std()) if valid.any() else float("nan"),
        "masked": int((~valid).sum()),
        "dynamic": int(is_dynamic),
        **{name: float(value) for name, value in learnt.items()},
    }


def save_videos(writer: MetricsWriter, workdir, update, videos, scores, prompts, config) -> None:
    """One video of each of the first groups as mp4, and a text file with their prompts and
    rewards."""
    step = config.group_size
    lines = []
    for index in range(0, min(len(prompts), 4 * step), step):
        writer.video(update, f"group{index // step}", np.asarray(videos[index]), config.fps)
        parts = "  ".join(
            f"{name} {float(value[index]):.3f}" for name, value in scores.parts.items()
        )
        lines.append(f"group{index // step}_{update:06d}.mp4  {parts}  {prompts[index]}")
    if jax.process_index() == 0:
        text = "\n".join(lines) + "\n"
        write_atomically(Path(workdir) / "videos" / f"prompts_{update:06d}.txt", text.encode())


def compare(config, workdir, pipeline, reward, state, prompts, key, text_null) -> dict[str, Any]:
    """Held-out prompts under the base policy and under the averaged adapters, on the same noise."""
    held_out = list(prompts.test[: config.evaluate.prompts])
    if not held_out:
        raise ValueError(
            "evaluate.prompts is not 0, but there are no test prompts: add test.txt or set it to 0"
        )
    _say(f"held-out report: {len(held_out)} prompts, before and after")
    options = {
        "key": key, "samples": config.evaluate.samples, "batch": min(config.evaluate.batch,
        len(held_out)), "guidance": config.sample.guidance, "text_null": text_null,
    }  # fmt: skip
    before, old = evaluate.measure(pipeline, reward, pipeline.adapters, held_out, **options)
    after, new = evaluate.measure(pipeline, reward, state.ema, held_out, **options)
    if jax.process_index() == 0:
        for name, videos in (("before", old), ("after", new)):
            sheet = contact_sheet(videos[:8], held_out[: len(videos)][:8])
            write_atomically(Path(workdir) / "videos" / f"heldout_{name}.png", sheet)
    rows = evaluate.report(before, after, config.seed)
    _say(evaluate.table(rows))
    return rows


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _placed(keys: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    return jax.device_put(keys, sharding.batched(mesh))


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
