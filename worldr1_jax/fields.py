"""Checks of a dataclass's fields: what each may be stands beside it, in its `__post_init__`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from worldr1_jax.files import short


def in_range(owner: Any, **ranges: tuple[float, float]) -> None:
    """Raises ValueError, naming the field, for a value that is no finite number of its closed
    interval, or no whole one where the field is an int."""
    kinds = {field.name: field.type for field in dataclasses.fields(owner)}
    for name, (low, high) in ranges.items():
        value, whole = getattr(owner, name), kinds[name] in (int, "int")
        if not is_number(value, low, high, whole):
            kind = "a whole number" if whole else "a number"
            raise ValueError(
                f"{name} is {short(repr(value))}: it has to be {kind} in [{low:g}, {high:g}]"
            )


def each_in_range(
    owner: Any, *, whole: bool = False, length: int | None = None, **ranges: tuple[float, float]
) -> None:
    """The same for tuples, of any length or this, of which every element lies in the interval."""
    for name, (low, high) in ranges.items():
        values = getattr(owner, name)
        right = isinstance(values, tuple) and (length is None or len(values) == length)
        if not right or not all(is_number(value, low, high, whole) for value in values):
            kind = f"{'' if length is None else f'{length} '}{'whole ' if whole else ''}numbers"
            raise ValueError(
                f"{name} is {short(repr(values))}: it has to be {kind} in [{low:g}, {high:g}]"
            )


def is_number(value: Any, low: float, high: float, whole: bool = False) -> bool:
    """Whether a value is a number, or a whole one, of the closed interval; True and False are
    none."""
    right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    # Not math.isfinite, which no int beyond a float's range passes.
    return right and low <= value <= high


def one_of(owner: Any, **choices: Sequence[str]) -> None:
    """Raises ValueError, naming the field, for a value that is none of its choices."""
    for name, known in choices.items():
        value = getattr(owner, name)
        if value not in known:
            raise ValueError(
                f"{name} is {short(repr(value))}: it has to be one of {', '.join(known)}"
            )


def each_of(owner: Any, **choices: Sequence[str]) -> None:
    """The same for tuples, of which every element is one of the choices."""
    for name, known in choices.items():
        of_kind(owner, tuple, name)
        strange = [value for value in getattr(owner, name) if value not in known]
        if strange:
            raise ValueError(f"{name} names {short(repr(strange[0]))}: it knows {', '.join(known)}")


def of_kind(owner: Any, kind: type, *names: str) -> None:
    """Raises ValueError, naming the field, for a value of another type than `kind`."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {short(repr(value))}: it has to be {KINDS[kind]}")


def check_names(values: Mapping[str, Any], kind: type, prefix: str = "") -> None:
    """Raises ValueError for a value of no field of the dataclass, or a field that has no value."""
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError(f"the config has no field {prefix}{name}")
    for name, default in known.items():
        if default is dataclasses.MISSING and name not in values:
            raise ValueError(f"the config lacks the field {prefix}{name}")


KINDS = {str: "a text", bool: "True or False", tuple: "a tuple"}


def defaults_of(sections: Mapping[str, type]) -> dict[str, Any]:
    """ "section.field" -> default, of every field of these dataclasses that has one."""
    return {
        f"{section}.{field.name}": field.default
        for section, kind in sections.items()
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }
