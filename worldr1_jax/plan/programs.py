"""The programs that a plan compiles: those of the trainer, from shapes alone (see report.py).

What they work on is described by shape, dtype and place. Beside its own arguments, a program finds
on the device what other stages keep there meanwhile, such as networks that do not rest on the hosts
(config.idle_on_host): `Lowering.resting`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from worldr1_jax import settings
from worldr1_jax.algorithms import update as grpo
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.models import lpips, umt5
from worldr1_jax.models.da3 import config as da3_config
from worldr1_jax.models.da3 import model as da3
from worldr1_jax.models.wan import config as wan_dit_config
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nano import palette as general
from worldr1_jax.nn import attention, lora
from worldr1_jax.policies.stages import COLUMNS, Pipeline
from worldr1_jax.policies.wan import Wan
from worldr1_jax.rewards import reconstruct
from worldr1_jax.rewards.scorer import Reward
from worldr1_jax.rollout import schedule
from worldr1_jax.workdir import checkpoint

PRESETS = {"small": wan_dit.Config.wan_1_3b, "large": wan_dit.Config.wan_14b}
# Turns of loops whose number depends on the data. Assumptions, not measurements: a moving camera
# uncovers 8 of 64 blocks of pixels a frame; a tile is opaque after some 10,000 Gaussians, 256 a
# round (splat/tiles.py).
WARP_BLOCKS, RENDER_ROUNDS = 8, 40


@dataclasses.dataclass(frozen=True)
class Lowering:
    """One program to compile.

    Attributes:
      name: of the stage.
      trace: makes it, under `jax.set_mesh`.
      needed: FLOPs that one run's mathematics needs on each device; 0 where that is what runs.
      times: runs in one update; 0 for what runs when a job starts.
      turns: of loops whose number of turns depends on the data; None where there are none.
      resting: bytes on each device that are no arguments of it.
    """

    name: str
    trace: Callable[[], Any]
    needed: float = 0.0
    times: int = 1
    turns: int | None = None
    resting: int = 0


def abstract_pipeline(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Pipeline:
    """The trainer's pipeline with leaves that have a shape, a dtype and a place, but no values."""
    preset, dtype = PRESETS[config.variant](), jnp.dtype(config.policy.dtype)

    def make_dit() -> nnx.Module:
        dit = wan_dit.WanDiT(
            preset, nnx.Rngs(0), dtype=dtype, param_dtype=dtype, remat=config.policy.remat,
            implementation=attention.for_mesh(mesh, preset.num_attention_heads, dtype),
        )  # fmt: skip
        return lora.add(dit, config.policy.lora_rank, config.policy.lora_alpha, nnx.Rngs(1))

    def make_vae() -> nnx.Module:
        return wan_vae.WanVAE(wan_vae.Config.wan2_1(), nnx.Rngs(0))

    def make_text() -> nnx.Module:
        return umt5.UMT5Encoder(
            umt5.Config.xxl(), nnx.Rngs(0), dtype=dtype, param_dtype=dtype
        )  # fmt: skip

    dit, vae, text = (
        _abstract(make, places, mesh)
        for make, places in (
            (make_dit, wan_dit.PLACES),
            (make_vae, wan_vae.PLACES),
            (make_text, umt5.PLACES),
        )
    )
    sharding.describe(dit, wan_dit.ADAPTER_PLACES, mesh, sharding.ADAPTERS)
    s = config.sample
    sigmas: Any = np.asarray(schedule.sigmas(s.steps, s.shift))  # no device to put it on
    wan = Wan(dit, vae, text, None, config.policy.text_tokens)
    # The warp is planned apart: the rollout's text would have its loops of unknown length.
    camera = dataclasses.replace(settings.make_camera(config), mode="none")
    return Pipeline(
        wan, mesh, size=(config.frames, config.height, config.width),
        sigmas=sigmas, camera=camera,
        chunked_vae=config.policy.chunked_vae, videos_at_once=config.sample.videos_at_once,
    )  # fmt: skip


