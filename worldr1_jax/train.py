"""run(): the whole of training, top to bottom. The update itself is algorithms/update.py,
`train_step`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from flax import nnx

import worldr1_jax
from worldr1_jax import episode, preflight, settings
from worldr1_jax.algorithms import update as learning
from worldr1_jax.algorithms.advantage import FLAT
from worldr1_jax.algorithms.base import Rival
from worldr1_jax.data.loader import Loader, PromptBatch
from worldr1_jax.evaluation import held_out
from worldr1_jax.files import read_json, short, write_atomically
from worldr1_jax.mesh import arrays, compiler, hosts
from worldr1_jax.policies.stages import Pipeline
from worldr1_jax.rewards import Scorer
from worldr1_jax.rewards.hindsight import Hindsight, Rivals
from worldr1_jax.rollout.sample import sample_keys
from worldr1_jax.settings import Settings
from worldr1_jax.timing import StageTimer
from worldr1_jax.types import Scores
from worldr1_jax.workdir.checkpoint import Checkpointer, compare_config
from worldr1_jax.workdir.lock import Lock
from worldr1_jax.workdir.metrics import MetricsWriter, Progress, write_summary
from worldr1_jax.workdir.stop import Stopped, StopSignal
from worldr1_jax.workdir.watch import Watcher

SHOWN = ("reward", "kl", "grad_norm", "masked", "skipped")  # beside the rewards that count


@dataclasses.dataclass(frozen=True)
class Programs:
    """Networks on the mesh and the programs that an update runs."""

    settings: Settings
    mesh: jax.sharding.Mesh
    pipeline: Pipeline
    scorer: Scorer
    advantages: Any  # (scores, off) -> (advantages, valid)
    train_step: Any  # (state, base, batch, sigmas, text_null) -> (state, metrics)
    text_null: jax.Array | None  # embedding of the negative prompt, when there is guidance
    hindsight: Hindsight | None  # where the algorithm contrasts captions
    diversity: Any  # latents -> distance of those of a prompt
    keys: tuple[jax.Array, ...]  # of training and of the held-out report


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one update leaves to look at."""

    batch: PromptBatch
    videos: dict[int, np.ndarray]  # on the host, by their place in the batch: those to be saved
    scores: Scores
    scalars: dict[str, float]


def run(
    config: ml_collections.ConfigDict, workdir: str, programs_folder: str | Path = ""
) -> dict[str, Any]:
    """Trains, or goes on training, and returns what summary.json holds; {} when it was asked to
    stop.

    Compiled programs are kept in `programs_folder`, which is made when all has been checked; "":
    where jax's own configuration says, if anywhere.

    Raises:
      ValueError: a wrong field or file, in one sentence, before anything is compiled and with
        nothing overwritten; or a folder that another run holds, or that is gone.
    """
    began = time.time()

    # ---------------------------------------------------------------- what was asked for, checked
    found = settings.read(config)
    preflight.check_files(found)
    prompts = settings.load_prompts(found)
    mesh = settings.make_mesh(found)
    preflight.check(found, mesh, prompts)
    if found.algorithm.captions > 1 and (shared := preflight.shared_scenes(found, prompts)):
        _say(
            f"note: {len(shared)} scenes of held-out prompts are learnt from, too, such as "
            f"'{short(shared[0])}': rival captions may be held-out prompts"
        )
    loader = settings.make_loader(found, prompts)
    asked = json.loads(config.to_json())
    contents = preflight.contents(found, prompts)
    compare_config(workdir, asked, preflight.MAY_CHANGE, contents, preflight.defaults(found))
    hosts.agree(preflight.identity(config, prompts, contents))

    with (
        Lock(workdir) as lock,
        Checkpointer(
            workdir, keep=found.run.checkpoint_keep, config=asked, contents=contents
        ) as checkpoints,
    ):
        hosts.agree({
            "workdir, which has to be a folder that all of them see": lock.seen(),
            "newest checkpoint": str(checkpoints.latest_step()),
        })  # fmt: skip
        if programs_folder:
            compiler.keep_programs(programs_folder)

        # ------------------------------------------------------------ networks, state, checkpoint
        programs, state = build(found, mesh)
        restored = checkpoints.restore_latest(jax.tree.map(_abstract, state))
        watcher = Watcher(found.watch, restored.data["watch"] if restored else None)
        first = 0
        if restored:
            state, first = restored.state, restored.step
            loader.set_state(restored.data["loader"])
            over = first >= found.run.num_updates or watcher.history["spoilt"]
            if over and (summary := _finished(workdir, first)):
                return summary
            _say(f"resumed after update {first} of {found.run.num_updates}")

        # ------------------------------------------------------------ the loop
        keeper = Keeper(checkpoints, loader, watcher, _meta(found), lock)
        try:
            state, done, ended = learn(programs, state, first, keeper, workdir)
        except Stopped:
            _say(f"stopped after update {keeper.saved}; the same command goes on from there")
            return {}

        # ------------------------------------------------------------ before and after
        summary = {
            **_meta(found), "updates": done, "ended": ended,
            **held_out_report(programs, prompts.test, state.ema, workdir),
            "seconds": time.time() - began,
        }  # fmt: skip
        if jax.process_index() == 0:
            write_summary(Path(workdir) / "summary.json", summary)
        return summary


@dataclasses.dataclass
class Keeper:
    """What is saved with the state, and when."""

    checkpoints: Checkpointer
    loader: Loader
    watcher: Watcher
    meta: dict[str, Any]
    lock: Lock
    saved: int = 0  # updates in the newest checkpoint

    def save(self, done: int, state: learning.TrainState) -> None:
        """Begins to write a checkpoint after `done` updates, if there is none of it."""
        if done > self.saved:
            position = {"loader": self.loader.get_state(), "watch": self.watcher.history}
            self.checkpoints.save(done, state, position, self.meta)
            self.saved = done

    def settled(self) -> int:
        """Updates in the newest checkpoint, once it is written."""
        self.checkpoints.wait()
        return self.saved


def learn(
    programs: Programs, state: learning.TrainState, first: int, keeper: Keeper, workdir: str
) -> tuple[learning.TrainState, int, str]:
    """The updates from `first` on: the state after them, how many are done, and why they ended
    early, or "".

    Raises:
      Stopped: the process was asked to stop; the newest state is saved.
    """
    found = programs.settings
    run, watcher, done = found.run, keeper.watcher, first
    ended = watcher.history["spoilt"]  # before this process: nothing more is learnt
    trained = parameter_overview.count_parameters(state.adapters)
    frozen = parameter_overview.count_parameters(nnx.to_pure_dict(programs.pipeline.base))
    _say(
        f"{trained:,} parameters are trained, {frozen:,} are not; mesh {dict(programs.mesh.shape)}"
    )
    _say("the first update compiles its programs, which takes longer than the others")
    progress, keeper.saved = Progress(run.num_updates, first), first
    timer, shown = StageTimer(on_stage=progress.stage), (*SHOWN, *found.rewards.reported())
    with (
        StopSignal(keeper.settled) as stop,
        jax.set_mesh(programs.mesh),
        MetricsWriter(workdir, first) as writer,
    ):
        try:
            for update in range(first, first if ended else run.num_updates):
                stop.between_stages()
                state, outcome = one_update(
                    programs, state, keeper.loader, update, timer, between=stop.between_stages
                )
                keeper.lock.check()  # or metrics would go to a run that has taken the folder
                # Metrics go before the checkpoint, so that a killed run loses none.
                writer.write(update, outcome.scalars)
                progress.update(update, {k: v for k, v in outcome.scalars.items() if k in shown})
                done = update + 1
                if outcome.videos:
                    save_videos(writer, workdir, update, outcome, run.fps)
                ended = watcher.update(outcome.scalars)
                if warning := watcher.warning(outcome.scalars):
                    _say(f"note: {warning}")
                keeper.lock.check()
                if done % run.checkpoint_every == 0 or done == run.num_updates or ended:
                    with stop.saving():
                        keeper.save(done, state)
                if ended:
                    _say(f"ended after update {done}: {ended}")
                    break
            stop.between_stages()  # what was asked for in the last stage; the report takes long
        except Stopped:
            with stop.saving():
                keeper.save(done, state)
                keeper.settled()
            raise
        progress.close()
        with stop.saving():
            keeper.settled()
    return state, done, ended


def held_out_report(
    programs: Programs, test: Sequence[str], adapters: Any, workdir: str
) -> Mapping[str, Any]:
    """Before and after, on the first of these prompts; see `held_out.compare`."""
    found = programs.settings
    if not found.evaluate.prompts:
        return {"heldout": {}}
    _say("held-out report, before and after")
    exam = held_out.Exam(
        test[: found.evaluate.prompts], programs.keys[1], found.evaluate.samples,
        found.evaluate.batch, found.sample.videos_at_once,
    )  # fmt: skip
    start = "what policy.adapters gave" if found.policy.adapters else "the base"
    return held_out.compare(
        programs.pipeline, programs.scorer, adapters, exam, found.evaluate,
        seed=found.run.seed, workdir=workdir, start=start,
    )  # fmt: skip


def _meta(found: Settings) -> dict[str, Any]:
    return {"version": worldr1_jax.__version__, "seed": found.run.seed}


def _finished(workdir: str, updates: int) -> dict[str, Any]:
    """What a run that is complete had to say, of which nothing is done again; {} where its report
    was not written."""
    path = Path(workdir) / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    if summary.get("updates") != updates:  # or of a shorter run, which this one went on from
        return {}
    _say(f"the run in {workdir} is complete after {updates} updates; see {path}")
    return summary


def build(found: Settings, mesh: jax.sharding.Mesh) -> tuple[Programs, learning.TrainState]:
    """Loads the networks and prepares the programs; the state is that before the first update."""
    lora_key, *keys = jax.random.split(jax.random.key(found.run.seed), 3)
    pipeline = settings.build_pipeline(found, mesh, lora_key)
    state = settings.make_state(found, pipeline)
    programs = Programs(
        settings=found, mesh=mesh, pipeline=pipeline,
        scorer=settings.build_scorer(found, mesh),
        advantages=settings.make_advantages(found, mesh),
        train_step=settings.make_update(found, pipeline, state),
        hindsight=settings.make_hindsight(found, pipeline),
        text_null=pipeline.negative() if found.sample.guidance != 1 else None,
        diversity=jax.jit(partial(episode.diversity, group_size=found.run.group_size)),
        keys=tuple(keys),
    )  # fmt: skip
    return programs, state


def one_update(
    programs: Programs,
    state: learning.TrainState,
    loader: Loader,
    update: int,
    timer: StageTimer,
    *,
    between: Callable[[], None] = lambda: None,
) -> tuple[learning.TrainState, Outcome]:
    """Rollout, rewards, advantages and the update of the policy. `between` is called where a run
    can be left with its state as it was."""
    found, pipeline = programs.settings, programs.pipeline
    run, algorithm = found.run, found.algorithm

    # -- prompts and the keys of this update
    batch = loader.batch(update)
    sample_key, draw_key = jax.random.split(jax.random.fold_in(programs.keys[0], update))
    keys = sample_keys(sample_key, len(batch.prompts))
    draw = algorithm.draw(draw_key, update, found.plan)

    # -- rollout: text, camera path, starting noise, latents
    drawing = algorithm.drawing(state.adapters, state.algorithm)
    rolled = pipeline.roll(
        drawing, batch.prompts, keys, text_null=programs.text_null, timer=timer,
        **draw._asdict(),
    )  # fmt: skip

    between()

    # -- videos and their rewards; the dynamic phase has no 3D rewards, for those would freeze what
    # moves. What does not count is not measured here.
    saved: range | tuple[int, ...] = ()
    if (update + 1) % run.videos_every == 0 or update == 0:
        saved = range(0, run.videos, run.group_size)[:4]
    shown: dict[int, np.ndarray] = {}
    off = found.rewards.measured()
    if batch.is_dynamic:
        off = (*off, *found.rewards.meant(found.dynamic.off))
    hindsight = None if "trajectory" in off else programs.hindsight
    scores = episode.judge(
        pipeline, programs.scorer, rolled, off=off, timer=timer, wanted=saved,
        seen=shown.__setitem__, witness=hindsight.see if hindsight else None,
    )  # fmt: skip

    between()

    # -- rival captions, advantages and update
    rival = None
    if algorithm.captions > 1:
        # Without cameras to look at, as in the dynamic phase, each is its own rival, with no lead.
        chosen = Rivals(batch.prompts, np.zeros(run.videos, np.float32))
        if hindsight:
            chosen = hindsight.choose(batch.prompts, np.random.default_rng((run.seed, update)))
        place = arrays.batched(programs.mesh)
        rival = Rival(pipeline.encode(chosen.prompts), arrays.to_global(chosen.lead, place))
    with timer("update") as wait_for:
        advantages, valid = programs.advantages(scores, off)
        state, learnt = wait_for(
            programs.train_step(
                state, arrays.awake(pipeline.base),
                learning.Batch(rolled.trajectory, rolled.text, advantages, valid, rival),
                pipeline.sigmas, programs.text_null,
            )
        )  # fmt: skip
    scalars = {
        **summarise(scores, learnt, batch.is_dynamic, run.group_size),
        "diversity": float(programs.diversity(rolled.trajectory.latents)),
        "learnt": float(learnt["skipped"] < found.train.epochs * found.train.minibatches),
        **timer.collect(),
    }
    return state, Outcome(batch, dict(sorted(shown.items())), scores, scalars)


def summarise(
    scores: Scores, learnt: dict[str, jax.Array], is_dynamic: bool, group_size: int
) -> dict[str, float]:
    """Scalars of one update; rewards are means over the samples that could be scored, and constant_
    the share of groups in which one has no spread."""
    valid = arrays.to_host(scores.valid)
    parts = {name: arrays.to_host(part) for name, part in scores.parts.items()}
    values = {"reward": arrays.to_host(scores.total), **parts}

    def mean(value: np.ndarray) -> float:
        return float(value[valid].mean()) if valid.any() else float("nan")

    def constant(value: np.ndarray) -> float:
        rows = value.reshape(-1, group_size)
        known = np.isfinite(rows)
        spread = np.where(known, rows, -np.inf).max(1) - np.where(known, rows, np.inf).min(1)
        return float(((spread < FLAT) & known.any(1)).mean())

    return {
        **{name: mean(value) for name, value in values.items()},
        "reward_std": float(values["reward"][valid].std()) if valid.any() else float("nan"),
        "masked": int((~valid).sum()),
        **{f"failed_{name}": int((~np.isfinite(value)).sum()) for name, value in parts.items()},
        **{f"constant_{name}": constant(parts[name]) for name in scores.counted},
        "dynamic": int(is_dynamic),
        **{name: float(value) for name, value in learnt.items()},
    }


def save_videos(
    writer: MetricsWriter, workdir: str, update: int, outcome: Outcome, fps: float
) -> None:
    """One video of each of the first groups as mp4, and a text file with their prompts and
    rewards."""
    scores, prompts = outcome.scores, outcome.batch.prompts
    lines, found = [], {name: arrays.to_host(part) for name, part in scores.parts.items()}
    for group, (index, video) in enumerate(outcome.videos.items()):
        if np.isfinite(video).all():  # else there is nothing to see
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
