"""Reads what the TPU compiler says about a compiled program: cycles, bytes, collectives, loops.

The text of a compiled module gives every XLA operation the compiler's own estimate of its cycles,
and every loop its number of turns. What carries no estimate is found otherwise: Pallas kernels by
the compiler's schedule of them (plan/schedule.py); collectives by their bytes and the links of the
chip; gathers and scatters by their rows, and sorts by their keys (plan/splat_cost.py).
All figures are for one device and for one run of the program, loops multiplied out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from worldr1_jax.plan import splat_cost

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
)  # fmt: skip

_SHAPE = re.compile(r"\b([a-z]\w*?)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY = re.compile(r'"body":"([^"]*)"')
_LIMIT = re.compile(r"= [su]32\[\][^ ]* constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_NAMED_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_DIMENSIONS = re.compile(r"dimensions=\{([\d,]*)\}")
_SLICES = re.compile(r"slice_sizes=\{([\d,]*)\}")
_WINDOW = re.compile(r"update_window_dims=\{([\d,]*)\}")
_UNKNOWN = 2**63 - 1  # what stands for an estimate that the compiler does not have
_STARTS = re.compile(rf"(async-collective|call|{'|'.join(COLLECTIVES)})-start")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction, with how often it runs.

    Attributes:
      name: in the compiled text.
      kind: "xla"; "moving", of gathers, scatters and sorts that the compiler has no estimate of;
        "kernel", of Pallas; "unknown", a kernel without a schedule; or one of COLLECTIVES.
      times: how often it runs in one run of the program.
      cycles: for one time: the compiler's estimate, of a kernel that of its schedule, of what moves
        that of splat_cost.py; 0 for collectives and unknown kernels.
      bytes: HBM traffic of one time (operands and results that do not lie in the core's memory; of
        gathers, scatters and sorts what they move); of a collective, what one device sends.
      group: devices that a collective joins.
      source: the operation's name in the traced program.
      cover: of a collective, cycles of the operations that run while it is under way; those that
        are under way together share them.
    """

    name: str
    kind: str
    times: int
    cycles: int
    bytes: int
    group: int
    source: str
    cover: int = 0


def read(text: str, turns: int | None = None, kernels: Mapping[str, int] | None = None) -> list[Op]:
    """Every operation of the module that takes time.

    Args:
      kernels: cycles of Pallas calls by their names; equal calls are scheduled once, so that one
        name stands for all of them.
      turns: of loops whose number of turns depends on the data; None takes none of these.

    Raises:
      ValueError: a loop without a known number of turns, unless its body takes no time.
    """
    computations, entry = _computations(text)
    program = _Module(computations, turns, _alike(computations, kernels or {}))
    return list(_walk(program, entry, 1))


def kernel_names(text: str) -> set[str]:
    """Of the module's Pallas calls."""
    return {match.group(1) for match in map(_kernel, text.splitlines()) if match}


@dataclasses.dataclass(frozen=True)
class _Module:
    """Lines by computation, turns of loops that depend on the data, and cycles of kernels."""

    computations: dict[str, list[str]]
    unknown: int | None
    kernels: dict[str, int]


def _kernel(line: str) -> re.Match[str] | None:
    return _INSTRUCTION.match(line) if '"tpu_custom_call"' in line else None


def _alike(computations: dict[str, list[str]], known: Mapping[str, int]) -> dict[str, int]:
    """`known` for all calls of the same kernel with the same results."""
    calls = dict[str, str]()
    for match in (_kernel(line) for lines in computations.values() for line in lines):
        if match:
            name, rest = match.groups()
            body = _BODY.search(rest)
            calls[name] = rest.split(" custom-call(")[0] + body.group(1) if body else name
    cycles = {call: known[name] for name, call in calls.items() if name in known}
    return {name: cycles[call] for name, call in calls.items() if call in cycles}


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