def abstract_reward(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, network: da3.Config | None = None
) -> Reward:
    """The trainer's reward with Depth Anything 3 and LPIPS, no values; without a `network` the
    published giant, the only size with Gaussians."""
    r, dtype = config.rewards, jnp.dtype(config.policy.dtype)
    chosen = da3.Config.giant() if network is None else network
    kernel = attention.for_mesh(mesh, chosen.net.num_heads, dtype)

    def make_network() -> nnx.Module:
        return da3.DA3(chosen, nnx.Rngs(0), dtype=dtype, attention=kernel)

    distance = None
    if r.likeness == "lpips":
        distance = nnx.eval_shape(lambda: lpips.LPIPS(nnx.Rngs(0)))
        whole = arrays.replicated(mesh)
        state = jax.tree.map(partial(_described, place=whole), nnx.state(distance))
        nnx.update(distance, state)
    return Reward(
        dict(r.weights), _abstract(make_network, da3.PLACES, mesh), mesh,
        frame_stride=r.frame_stride, views=r.views or None,
        depth_scale=r.depth_scale, distance=distance, mode=r.mode,
        gaussian_frames=r.gaussian_frames or None, videos_at_once=config.sample.videos_at_once,
        asks=settings.asked_of_recon(config),
    )  # fmt: skip


