"""Checks of a dataclass's fields: what each may be stands beside it, in its `__post_init__`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


def in_range(owner: Any, **ranges: tuple[float, float]) -> None:
    """Raises ValueError, naming the field, for a value that is no finite number of its closed
    interval, or no whole one where the field is an int."""
    kinds = {field.name: field.type for field in dataclasses.fields(owner)}
    for name, (low, high) in ranges.items():
        value, whole = getattr(owner, name), kinds[name] in (int, "int")
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not right or not math.isfinite(value) or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{name} is {value!r}: it has to be {kind} in [{low:g}, {high:g}]")


def one_of(owner: Any, **choices: Sequence[str]) -> None:
    """Raises ValueError, naming the field, for a value that is none of its choices."""
    for name, known in choices.items():
        value = getattr(owner, name)
        if value not in known:
            raise ValueError(f"{name} is {value!r}: it has to be one of {', '.join(known)}")


def of_kind(owner: Any, kind: type, *names: str) -> None:
    """Raises ValueError, naming the field, for a value of another type than `kind`."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}: it has to be {KINDS[kind]}")


KINDS = {str: "a text", bool: "True or False", tuple: "a tuple"}
