"""Cycles of Pallas kernels, from the schedule that the TPU compiler made for them.

XLA's operations carry an estimate of their cycles in a compiled module's text; Pallas calls carry
none. But the compiler also writes, where it is asked to, its final schedule of an operation: one
line for each bundle of instructions, which a core issues in one cycle. `watch` asks for it, while a
program compiles; `read` counts its bundles,

    cycles = FACTOR * max(sum over bundles of t, sum over products of (t * cycles of a matrix unit))
    t = turns of the loops around it * share of its branches

The second sum is of the matrix unit that is busiest: a schedule may ask for products faster than
rows are taken, and then the core waits.

- The outermost loop of a kernel is its grid, whose sizes the schedule states.
- A branch that asks for one value of a grid index (the first block, or the last) is taken in one
  turn out of that dimension's size; any other branch is counted as taken in every turn.
- What one core alone does (v4 and v5p have two, which not every kernel uses) takes as long as that
  core does.
- Waiting for memory is in no schedule. FACTOR holds what a known kernel takes beyond its bundles:
  21.15 ms measured on tpu7x for 20.08 ms of schedule (maxdiffusion's kernel with a fixed maximum,
  from its pull requests). tests/plan/test_schedule_tpu.py holds the method against the one other
  published measurement that can be compiled here.
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

FACTOR = 1.054  # cycles that pass for each bundle
ERROR = 0.15  # of a kernel's time; what the two measurements leave open (see the test)

_OURS = "worldr1_jax-schedules-"  # begins the name of a folder made here
_ARGS = "LIBTPU_INIT_ARGS"
_DUMP = re.compile(r"--xla_jf_dump_to=(\S+)")
_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: (>*) ?\{", re.MULTILINE)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)\b")
_JUMP = re.compile(r"sbr\.rel \((!?)%(\w+)\) target = \$region(\d+)")
_GRID = re.compile(r"iteration_bounds: \(([\d, ]+)\)")
_INDEX = re.compile(r"%(\w+) = sphi [^;]*?iter bound = (\d+)")
_SPILL = re.compile(r"sst \[smem:\[#(\w+_spill)\]\] %(\w+)")
_FILL = re.compile(r"%(\w+) = sld \[smem:\[#(\w+_spill)\]\]")
_COMPARE = re.compile(r"%(\w+) = scmp\.(eq|ne|ge|lt)\.s32\.totalorder %(\w+), (-?\d+)\b")
_STEP = re.compile(r"%(\w+) = sadd\.s32 (\d+),")
_CORE = re.compile(r"%(\w+) = sld \[[^\]]*\[[^\]]*\]\] /\* core id \*/")
_PRODUCT = re.compile(r" vmatmul(?:\.\w+)*?\.(f32|bf16)\.[\w.\[\]]*mxu(\d+)")
_ROWS = {"f32": 8, "bf16": 16}  # of a matrix in one register, which is an operand of a product
_STAGES = 4  # turns that a pipelined grid may take beyond its blocks, to begin and to end


def watch() -> None:
    """Asks the TPU compiler for the final schedules of what it will compile in this process. Only
    before libtpu is loaded, which reads the environment once; where somebody's flags ask for dumps
    already, those are read."""
    args = os.environ.get(_ARGS, "")
    if _DUMP.search(args):
        return
    folder = tempfile.mkdtemp(prefix=_OURS)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # The label is a whole name of a pass, of which there are seventy, 250 MB for one kernel.
    new = ("dump_to=" + folder, "dump_llo_text=true", "dump_llo_pass_label_regex=final_bundles")
    os.environ[_ARGS] = " ".join(filter(None, [args, *(f"--xla_jf_{flag}" for flag in new)]))


def clear() -> None:
    """Removes the schedules written so far, but nothing of a folder that somebody else named."""
    for path in _written():
        if path.parent.name.startswith(_OURS):
            path.unlink(missing_ok=True)


def found(names: set[str], rows: int = 1) -> dict[str, int]:
    """Cycles of the named operations of which a schedule was written that can be read; `rows` as
    for `read`."""
    paths = {match.group(1): path for path in _written() if (match := _FILE.fullmatch(path.name))}
    cycles = {name: read(paths[name].read_text(), rows) for name in names & set(paths)}
    return {name: count for name, count in cycles.items() if count is not None}


def _written() -> list[Path]:
    match = _DUMP.search(os.environ.get(_ARGS, ""))
    return sorted(Path(match.group(1)).glob("*")) if match else []


@dataclasses.dataclass(frozen=True)
class _Span:
    """Bundles [start, stop) that run `times` for each time their surroundings do."""

    start: int
    stop: int
    times: float


def read(text: str, rows: int = 1) -> int | None:
    """Cycles of a kernel by its final schedule; None where that has a loop of unknown turns.

    Args:
      text: the schedule.
      rows: of a matrix, that a matrix unit of the chip takes in a cycle.
    """
    bundles = [text[a.start() : b] for a, b in _cut(text)]
    facts = _Facts(text)
    spans = list[_Span]()
    for place, bundle in enumerate(bundles):
        for negated, predicate, region in _JUMP.findall(bundle):
            if facts.asks_for_core(predicate):
                continue
            target = facts.regions.get(region)
            if target is None:
                return None
            if target <= place:
                turns = facts.turns(predicate, bool(negated))
                if turns is None:
                    return None
                spans.append(_Span(target, place + 1, turns))
            else:
                spans.append(_Span(place + 1, target, facts.share(predicate, bool(negated))))
    total = 0.0
    busy = collections.defaultdict[str, float](float)  # by matrix unit
    for place, bundle in enumerate(bundles):
        times = math.prod(span.times for span in spans if span.start <= place < span.stop)
        total += times
        for kind, unit in _PRODUCT.findall(bundle):
            busy[unit] += times * _ROWS[kind] / rows
    return round(FACTOR * max(total, *busy.values(), 0.0))


def _cut(text: str) -> Iterator[tuple[re.Match[str], int]]:
    starts = list(_BUNDLE.finditer(text))
    yield from zip(starts, [m.start() for m in starts[1:]] + [len(text)], strict=True)


class _Facts:
    """What the registers of a schedule hold, as far as loops and branches ask."""

    def __init__(self, text: str):
        grids = _GRID.findall(text)
        self.grid = [int(n) for n in grids[0].split(",")] if grids else []
        self.regions = {
            region: place
            for place, (match, stop) in enumerate(_cut(text))
            for region in _REGION.findall(text[match.start() : stop])
        }
        self.compared = {name: (how, of, int(to)) for name, how, of, to in _COMPARE.findall(text)}
        self.steps = {name: int(step) for name, step in _STEP.findall(text)}
        self.cores = set(_CORE.findall(text))
        dimensions = {name: int(of) for name, of in _INDEX.findall(text)}
        spilled = dict(_SPILL.findall(text))
        filled = {name: spilled.get(slot, "") for name, slot in _FILL.findall(text)}
        self.index = dimensions | {
            name: dimensions[of] for name, of in filled.items() if of in dimensions
        }

    def asks_for_core(self, predicate: str) -> bool:
        """Whether a branch is of one core alone."""
        return self.compared.get(predicate, ("", "", 0))[1] in self.cores

    def turns(self, predicate: str, negated: bool) -> float | None:
        """Of a loop that goes on while the predicate (negated) holds, from 0 by steps of one."""
        how, of, limit = self.compared.get(predicate, ("", "", 0))
        if (how, negated) not in (("ge", True), ("lt", False)) or not self.steps.get(of):
            return None
        turns = math.ceil(limit / self.steps[of])
        blocks = math.prod(self.grid) if self.grid else 0
        return blocks if blocks <= turns <= blocks + _STAGES and blocks else turns

    def share(self, predicate: str, negated: bool) -> float:
        """Of the turns in which a branch that the predicate (negated) jumps over is taken."""
        how, of, _ = self.compared.get(predicate, ("", "", 0))
        once = (how, negated) in (("ne", False), ("eq", True))
        dimension = self.index.get(of)
        if not once or dimension is None or dimension >= len(self.grid):
            return 1.0
        return 1.0 / self.grid[dimension]
