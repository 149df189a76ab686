"""Reads what the TPU compiler says about a compiled program: cycles, bytes, collectives, loops.

The text of a compiled module gives every XLA operation the compiler's own estimate of its cycles,
and every loop its number of turns. What carries no estimate is modelled here: collectives, by their
bytes and the links of the chip; Pallas kernels, by their arithmetic, or the renderer's by its
steps; gathers and scatters by their rows, and sorts by their keys (plan/splat_cost.py).
All figures are for one device and for one run of the program, loops multiplied out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from worldr1_jax.plan import splat_cost
from worldr1_jax.splat import kernel as tile_kernel

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
)  # fmt: skip
# Products of [N D] by [D M] size that each kernel of jax's splash attention makes for a head:
# logits and output; logits, their gradient, and dv, dk; logits, their gradient, and dq.
KERNEL_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}

_SHAPE = re.compile(r"\b([a-z]\w*?)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_KERNEL = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)")
_LIMIT = re.compile(r"= [su]32\[\][^ ]* constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_NAMED_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_DIMENSIONS = re.compile(r"dimensions=\{([\d,]*)\}")
_SLICES = re.compile(r"slice_sizes=\{([\d,]*)\}")
_WINDOW = re.compile(r"update_window_dims=\{([\d,]*)\}")
_UNKNOWN = 2**63 - 1  # what stands for an estimate that the compiler does not have
_STARTS = re.compile(rf"(async-collective|{'|'.join(COLLECTIVES)})-start")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction, with how often it runs.

    Attributes:
      name: in the compiled text.
      kind: "xla", "kernel", or one of COLLECTIVES.
      times: how often it runs in one run of the program.
      cycles: the compiler's estimate for one time, or that of splat_cost.py where it has none; 0
        for collectives and attention kernels.
      bytes: HBM traffic of one time (operands and results that do not lie in the core's memory; of
        gathers, scatters and sorts what they move); of a collective, what one device sends.
      flops: of a kernel.
      group: devices that a collective joins.
      source: the operation's name in the traced program.
      cover: of a collective, cycles of the XLA operations that run while it is under way; those
        that are under way together share them.
    """

    name: str
    kind: str
    times: int
    cycles: int
    bytes: int
    flops: float
    group: int
    source: str
    cover: int = 0


def read(text: str, turns: int | None = None) -> list[Op]:
    """Every operation of the module that takes time.

    Args:
      turns: of loops whose number of turns depends on the data; None takes none of these.

    Raises:
      ValueError: a loop without a known number of turns, unless its body takes no time.
    """
    computations, entry = _computations(text)
    return list(_walk(computations, entry, 1, turns))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and "(" in line:
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            current = found.setdefault(name, [])
            if line.startswith("ENTRY"):
                entry = name
        elif line == "}":
            current = None
        elif current is not None and _INSTRUCTION.match(line):
            current.append(line)
        elif current:
            current[-1] += line  # a kernel's metadata has line breaks
    return found, entry


def _walk(
    computations: dict[str, list[str]], name: str, times: int, unknown: int | None
) -> Iterator[Op]:
    shapes: dict[str, str] = {}
    covers = _covers(computations[name])
    for line in computations[name]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result, rest = match.groups()
        opcode_match = _OPCODE.search(rest)
        if opcode_match is None:
            continue
        opcode = opcode_match.group(1)
        shapes[result] = rest[: opcode_match.start(1)]
        operands = _operands(rest[opcode_match.end() :])
        if opcode == "while":
            inner = list(_walk(computations, _called(rest, "body"), 1, unknown))
            turns = _turns(rest, computations[_called(rest, "condition")])
            turns = unknown if turns is None else turns
            if turns is None and inner:
                raise ValueError(f"the loop {result} has no known number of turns")
            count = times * (turns or 0)
            yield from (dataclasses.replace(op, times=op.times * count) for op in inner)
        elif opcode == "conditional":
            branches = [list(_walk(computations, b, times, unknown)) for b in _branches(rest)]
            yield from max(branches, key=lambda ops: sum(op.cycles * op.times for op in ops))
        elif opcode == "call":
            yield from _walk(computations, _called(rest, "to_apply"), times, unknown)
        elif opcode == "async-start":
            yield from _walk(computations, _called(rest, "calls"), times, unknown)
        elif opcode not in _FREE:
            for op in _op(computations, result, opcode, rest, shapes, operands, times):
                yield dataclasses.replace(op, cover=covers.get(op.name, 0))