class Shapes:
    """What flows between the stages of one update, described."""

    def __init__(self, config: ml_collections.ConfigDict, pipeline: Pipeline):
        mesh, dit = pipeline.mesh, PRESETS[config.variant]()
        self.batch, self.whole = arrays.batched(mesh), arrays.replicated(mesh)
        self.count, width = config.groups * config.group_size, config.sample.window
        # A prompt on each device at a time, until those of all groups are done.
        at_once = sharding.batch_parts(mesh, "sequences")
        self.encoder_turns = -(-config.groups // at_once)
        self.tokens = _over(
            mesh, (at_once, config.policy.text_tokens), "sequences", None, dtype=jnp.int32
        )
        self.text = _over(
            mesh, (self.count, config.policy.text_tokens, dit.text_dim), "videos", "words", None
        )
        self.null: Any = None
        if config.sample.guidance != 1:
            self.null = jax.ShapeDtypeStruct(self.text.shape[1:], jnp.float32, sharding=self.whole)
        self.keys = self.of(self.count, dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
        self.paths = self.of(self.count, config.frames, 4, 4)
        self.latents = _over(mesh, (self.count, *pipeline.latent_shape), *COLUMNS)
        self.start: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=self.whole)
        self.states = _over(mesh, (width + 1, *self.latents.shape), None, *COLUMNS)
        self.logs = _over(mesh, (width, self.count), None, "videos")
        frame = (config.height, config.width, 3)
        mine = self.count // sharding.batch_parts(mesh)
        # Videos of one turn of the rewards, and turns.
        self.turns = max(mine // (config.sample.videos_at_once or mine), 1)
        self.some = self.of(self.count // self.turns, config.frames, *frame)
        self.some_latents = _over(mesh, (len(self.some), *pipeline.latent_shape), *COLUMNS)
        self.asked = self.of(self.count // self.turns, config.frames, 4, 4)

    def of(self, *dims: int, dtype: Any = jnp.float32) -> Any:
        """A described array whose leading axis is the batch of videos."""
        return jax.ShapeDtypeStruct(dims, dtype, sharding=self.batch)


def lowerings(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Iterator[Lowering]:
    """Every program of an update in their order, and that of restoring a checkpoint."""
    pipeline, reward = abstract_pipeline(config, mesh), abstract_reward(config, mesh)
    shapes = Shapes(config, pipeline)
    optimizer = settings.make_optimizer(config)
    state = _like(
        pipeline.adapters,
        jax.eval_shape(partial(grpo.init_state, optimizer=optimizer), pipeline.adapters),
        shapes.whole,
    )
    sizes = _sizes(config, pipeline, reward, shapes, state)

    def resting(*names: str) -> int:
        return sum(sizes[name] for name in names)

    yield Lowering(
        "text",
        lambda: pipeline._text._run.trace(pipeline._text._state, shapes.tokens, shapes.tokens),
        times=shapes.encoder_turns,
        resting=resting("policy", "vae", "rewards", "adapters", "moments"),
    )
    nets, drawn = ("text", "vae", "rewards", "moments"), ("embeddings", "trajectory")
    yield Lowering(
        "warp", lambda: jax.jit(pipeline._warp).trace(shapes.keys, shapes.paths),
        turns=WARP_BLOCKS, resting=resting(*nets, "policy", "adapters", "embeddings"),
    )  # fmt: skip
    yield _rollout(config, pipeline, shapes, resting(*nets))
    # Each turn decodes and scores some videos; all that was drawn rests meanwhile, and the 3D
    # network stays awake until the turns are over.
    kept = resting("text", "vae", "policy", "adapters", "moments", *drawn)
    yield Lowering(
        "decode", lambda: pipeline._decode.trace(pipeline._vae_state, shapes.some_latents),
        times=shapes.turns, resting=kept - sizes["vae"] + sizes["awake"],
    )  # fmt: skip
    yield from _rewards(config, reward, shapes, kept, sizes)
    yield _update(config, pipeline, shapes, state, resting("text", "vae", "rewards"))
    yield Lowering(
        "restore", lambda: checkpoint.digests_of.trace(jax.tree.leaves(state)), times=0,
        resting=resting("text", "vae", "policy", "rewards"),
    )  # fmt: skip


def _rollout(config, pipeline: Pipeline, shapes: Shapes, resting: int) -> Lowering:
    linear, scores, branches = _forward(config, pipeline)
    return Lowering(
        "rollout",
        lambda: pipeline._rollout.trace(
            pipeline.adapters, pipeline.base, shapes.text, shapes.null, shapes.paths, shapes.keys,
            shapes.start, None, None, sampler=settings.make_sampler(config),
            width=config.sample.window,
        ),
        needed=config.sample.steps * shapes.count * branches * (linear + scores)
        / pipeline.mesh.size,
        resting=resting,
    )  # fmt: skip


def _rewards(
    config, reward: Reward, shapes: Shapes, resting: int, sizes: dict
) -> Iterator[Lowering]:
    """Reconstruction, S_recon with its renderer and its measure, S_traj, and R_gen; a turn each."""
    yield Lowering(
        "reconstruct",
        lambda: reward._reconstruct.trace(reward._state, shapes.some),
        needed=_reconstruct_flops(config, shapes.some) / reward.mesh.size,
        times=shapes.turns, resting=resting + sizes["awake"] - sizes["da3"],
    )  # fmt: skip
    resting += sizes["awake"]
    # Shaped here, where no mesh is set: the network makes constants, and these devices hold none.
    made = jax.eval_shape(reward._reconstruct, reward._state, shapes.some)
    found = jax.tree.map(partial(_described, place=shapes.batch), made)
    yield Lowering(
        "render",
        lambda: reward._recon.trace(reward._lpips_state, shapes.some, found, shapes.asked),
        turns=RENDER_ROUNDS, times=shapes.turns, resting=resting,
    )  # fmt: skip
    # What was found outlives its render.
    yield Lowering(
        "trajectory",
        lambda: reward._trajectory.trace(shapes.asked, found.camtoworld),
        times=shapes.turns,
        resting=resting + bytes_of((shapes.some, found)) - bytes_of(found.camtoworld),
    )

    count, colors = shapes.some.shape[0], general.MAX_COLORS
    yield Lowering(
        "general",
        lambda: reward._palette.trace(
            shapes.some, shapes.of(count, colors, 3), shapes.of(count, colors)
        ),
        times=shapes.turns, resting=resting + bytes_of(found),
    )  # fmt: skip


def _reconstruct_flops(config, videos: Any) -> float:
    giant = da3.Config.giant()
    count, frames, height, width = videos.shape[:4]
    frames = -(-frames // config.rewards.frame_stride)
    size = reconstruct.processed_size(height, width, giant.process_res, giant.net.patch_size)
    return count * da3_config.flops(giant, frames, size)


def _update(config, pipeline: Pipeline, shapes: Shapes, state: Any, resting: int) -> Lowering:
    linear, scores, branches = _forward(config, pipeline)
    rules = settings.make_rules(config, sharding.batch_parts(pipeline.mesh))
    step: Any = grpo.Batch(
        shapes.states, shapes.logs, shapes.start, shapes.text, shapes.of(shapes.count),
        shapes.of(shapes.count, dtype=jnp.bool_), shapes.keys,
    )  # fmt: skip
    update = settings.make_update(config, pipeline, state)
    sigmas: Any = jax.ShapeDtypeStruct(
        (config.sample.steps + 1,), jnp.float32, sharding=shapes.whole
    )
    # Forward, backward through frozen products (as much again) and through attention (twice), and
    # the forward of the policy without adapters where there is a KL.
    once = 2 * linear + 3 * scores + (linear + scores if rules.kl_weight else 0)
    return Lowering(
        "update",
        lambda: update.trace(state, pipeline.base, step, sigmas, shapes.null),
        needed=config.sample.window * rules.epochs * shapes.count * branches * once
        / pipeline.mesh.size,
        resting=resting,
    )  # fmt: skip


def _forward(config, pipeline: Pipeline) -> tuple[float, float, int]:
    """FLOPs of a forward in products with weights and in attention; branches of guidance."""
    dit = PRESETS[config.variant]()
    tokens = wan_dit_config.tokens(dit, pipeline.latent_shape[:3])
    linear, scores = wan_dit_config.flops(dit, tokens, config.policy.text_tokens)
    return linear, scores, 2 if config.sample.guidance != 1 else 1


def _sizes(config, pipeline: Pipeline, reward: Reward, shapes: Shapes, state: Any) -> dict:
    """Bytes on each device of what stages leave there; 0 for networks that rest on the hosts."""
    sizes = {
        "text": bytes_of(pipeline._text._state),
        "vae": bytes_of(pipeline._vae_state),
        "policy": bytes_of(pipeline.base),
        "rewards": bytes_of((reward._state, reward._lpips_state)),
    }
    sizes |= dict.fromkeys(config.idle_on_host, 0)
    adapters = bytes_of(pipeline.adapters)
    return sizes | {
        "da3": bytes_of(reward._state),
        # The 3D network is, from the first turn to the last, and LPIPS where it has no other place.
        "awake": max(bytes_of(reward._state), sizes["rewards"]),
        "adapters": adapters,
        "moments": bytes_of(state) - adapters,
        "embeddings": bytes_of((shapes.text, shapes.null)),
        "trajectory": bytes_of((shapes.states, shapes.latents)),
    }


def _over(
    mesh: jax.sharding.Mesh, shape: tuple[int, ...], *axes: str | None, dtype: Any = jnp.float32
) -> Any:
    """A described array by what its axes are (see `sharding.spec_for`)."""
    place = jax.sharding.NamedSharding(mesh, sharding.spec_for(shape, axes, mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def bytes_of(tree: Any) -> int:
    """Bytes of a described tree on each device, without the padding of its layout there."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _described(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _abstract(make: Callable[[], nnx.Module], places: Any, mesh: jax.sharding.Mesh) -> Any:
    return sharding.describe(nnx.eval_shape(make), places, mesh)


def _like(adapters: Any, state: Any, whole: Any) -> Any:
    """Places for a train state: moments and average lie where their adapter lies."""
    by_shape = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(adapters)}
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=by_shape.get(x.shape, whole) if x.ndim else whole
        ),
        state,
    )  # fmt: skip
