"""Plans an update for chips that are not there: the real programs, from shapes alone, through the
TPU compiler.

The compiler gives memory per device exactly, an estimate of the cycles of most XLA operations, and
the schedule of Pallas kernels (schedule.py). What it does not estimate is modelled, and said so:
gathers, scatters and sorts at cycles of plan/splat_cost.py, collectives at what one device sends
over the links of the axes that they span (chips.Links), and loops whose number of turns depends on
the data at a stated number (programs.py). None of this project's programs has met a chip; ERRORS
says how far each part may be off. Waiting of the host, transfers to and from it, and stragglers are
in no figure.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from pathlib import Path
from typing import Any

import jax

from worldr1_jax import settings
from worldr1_jax.mesh import compiler
from worldr1_jax.mesh.arrays import bytes_on_device
from worldr1_jax.mesh.chips import CHIPS, Chip, Links, generation
from worldr1_jax.plan import flops as cost
from worldr1_jax.plan import hlo as plan_hlo
from worldr1_jax.plan import programs as plan_programs
from worldr1_jax.plan import schedule
from worldr1_jax.plan.programs import Lowering
from worldr1_jax.settings import Settings

# By what share of itself a part may be off, either way. XLA's: two programs of maxdiffusion,
# planned by this method, were within 5% of what was measured of them; kernels': see schedule.py;
# the others' are judgements, for want of a measurement, as is GUESSED, of whole programs whose
# loops have a stated number of turns.
ERRORS = {"xla": 0.05, "moving": 0.5, "kernels": schedule.ERROR, "interconnect": 0.5}
GUESSED = 0.5
MOST = 2**16  # chips of a topology: describing a million takes minutes
_NAME = re.compile(r"([1-9]\d*\*)?\w+:\d+(x\d+)*(_twisted|_untwisted)?")  # of a topology


@dataclasses.dataclass(frozen=True)
class Program:
    """What the plan says of one program; bytes, FLOPs and seconds of one device.

    Attributes:
      name: of the stage.
      times: runs in one update; 0 for what runs when a job starts.
      hbm_peak_bytes: arguments, results and temporaries, and what other stages keep on the device
        meanwhile (hbm_resting_bytes of it); hbm_limit_bytes: what the chip has.
      flops: of matrix products and kernels that run, recomputation included.
      hbm_bytes, ici_bytes: traffic with memory, and sent to other devices, of one run.
      seconds: of one run; terms: of it in XLA operations, in moving rows, in kernels and in
        collectives. error: by how much the seconds may be off, all parts the same way.
      unknown: kernels without a schedule, of which the traffic with memory alone is counted.
      bound: the largest term.
      mfu: FLOPs that the mathematics needs, recomputation not counted, over time and peak.
      compile_seconds: on the machine that planned.
      collectives: bytes sent, by kind.
    """

    name: str
    times: int
    hbm_peak_bytes: int
    hbm_resting_bytes: int
    hbm_limit_bytes: int
    flops: float
    hbm_bytes: int
    ici_bytes: int
    seconds: float
    error: float
    bound: str
    mfu: float
    compile_seconds: float
    terms: dict[str, float]
    collectives: dict[str, int]
    unknown: tuple[str, ...] = ()


def topology_devices(name: str) -> list[Any]:
    """Described devices of a topology such as "v5p:4x4x4", "v5e:1x1", or "2*v5e:4x4" (two slices).

    Raises:
      ValueError: a chip that is not in CHIPS, no such name or more than MOST chips, libtpu is
        missing, or it knows no such topology.
    """
    slices, _, shape = name.rpartition("*")
    chip, _, grid = shape.partition(":")
    if chip not in CHIPS:
        raise ValueError(f"topology '{name}' is of no chip known here: {', '.join(CHIPS)}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"topology '{name}' is none: give one as v5p:4x4x4 or 2*v5e:16x16")
    sides = map(int, grid.partition("_")[0].split("x"))
    if int(slices or 1) * math.prod(sides) > MOST:
        raise ValueError(f"topology '{name}' has more than {MOST} chips, which nobody has planned")
    from jax.experimental import topologies

    compiler.set_flags()
    schedule.watch()
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


def mesh_for(found: Settings, devices: list[Any]) -> jax.sharding.Mesh:
    """The trainer's mesh on these devices."""
    shape = plan_programs.FAMILY.published(_published(found))
    return settings.make_mesh(found, devices, shape.work(found.run.size, found.policy.text_tokens))


def _published(found: Settings) -> str:
    """The variant; ValueError for one without published size."""
    known = plan_programs.FAMILY.SIZES
    if found.run.variant not in known:
        raise ValueError(
            f"variant '{found.run.variant}' has no pod to plan: it is {' or '.join(known)}"
        )
    return found.run.variant


def plan(
    found: Settings,
    mesh: jax.sharding.Mesh,
    *,
    only: tuple[str, ...] = (),
    hlo: str = "",
) -> list[Program]:
    """Compiles the programs, or those named in `only`, for the mesh's described devices.

    Args:
      hlo: folder into which the compiled programs' text is written; "" for none.

    Raises:
      ValueError: an unknown name in `only`, a variant without published size, or a program that
        the compiler refuses, with what it says of memory.
    """
    _published(found)
    planned, names = [], []
    for lowering in plan_programs.lowerings(found, mesh):
        names.append(lowering.program.name)
        if not only or names[-1] in only:
            planned.append(_compile(lowering, mesh, hlo))
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"there is no program '{unknown[0]}' to plan: {', '.join(names)}")
    return planned


