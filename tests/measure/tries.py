"""One bad input after the other: what becomes of it, and a count of what must never be.

A refusal is one ValueError of one short sentence. Everything else is a fault, by these names:

  traceback   another exception, or a message that is no sentence
  hang        over SECONDS of computing, or over ten times that of waiting
  accepted    taken, though it is plainly wrong
  changed     refused, but a byte of the folder that it is about is another
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 20
LONGEST = 1000  # characters; launchers cut at 600
FAULTS = ("traceback", "hang", "accepted", "changed")


class Hang(BaseException):
    """The time is up; no `except Exception` catches it."""


@dataclasses.dataclass(frozen=True)
class Try:
    """One input.

    Attributes:
      kind: what it is an input of.
      name: says which, for whoever reads of a fault.
      call: takes the input.
      right: what may come of it where it need not be refused: a test of the result; None where
        any result is wrong.
      kept: a folder of which a refusal must not change a byte.
    """

    kind: str
    name: str
    call: Callable[[], Any]
    right: Callable[[Any], bool] | None = None
    kept: Path | None = None


def outcome(one: Try) -> tuple[str, str]:
    """("refused", the sentence), ("right", ""), or a fault and what was seen of it."""
    before, began = _state(one.kept), _computed()
    said = ""
    try:
        with _alarm():
            result = one.call()
        fine = one.right is not None and one.right(result)
        found = "right" if fine else "accepted"
    except ValueError as error:
        said = str(error)
        is_one = said.strip() and "\n" not in said and len(said) <= LONGEST
        stop = said.endswith(".") and not said.endswith("...")  # what was quoted may be cut
        found = "refused" if is_one and not stop else "traceback"
    except Hang:
        found = "hang"
    except Exception as error:
        found, said = "traceback", f"{type(error).__name__}: {error}"
    if _computed() - began > SECONDS:
        found = "hang"
    elif found == "refused" and _state(one.kept) != before:
        found = "changed"
    return found, said


def count(tries: Iterable[Try], show: bool = True) -> collections.Counter[tuple[str, str]]:
    """How often each outcome came of each kind; faults are printed one by one."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for one in tries:
        found, said = outcome(one)
        counts[one.kind, found] += 1
        if found in FAULTS and show:
            print(f"{found}: {one.kind}: {one.name[:200]}: {said[:300]!r}", file=sys.stderr)
    return counts


def table(counts: collections.Counter[tuple[str, str]]) -> str:
    """A line for each kind, and one for all."""
    columns = ("refused", "right", *FAULTS)
    lines = [f"{'kind':<20}{'tried':>8}" + "".join(f"{name:>11}" for name in columns)]
    for kind in [*dict.fromkeys(kind for kind, _ in counts), "all"]:
        row = [sum(n for (k, o), n in counts.items() if kind in (k, "all") and o == name)
               for name in columns]  # fmt: skip
        lines.append(f"{kind:<20}{sum(row):>8}" + "".join(f"{n:>11}" for n in row))
    return "\n".join(lines)


def _computed() -> float:
    """Seconds that this process and those that it has waited for have computed: the clock would
    count what else the machine does."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    former = signal.signal(signal.SIGALRM, ring)
    signal.alarm(10 * SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def _state(folder: Path | None) -> dict[str, str]:
    """Every path below a folder, or a file, with what it holds."""
    if folder is None:
        return {}
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))] if folder.is_dir() else [folder]:
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = "other" if os.path.lexists(path) else "none"
    return found