def _walk(module: _Module, name: str, times: int) -> Iterator[Op]:
    shapes: dict[str, str] = {}
    computations = module.computations
    covers = _covers(computations[name], module.kernels)
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
            inner = list(_walk(module, _called(rest, "body"), 1))
            turns = _turns(rest, computations[_called(rest, "condition")])
            turns = module.unknown if turns is None else turns
            if turns is None and inner:
                raise ValueError(f"the loop {result} has no known number of turns")
            count = times * (turns or 0)
            yield from (dataclasses.replace(op, times=op.times * count) for op in inner)
        elif opcode == "conditional":
            branches = [list(_walk(module, b, times)) for b in _branches(rest)]
            yield from max(branches, key=lambda ops: sum(op.cycles * op.times for op in ops))
        elif opcode == "call":
            yield from _walk(module, _called(rest, "to_apply"), times)
        elif opcode == "call-start":  # a collective that a SparseCore sees to
            for op in _walk(module, _called(rest, "to_apply"), times):
                yield dataclasses.replace(op, cover=covers.get(result, 0))
        elif opcode == "async-start":
            yield from _walk(module, _called(rest, "calls"), times)
        elif opcode not in _FREE:
            for op in _op(module, result, opcode, rest, shapes, operands, times):
                yield dataclasses.replace(op, cover=covers.get(op.name, 0))


def _covers(lines: list[str], kernels: Mapping[str, int]) -> dict[str, int]:
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
        elif name in kernels:
            work.append((place, kernels[name]))
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


def _op(module, result, opcode, rest, shapes, operands, times) -> Iterator[Op]:
    computations = module.computations
    source = re.search(r'op_name="([^"]*)"', rest)
    cycles = _CYCLES.search(rest)
    base = opcode.removesuffix("-start")
    kind, group, count = "xla", 1, int(cycles.group(1)) if cycles else 0
    traffic = _traffic(
        computations, opcode, rest, shapes[result], [shapes.get(n, "") for n in operands]
    )
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
        kind = "kernel" if result in module.kernels else "unknown"
        count = module.kernels.get(result, 0)
    elif count in (0, _UNKNOWN):
        estimated = count == 0
        cycles_of, moved = _moving(computations, opcode, rest, shapes, operands)
        kind, count, traffic = "moving", int(cycles_of), moved or traffic
        if not count and estimated:
            return
    name = source.group(1) if source else ""
    yield Op(result, kind, times, count, traffic, group, name)


def _traffic(computations, opcode, rest, made: str, operands: list[str]) -> int:
    """Bytes of HBM that an operation moves: what it makes and reads, of an array of which it takes
    or changes a slice, such as one layer's of stacked weights, that slice."""
    read = [_bytes(shape) for shape in operands]
    if opcode == "dynamic-slice":
        return 2 * _bytes(made)
    if opcode != "fusion":
        return _bytes(made) + sum(read)
    shapes, slices, users, changed = {}, dict[str, list[int]](), dict[str, int](), 0
    places = dict[str, int]()
    for line in computations.get(_called(rest, "calls"), ()):
        match = _INSTRUCTION.match(line)
        inner = _OPCODE.search(match.group(2)) if match else None
        if match is None or inner is None:
            continue
        name, text = match.groups()
        shapes[name], kind = text[: inner.start(1)], inner.group(1)
        names = _operands(text[inner.end() :])
        if kind == "parameter":
            places[name] = int(text[inner.end() :].partition(")")[0])
        for used in names:
            users[used] = users.get(used, 0) + 1
        if kind == "dynamic-slice":
            slices.setdefault(names[0], []).append(_bytes(shapes[name]))
        elif kind == "dynamic-update-slice":
            part = _bytes(shapes.get(names[1], ""))
            slices.setdefault(names[0], []).append(0)  # what stays is not read
            changed = part if line.lstrip().startswith("ROOT") else changed
    for name, taken in slices.items():
        place = places.get(name, len(read))
        if place < len(read) and users[name] == len(taken):
            read[place] = min(read[place], sum(taken))
    return (changed or _bytes(made)) + sum(read)


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
