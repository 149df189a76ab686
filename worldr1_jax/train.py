"""run(): the whole of training, top to bottom. The update itself is algorithms/update.py,
`train_step`."""

from __future__ import annotations

import dataclasses
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from flax import nnx

from worldr1_jax import settings
from worldr1_jax.algorithms import base
from worldr1_jax.algorithms import update as learning
from worldr1_jax.data.loader import Loader, PromptBatch
from worldr1_jax.evaluation import held_out as evaluate
from worldr1_jax.files import write_atomically
from worldr1_jax.mesh import arrays
from worldr1_jax.policies.stages import Pipeline
from worldr1_jax.rewards.scorer import NAMES, Reward
from worldr1_jax.rollout.sample import sample_keys
from worldr1_jax.timing import StageTimer
from worldr1_jax.types import Scores
from worldr1_jax.workdir.checkpoint import Checkpointer, StopSignal, check_workdir
from worldr1_jax.workdir.metrics import MetricsWriter, Progress, write_summary

SHOWN = ("reward", "recon", "trajectory", "general", "kl", "ratio_deviation", "grad_norm")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Networks on the mesh and the programs that an update runs."""

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    pipeline: Pipeline
    reward: Reward
    algorithm: base.Algorithm
    advantages: Any  # (scores, off) -> (advantages, valid)
    train_step: Any  # (state, base, batch, sigmas, text_null) -> (state, metrics)
    text_null: jax.Array | None  # embedding of the negative prompt, when there is guidance
    keys: tuple[jax.Array, ...]  # of training and of the held-out report


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one update leaves to look at."""

    batch: PromptBatch
    videos: dict[int, np.ndarray]  # on the host, by their place in the batch: those to be saved
    scores: Scores
    scalars: dict[str, float]


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, or goes on training, and returns what summary.json holds; {} when it was asked to
    stop.

    Raises:
      ValueError: a wrong field or file, in one sentence, before anything is compiled and with
        nothing overwritten.
    """
    began = time.time()

    # ---------------------------------------------------------------- what was asked for, checked
    prompts = settings.load_prompts(config)
    mesh = settings.make_mesh(config)
    settings.check(config, mesh)
    loader = settings.make_loader(config, prompts)
    check_workdir(workdir, json.loads(config.to_json()), settings.MAY_CHANGE)

    # ---------------------------------------------------------------- networks, state, checkpoint
    programs, state = build(config, mesh)
    checkpoints = Checkpointer(workdir, keep=config.checkpoint_keep)
    restored = checkpoints.restore_latest(jax.tree.map(_abstract, state))
    first = 0
    if restored:
        state, first = restored.state, restored.step
        loader.set_state(restored.data)
        _say(f"resumed after update {first} of {config.num_updates}")

    trained = parameter_overview.count_parameters(state.adapters)
    frozen = parameter_overview.count_parameters(nnx.to_pure_dict(programs.pipeline.base))
    _say(f"{trained:,} parameters are trained, {frozen:,} are not; mesh {dict(mesh.shape)}")

    # ---------------------------------------------------------------- the loop
    meta = {"version": metadata.version("worldr1_jax"), "seed": config.seed}
    progress = Progress(config.num_updates, first)
    timer = StageTimer(on_stage=progress.stage)
    with StopSignal() as stop, jax.set_mesh(mesh), MetricsWriter(workdir, first) as writer:
        for update in range(first, config.num_updates):
            state, outcome = one_update(programs, state, loader, update, timer)
            # Metrics go before the checkpoint, so that a killed run loses none.
            writer.write(update, outcome.scalars)
            progress.update(update, {k: v for k, v in outcome.scalars.items() if k in SHOWN})
            done = update + 1
            if outcome.videos:
                save_videos(writer, workdir, update, outcome, config.fps)
            stopping = stop.agreed()
            if done % config.checkpoint_every == 0 or done == config.num_updates or stopping:
                checkpoints.save(done, state, loader.get_state(), meta)
            if stopping and done < config.num_updates:
                checkpoints.close()
                _say(f"stopped after update {done}; the same command goes on from there")
                return {}
        progress.close()
        checkpoints.close()

    # ---------------------------------------------------------------- before and after
    heldout = {}
    if config.evaluate.prompts:
        _say("held-out report, before and after")
        heldout = evaluate.compare(
            programs.pipeline, programs.reward, state.ema, prompts.test, config, workdir,
            key=programs.keys[1], text_null=programs.text_null,
        )  # fmt: skip
    summary = {
        **meta, "updates": config.num_updates, "seconds": time.time() - began, "heldout": heldout
    }  # fmt: skip
    if jax.process_index() == 0:
        write_summary(Path(workdir) / "summary.json", summary)
    return summary


def build(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Compiled, learning.TrainState]:
    """Loads the networks and prepares the programs; the state is that before the first update."""
    lora_key, *keys = jax.random.split(jax.random.key(config.seed), 3)
    pipeline = settings.build_pipeline(config, mesh, lora_key)
    algorithm, state = settings.make_algorithm(config), settings.make_state(config, pipeline)
    train_step = settings.make_update(config, pipeline, state)
    text_null = None
    if config.sample.guidance != 1:
        text_null = pipeline.encode_one(config.sample.negative_prompt)
    reward = settings.build_reward(config, mesh)
    advantages = settings.make_advantages(config, mesh)
    programs = Compiled(
        config, mesh, pipeline, reward, algorithm, advantages, train_step, text_null, tuple(keys)
    )  # fmt: skip
    return programs, state


def one_update(
    programs: Compiled, state: learning.TrainState, loader: Loader, update: int, timer: StageTimer
) -> tuple[learning.TrainState, Outcome]:
    """Rollout, rewards, advantages and the update of the policy."""
    config, pipeline = programs.config, programs.pipeline

    # -- prompts and the keys of this update
    batch = loader.batch(update)
    sample_key, draw_key = jax.random.split(jax.random.fold_in(programs.keys[0], update))
    keys = sample_keys(sample_key, len(batch.prompts))
    draw = programs.algorithm.draw(draw_key, update, settings.make_plan(config))

    # -- rollout: text, camera path, starting noise, latents
    with timer("rollout") as wait_for:
        text, paths = pipeline.encode(batch.prompts), pipeline.paths(batch.prompts)
        trajectory = wait_for(
            pipeline.rollout(
                programs.algorithm.drawing(state.adapters, state.algorithm), text, paths, keys,
                text_null=programs.text_null, **draw._asdict(),
            )
        )  # fmt: skip

    # -- videos and their rewards; the dynamic phase has no 3D rewards, for those would freeze what
    # moves. At full size videos are 46 times their latents: they are decoded as they are scored.
    saved: range | tuple[int, ...] = ()
    if (update + 1) % config.videos_every == 0 or update == 0:
        saved = range(0, len(batch.prompts), config.group_size)[:4]
    shown: dict[int, np.ndarray] = {}

    def decode(latents: jax.Array, places: np.ndarray) -> jax.Array:
        videos = pipeline.decode(latents)
        for row, place in enumerate(places.tolist()):
            if place in saved:
                shown[place] = arrays.to_host(videos[row])
        return videos

    off = tuple(config.dynamic.off) if batch.is_dynamic else ()
    scores = programs.reward(
        trajectory.latents, batch.prompts, paths, decode=decode, off=off, timer=timer
    )

    # -- advantages and update
    with timer("update") as wait_for:
        advantages, valid = programs.advantages(scores, off)
        state, learnt = wait_for(
            programs.train_step(
                state, arrays.awake(pipeline.base),
                learning.Batch(trajectory, text, advantages, valid),
                pipeline.sigmas, programs.text_null,
            )
        )  # fmt: skip
    scalars = summarise(scores, learnt, batch.is_dynamic) | timer.collect()
    return state, Outcome(batch, dict(sorted(shown.items())), scores, scalars)


def summarise(scores: Scores, learnt: dict[str, jax.Array], is_dynamic: bool) -> dict[str, float]:
    """Scalars of one update; rewards are means over the samples that could be scored."""
    valid = arrays.to_host(scores.valid)
    parts = {name: arrays.to_host(part) for name, part in scores.parts.items()}
    values = {"reward": arrays.to_host(scores.total), **parts}
    means = {
        name: float(value[valid].mean()) if valid.any() else float("nan")
        for name, value in values.items()
    }
    return {
        **means,
        "reward_std": float(values["reward"][valid].std()) if valid.any() else float("nan"),
        "masked": int((~valid).sum()),
        **{
            f"failed_{name}": int((~np.isfinite(value)).sum())
            for name, value in parts.items()
            if name in NAMES
        },
        "dynamic": int(is_dynamic),
        **{name: float(value) for name, value in learnt.items()},
    }


def save_videos(
    writer: MetricsWriter,
    workdir: str,
    update: int,
    outcome: Outcome,
    fps: int,
) -> None:
    """One video of each of the first groups as mp4, and a text file with their prompts and
    rewards."""
    scores, prompts = outcome.scores, outcome.batch.prompts
    lines, found = [], {name: arrays.to_host(part) for name, part in scores.parts.items()}
    for group, (index, video) in enumerate(outcome.videos.items()):
        writer.video(update, f"group{group}", video, fps)
        parts = "  ".join(f"{name} {float(value[index]):.3f}" for name, value in found.items())
        lines.append(f"group{group}_{update:06d}.mp4  {parts}  {prompts[index]}")
    if jax.process_index() == 0:
        text = "\n".join(lines) + "\n"
        write_atomically(Path(workdir) / "videos" / f"prompts_{update:06d}.txt", text.encode())


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
