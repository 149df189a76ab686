"""Plans an update for chips that are not there: the real programs, from shapes alone, through the
TPU compiler.

The compiler gives memory per device exactly, and an estimate of the cycles of each XLA operation.
What it does not estimate is modelled, and said so: Pallas kernels run at EFFICIENCY of the peak,
collectives at what one device sends over the links of the torus axes that they span. Nothing here
was measured on a chip. Waiting of the host, data transfer and stragglers are not in it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from worldr1_jax import cost, plan_hlo, settings, sharding
from worldr1_jax.chips import CHIPS, EFFICIENCY, Chip
from worldr1_jax.grpo import update as grpo
from worldr1_jax.models import attention, lora, umt5, wan_dit, wan_vae
from worldr1_jax.models.attention_kernels import generation
from worldr1_jax.models.wan import Wan
from worldr1_jax.pipeline import Pipeline
from worldr1_jax.rollout import schedule

PRESETS = {"small": wan_dit.Config.wan_1_3b, "large": wan_dit.Config.wan_14b}


@dataclasses.dataclass(frozen=True)
class Program:
    """What the plan says of one program; bytes, FLOPs and seconds of one device.

    Attributes:
      name: of the stage.
      times: runs in one update.
      hbm_peak_bytes: arguments, results and temporaries; hbm_limit_bytes: what the chip has.
      flops: of matrix products and kernels that run, recomputation included.
      hbm_bytes, ici_bytes: traffic with memory, and sent to other devices, of one run.
      seconds: of one run; terms: of it in XLA operations, kernels and collectives.
      bound: the largest term.
      mfu: FLOPs that the mathematics needs, recomputation not counted, over time and peak.
      compile_seconds: on the machine that planned.
      collectives: bytes sent, by kind.
    """

    name: str
    times: int
    hbm_peak_bytes: int
    hbm_limit_bytes: int
    flops: float
    hbm_bytes: int
    ici_bytes: int
    seconds: float
    bound: str
    mfu: float
    compile_seconds: float
    terms: dict[str, float]
    collectives: dict[str, int]


def topology_devices(name: str) -> list[Any]:
    """Described devices of a topology such as "v5p:4x4x4", "v5e:1x1", or "2*v5e:4x4" (two slices).

    Raises:
      ValueError: libtpu is missing, or it knows no such topology.
    """
    from jax.experimental import topologies

    slices, _, shape = name.rpartition("*")
    options: dict[str, Any] = {"num_slices": int(slices)} if slices else {}
    if shape.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(topology_name=shape, platform="tpu", **options)
    except (RuntimeError, OSError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise ValueError(
            f"topology '{name}' cannot be planned ({reason}): it needs 'jax[tpu]' and a name "
            "such as v5p:4x4x4"
        ) from error
    return list(found.devices)


def mesh_for(config: ml_collections.ConfigDict, devices: list[Any]) -> jax.sharding.Mesh:
    """The trainer's mesh on these devices."""
    return settings.make_mesh(config, PRESETS[config.variant](), devices)