def _covers(lines: list[str]) -> dict[str, int]:
    """Cycles between the start of each asynchronous collective and its end, in schedule order.
    Those that are under way together share them, as they may share links."""
    begins, spans = dict[str, int](), dict[str, range]()
    work = list[tuple[int, int]]()
    for place, line in enumerate(lines):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, rest = match.groups()
        cycles = _CYCLES.search(rest)
        if _STARTS.match(name):
            begins[name] = place
        elif "-done" in name:
            start = name.replace("-done", "-start")
            if start in begins:
                spans[start] = range(begins[start], place)
        elif cycles and int(cycles.group(1)) != _UNKNOWN:
            work.append((place, int(cycles.group(1))))
    found = dict.fromkeys(spans, 0.0)
    for place, cycles_there in work:
        under_way = [start for start, span in spans.items() if place in span]
        for start in under_way:
            found[start] += cycles_there / len(under_way)
    return {start: int(cover) for start, cover in found.items()}


def _turns(rest: str, condition: list[str]) -> int | None:
    """Of a loop that counts from 0 while it is below a constant, as scans are compiled. One that
    looks at more than its counter may end earlier: its constant is a bound."""
    match = _TURNS.search(rest)
    if match:
        return int(match.group(1))
    limits = [m.group(1) for m in map(_LIMIT.search, condition) if m]
    if sum(" get-tuple-element(" in line for line in condition) > 1:
        return None
    return int(limits[0]) if len(limits) == 1 else None


def _op(computations, result, opcode, rest, shapes, operands, times) -> Iterator[Op]:
    source = re.search(r'op_name="([^"]*)"', rest)
    cycles = _CYCLES.search(rest)
    base = opcode.removesuffix("-start")
    kind, flops, group, count = "xla", 0.0, 1, int(cycles.group(1)) if cycles else 0
    traffic = _bytes(shapes[result]) + sum(_bytes(shapes.get(name, "")) for name in operands)
    if opcode.endswith("-done") or opcode.endswith("-update"):
        return
    collective = base if base in COLLECTIVES else _inner_collective(computations, opcode, rest)
    if opcode == "fusion" and result.startswith("async-collective-done"):
        return
    # An operation fused with a step of a collective under way has cycles of its own; the
    # collective is counted where it starts.
    if collective and (opcode != "fusion" or "-start" in result or not count):
        kind, count = collective, 0
        group = _group(rest) or _inner_group(computations, rest)
        traffic = sent(kind, max(_sizes(shapes[result]), default=0), group)
    elif opcode == "custom-call" and "tpu_custom_call" in rest:
        inputs = [shapes.get(name, "") for name in operands]
        kind, count = "kernel", _kernel_cycles(result, shapes[result], inputs)
        flops = _kernel_flops(result, shapes[result], inputs)
    elif count in (0, _UNKNOWN):
        estimated = count == 0
        cycles_of, moved = _moving(computations, opcode, rest, shapes, operands)
        count, traffic = int(cycles_of), moved or traffic
        if not count and estimated:
            return
    name = source.group(1) if source else ""
    yield Op(result, kind, times, count, traffic, flops, group, name)


def sent(kind: str, size: int, group: int) -> int:
    """Bytes that one device sends in a collective whose result on it has `size` bytes."""
    if group <= 1 and kind != "collective-permute":
        return 0
    share = {
        "all-gather": (group - 1) / group,
        "reduce-scatter": group - 1,  # the operand is `group` times the result
        "all-reduce": 2 * (group - 1) / group,
        "all-to-all": (group - 1) / group,
        "collective-permute": 1,
    }
    return int(size * share[kind])


def _inner_collective(computations, opcode, rest) -> str | None:
    """The collective that a fusion wraps, if any."""
    if opcode != "fusion":
        return None
    for line in computations.get(_called(rest, "calls"), ()):
        for name in COLLECTIVES:
            if f" {name}(" in line or f" {name}-start(" in line:
                return name
    return None


def _inner_group(computations, rest) -> int:
    lines = computations.get(_called(rest, "calls"), ()) if "calls=" in rest else ()
    return max((_group(line) for line in lines), default=1) or 1


def _group(rest: str) -> int:
    match = _GROUPS.search(rest)
    if match:
        return int(match.group(2))
    match = _NAMED_GROUPS.search(rest)
    if match:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match.group(2)))
    match = _LISTED_GROUP.search(rest)
    return len(match.group(1).split(",")) if match else 0


def _kernel_flops(name: str, result: str, operands: list[str]) -> float:
    """Of jax's splash attention, from the shapes of its [heads N D] operands; else 0."""
    match = _KERNEL.search(name)
    if match is None:
        return 0.0
    shapes = [s for s in (_dimensions(text) for text in operands) if len(s) >= 3 and s[-1] >= 64]
    query, key = shapes[0], shapes[1]
    products = KERNEL_PRODUCTS[match.group(1)]
    if any(dims.count(",") > 2 for _, dims, _ in _SHAPE.findall(result)):
        products += 1  # the kernel of dk and dv gives dq as well, apart for each block of keys
    return 2.0 * products * math.prod(query) * key[-2]


def _kernel_cycles(name: str, result: str, operands: list[str]) -> int:
    """Of the renderer's kernel, a step for each chunk of its first operand; else 0."""
    if not name.startswith(tile_kernel.NAME):
        return 0
    steps, pixels = _dimensions(operands[0])[0], _dimensions(result)[-1]
    return int(splat_cost.KERNEL_CYCLES * steps * pixels / 256)


def _moving(computations, opcode, rest, shapes, operands) -> tuple[float, int]:
    """Cycles and bytes of sorts, gathers and scatters, alone or in a fusion; 0 of all else."""
    lines = [f" x = {rest}"]
    if opcode == "fusion":
        lines = computations.get(_called(rest, "calls"), [])
    known, cycles, moved = dict(shapes), 0.0, 0
    for line in lines:
        match = _INSTRUCTION.match(line)
        inner = _OPCODE.search(match.group(2)) if match else None
        if match is None or inner is None:
            continue
        known[match.group(1)] = made = match.group(2)[: inner.start(1)]
        names = _operands(match.group(2)[inner.end() :])
        if inner.group(1) == "sort":
            dims = _dimensions(known.get(names[0], ""))
            keys = dims[int(_numbers(_DIMENSIONS, line)[0])] if dims else 1
            cycles += math.prod(dims) / keys * splat_cost.sort_cycles(keys)
            moved += 2 * _bytes(made)
        elif inner.group(1) == "gather":
            rows = math.prod(_dimensions(made)) / math.prod(_numbers(_SLICES, line))
            cycles += splat_cost.GATHER_CYCLES * rows
            moved += 2 * _bytes(made)
        elif inner.group(1) == "scatter":
            update = known.get(names[-1], "")
            kept = _numbers(_WINDOW, line)
            rows = math.prod(n for axis, n in enumerate(_dimensions(update)) if axis not in kept)
            cycles += splat_cost.GATHER_CYCLES * rows
            moved += 2 * _bytes(update)
    return cycles, moved


def _numbers(pattern: re.Pattern, line: str) -> list[int]:
    found = pattern.search(line)
    return [int(n) for n in found.group(1).split(",") if n] if found else []


def _operands(rest: str) -> list[str]:
    """Names up to the parenthesis that closes the one before `rest`."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return re.findall(r"%([\w.\-]+)", rest[:place])
    return []


def _called(rest: str, field: str) -> str:
    match = re.search(rf"\b{field}=%?([\w.\-]+)", rest)
    return match.group(1) if match else ""


def _branches(rest: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if listed:
        return [name.strip().lstrip("%") for name in listed.group(1).split(",")]
    return [_called(rest, "true_computation"), _called(rest, "false_computation")]


def _dimensions(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    return [int(n) for n in match.group(2).split(",") if n] if match else []


def _sizes(shape: str) -> list[int]:
    return [
        math.prod(int(n) for n in dims.split(",") if n) * BYTES.get(kind, 0)
        for kind, dims, _ in _SHAPE.findall(shape)
    ]


def _bytes(shape: str) -> int:
    """Bytes of a shape's parts that lie in HBM; S(n > 0) marks the core's own memories."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * BYTES.get(kind, 0)
        for kind, dims, layout in _SHAPE.findall(shape)
        if not re.search(r"S\([1-9]\)", layout)
    )