def _compile(lowering: Lowering, mesh: jax.sharding.Mesh, hlo: str) -> Program:
    asked, began = lowering.program, time.perf_counter()
    schedule.clear()
    try:
        with jax.set_mesh(mesh):
            traced = lowering.program.trace()
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        lines = [line for line in str(error).splitlines() if "hbm" in line.lower()] or [str(error)]
        raise ValueError(f"{asked.name} does not fit: {' '.join(lines[:3])[:400]}") from error
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    # What lies there for a program counts whether it reads it or not.
    arguments = max(memory.argument_size_in_bytes, bytes_on_device(asked.inputs))
    peak = (
        arguments + memory.output_size_in_bytes
        - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    )  # fmt: skip
    text = compiled.as_text()
    if hlo:
        Path(hlo).mkdir(parents=True, exist_ok=True)
        (Path(hlo) / f"{asked.name}.txt").write_text(text)
    chip = CHIPS[generation(mesh.devices.flat[0].device_kind)]
    kernels = schedule.found(plan_hlo.kernel_names(text), chip.rows)
    ops = plan_hlo.read(text, lowering.turns, kernels)
    products = cost.jaxpr_flops(traced.jaxpr.jaxpr) / mesh.size
    found = program(
        asked.name, ops, chip,
        Links.of(mesh.devices.flat), asked.needed / mesh.size or products, products, peak, seconds,
    )  # fmt: skip
    return dataclasses.replace(
        found, times=asked.times, hbm_resting_bytes=lowering.resting,
        hbm_peak_bytes=found.hbm_peak_bytes + lowering.resting,
        error=found.error if lowering.turns is None else GUESSED * found.seconds,
    )  # fmt: skip


def program(
    name: str, ops: list[plan_hlo.Op], chip: Chip, links: Links,
    needed: float, products: float, peak: int, compile_seconds: float,
) -> Program:  # fmt: skip
    """The figures of a program from its operations; see `Program`."""
    terms = dict.fromkeys(ERRORS, 0.0)
    sent: dict[str, int] = {}
    for op in ops:
        if op.kind in ("xla", "moving"):
            terms[op.kind] += op.times * op.cycles / chip.clock
        elif op.kind in ("kernel", "unknown"):
            terms["kernels"] += op.times * max(op.bytes / chip.bandwidth, op.cycles / chip.clock)
        else:
            alone = links.seconds(op.kind, op.bytes, op.group, chip.link) - op.cover / chip.clock
            terms["interconnect"] += op.times * max(alone, 0.0)
            sent[op.kind] = sent.get(op.kind, 0) + op.times * op.bytes
    total = sum(terms.values())
    at_core = ("xla", "moving", "kernel", "unknown")
    return Program(
        name=name, times=1, hbm_peak_bytes=int(peak), hbm_resting_bytes=0,
        hbm_limit_bytes=int(chip.hbm), flops=products,
        hbm_bytes=sum(op.bytes * op.times for op in ops if op.kind in at_core),
        ici_bytes=sum(sent.values()), seconds=total,
        error=sum(ERRORS[name] * seconds for name, seconds in terms.items()),
        bound=max(terms, key=lambda t: terms[t]),
        mfu=needed / (total * chip.peak) if total else 0.0,
        compile_seconds=compile_seconds, terms=terms, collectives=sent,
        unknown=tuple(op.name for op in ops if op.kind == "unknown"),
    )  # fmt: skip


def table_row(variant: str, topology: str, mesh: jax.sharding.Mesh, programs: list[Program]) -> str:
    """The plan as a row of a table: the largest program and its bytes a device, seconds
    and chip-hours of an update, MFU of rollout and update, and seconds to compile them all."""
    found = report(topology, mesh, programs)
    largest = max(programs, key=lambda p: p.hbm_peak_bytes)
    mfu = {p.name: f"{p.mfu:.0%}" for p in programs}
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    cells = (
        variant, topology, sizes or "one device", largest.name,
        f"{largest.hbm_peak_bytes / 1e9:.1f} of {largest.hbm_limit_bytes / 1e9:.1f} GB",
        f"{found['seconds_per_update']:.0f} ± {found['error']:.0f} s",
        f"{found['chip_hours_per_update']:.1f}",
        f"{mfu.get('rollout', '-')} / {mfu.get('update', '-')}",
        f"{sum(p.compile_seconds for p in programs):.0f} s",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def report(topology: str, mesh: jax.sharding.Mesh, programs: list[Program]) -> dict[str, Any]:
    """What `--json` prints: figures of a program are those of all its runs in one update, and of
    one run where there is none."""

    def row(p: Program) -> dict[str, Any]:
        times = max(p.times, 1)
        return {
            "name": p.name, "hbm_peak_bytes": p.hbm_peak_bytes,
            "hbm_limit_bytes": p.hbm_limit_bytes, "flops": p.flops * times,
            "hbm_bytes": p.hbm_bytes * times, "ici_bytes": p.ici_bytes * times,
            "seconds": p.seconds * times, "error": p.error * times, "bound": p.bound,
            "mfu": p.mfu, "compile_seconds": p.compile_seconds, "unknown": list(p.unknown),
        }  # fmt: skip

    seconds = sum(p.seconds * p.times for p in programs)
    chip = CHIPS[generation(mesh.devices.flat[0].device_kind)]
    return {
        "topology": topology,
        "devices": mesh.size,
        "programs": [row(p) for p in programs],
        "seconds_per_update": seconds,
        "error": sum(p.error * p.times for p in programs),
        "chip_hours_per_update": seconds * mesh.size / chip.per_chip / 3600,
    }