def abstract_pipeline(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Pipeline:
    """The trainer's pipeline with leaves that have a shape, a dtype and a place, but no values."""
    kind = mesh.devices.flat[0].device_kind
    context = "ulysses"
    heads = PRESETS[config.variant]().num_attention_heads
    if heads // mesh.shape["tensor"] % mesh.shape["context"]:
        context = "ring"
    implementation = attention.build(f"{context}:splash", device_kind=kind)
    dtype = jnp.dtype(config.policy.dtype)

    def make_dit() -> nnx.Module:
        dit = wan_dit.WanDiT(
            PRESETS[config.variant](), nnx.Rngs(0), dtype=dtype, param_dtype=dtype,
            remat=config.policy.remat, implementation=implementation,
        )  # fmt: skip
        return lora.add(dit, config.policy.lora_rank, config.policy.lora_alpha, nnx.Rngs(1))

    dit = _placed(nnx.eval_shape(make_dit), "wan_dit", mesh)
    vae = _placed(
        nnx.eval_shape(lambda: wan_vae.WanVAE(wan_vae.Config.wan2_1(), nnx.Rngs(0))),
        "wan_vae", mesh,
    )  # fmt: skip
    text = nnx.eval_shape(
        lambda: umt5.UMT5Encoder(umt5.Config.xxl(), nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    )
    s = config.sample
    sigmas: Any = np.asarray(schedule.sigmas(s.steps, s.shift))  # no device to put it on
    wan = Wan(dit, vae, _placed(text, "umt5", mesh), None, config.policy.text_tokens)
    return Pipeline(
        wan, mesh, size=(config.frames, config.height, config.width),
        sigmas=sigmas, camera=settings.make_camera(config),
        chunked_vae=config.policy.chunked_vae, videos_at_once=config.sample.videos_at_once,
    )  # fmt: skip


def lowerings(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Name, what traces it, and the FLOPs that one run's mathematics needs on each device; 0 where
    that is what runs."""
    pipeline = abstract_pipeline(config, mesh)
    dit = PRESETS[config.variant]()
    count, width = config.groups * config.group_size, config.sample.window
    batch, whole = sharding.batched(mesh), sharding.replicated(mesh)
    shape: Callable[..., Any] = partial(jax.ShapeDtypeStruct, sharding=batch)
    text = shape((count, config.policy.text_tokens, dit.text_dim), jnp.float32)
    null: Any = jax.ShapeDtypeStruct(text.shape[1:], jnp.float32, sharding=whole)
    null = null if config.sample.guidance != 1 else None
    keys = shape((count,), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    paths = shape((count, config.frames, 4, 4), jnp.float32)
    latents = shape((count, *pipeline.latent_shape), jnp.float32)
    start: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    sampler = settings.make_sampler(config)
    tokens = wan_dit.tokens(dit, pipeline.latent_shape[:3])
    linear, scores = wan_dit.flops(dit, tokens, config.policy.text_tokens)
    branches = count * (2 if config.sample.guidance != 1 else 1)
    pipeline.camera = dataclasses.replace(pipeline.camera, mode="none")  # planned apart, as warp

    yield (
        "rollout",
        lambda: pipeline._rollout.trace(
            pipeline.adapters, pipeline.base, text, null, paths, keys, start, None, None,
            sampler=sampler, width=width,
        ),
        config.sample.steps * branches * (linear + scores) / mesh.size,
    )  # fmt: skip
    states: Any = jax.ShapeDtypeStruct(
        (width + 1, *latents.shape), jnp.float32,
        sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *batch.spec)),
    )  # fmt: skip
    logs: Any = jax.ShapeDtypeStruct((width, count), jnp.float32, sharding=states.sharding)
    step = grpo.Batch(
        states, logs, start, text, shape((count,), jnp.float32), shape((count,), jnp.bool_), keys
    )
    rules = settings.make_rules(config, sharding.batch_parts(mesh))
    optimizer = settings.make_optimizer(config)
    sigmas = jax.ShapeDtypeStruct((config.sample.steps + 1,), jnp.float32, sharding=whole)
    state = _like(pipeline.adapters, jax.eval_shape(
        partial(grpo.init_state, optimizer=optimizer), pipeline.adapters), whole)  # fmt: skip
    update = jax.jit(
        partial(grpo.train_step, velocity=pipeline.velocity, optimizer=optimizer, sampler=sampler,
                rules=rules),
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
        donate_argnums=0,
    )  # fmt: skip
    # Forward, backward through frozen products (as much again) and through attention (twice), and
    # the forward of the policy without adapters where there is a KL.
    once = 2 * linear + 3 * scores + (linear + scores if rules.kl_weight else 0)
    yield (
        "update",
        lambda: update.trace(state, pipeline.base, step, sigmas, null),
        width * rules.epochs * branches * once / mesh.size,
    )
    ids = shape((count, config.policy.text_tokens), jnp.int32)
    yield "text", lambda: pipeline._text._run.trace(pipeline._text._state, ids, ids), 0.0
    yield "decode", lambda: pipeline._decode.trace(pipeline._vae_state, latents), 0.0


def plan(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    *,
    only: tuple[str, ...] = (),
    efficiency: float | None = None,
    hlo: str = "",
) -> list[Program]:
    """Compiles the programs, or those named in `only`, for the mesh's described devices.

    Args:
      efficiency: share of the peak that attention kernels reach; None takes the table's.
      hlo: folder into which the compiled programs' text is written; "" for none.

    Raises:
      ValueError: an unknown name in `only`, a variant without published size, or a program that
        the compiler refuses, with what it says of memory.
    """
    if config.variant not in PRESETS:
        raise ValueError(f"variant '{config.variant}' has no pod to plan: {' or '.join(PRESETS)}")
    found, names = [], []
    for name, trace, needed in lowerings(config, mesh):
        names.append(name)
        if not only or name in only:
            found.append(_compile(name, trace, needed, mesh, efficiency, hlo))
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"there is no program '{unknown[0]}' to plan: {', '.join(names)}")
    return found


def _compile(name, trace, needed, mesh, efficiency, hlo) -> Program:
    kind = generation(mesh.devices.flat[0].device_kind)
    chip, share = CHIPS[kind], efficiency or EFFICIENCY[kind]
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            traced = trace()
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        lines = [line for line in str(error).splitlines() if "hbm" in line.lower()] or [str(error)]
        raise ValueError(f"{name} does not fit: {' '.join(lines[:3])[:400]}") from error
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    )  # fmt: skip
    text = compiled.as_text()
    if hlo:
        Path(hlo).mkdir(parents=True, exist_ok=True)
        (Path(hlo) / f"{name}.txt").write_text(text)
    ops = plan_hlo.read(text)
    products = cost.jaxpr_flops(traced.jaxpr.jaxpr) / mesh.size
    return program(name, ops, chip, share, mesh.size, needed or products, products, peak, seconds)


def program(
    name: str, ops: list[plan_hlo.Op], chip: Chip, efficiency: float, devices: int,
    needed: float, products: float, peak: int, compile_seconds: float,
) -> Program:  # fmt: skip
    """The figures of a program from its operations; see `Program`."""
    terms = {"xla": 0.0, "kernels": 0.0, "interconnect": 0.0}
    sent: dict[str, int] = {}
    for op in ops:
        if op.kind == "xla":
            terms["xla"] += op.times * op.cycles / chip.clock
        elif op.kind == "kernel":
            terms["kernels"] += op.times * max(
                op.flops / (efficiency * chip.peak), op.bytes / chip.bandwidth
            )
        else:
            axes = chip.axes if op.group == devices else 1
            alone = op.bytes / (2 * axes * chip.link) - op.cover / chip.clock
            terms["interconnect"] += op.times * max(alone, 0.0)
            sent[op.kind] = sent.get(op.kind, 0) + op.times * op.bytes
    total = sum(terms.values())
    return Program(
        name=name, times=1, hbm_peak_bytes=int(peak), hbm_limit_bytes=int(chip.hbm),
        flops=products + sum(op.flops * op.times for op in ops),
        hbm_bytes=sum(op.bytes * op.times for op in ops if op.kind in ("xla", "kernel")),
        ici_bytes=sum(sent.values()), seconds=total, bound=max(terms, key=lambda t: terms[t]),
        mfu=needed / (total * chip.peak) if total else 0.0,
        compile_seconds=compile_seconds, terms=terms, collectives=sent,
    )  # fmt: skip


def report(topology: str, mesh: jax.sharding.Mesh, programs: list[Program]) -> dict[str, Any]:
    """What `--json` prints."""
    keys = (
        "name", "hbm_peak_bytes", "hbm_limit_bytes", "flops", "hbm_bytes", "ici_bytes", "seconds",
        "bound", "mfu", "compile_seconds",
    )  # fmt: skip
    seconds = sum(p.seconds * p.times for p in programs)
    chip = CHIPS[generation(mesh.devices.flat[0].device_kind)]
    return {
        "topology": topology,
        "devices": mesh.size,
        "programs": [{key: getattr(p, key) for key in keys} for p in programs],
        "seconds_per_update": seconds,
        "chip_hours_per_update": seconds * mesh.size / chip.per_chip / 3600,
    }


def _placed(module: nnx.Module, table: str, mesh: jax.sharding.Mesh) -> Any:
    """The abstract module with the places that sharding.place would give its leaves."""
    for kind, name in ((nnx.LoRAParam, "lora"), (nnx.Not(nnx.LoRAParam), table)):
        state = nnx.state(module, nnx.All(nnx.Param, kind))
        if not jax.tree.leaves(state):
            continue
        places = sharding.shardings_of(state, name, mesh)
        nnx.update(module, jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
        ))  # fmt: skip
    return module


def _like(adapters: Any, state: Any, whole: Any) -> Any:
    """Places for a train state: moments and average lie where their adapter lies."""
    by_shape = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(adapters)}
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=by_shape.get(x.shape, whole) if x.ndim else whole
        ),
        state,
    )  # fmt: skip
