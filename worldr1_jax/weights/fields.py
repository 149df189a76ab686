"""The fields of a publisher's config.json, checked against the dataclass that they fill."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from worldr1_jax.files import short

Limits = Mapping[str, tuple[float, float]]  # field -> least and most
_MOST = 2**20  # of a number without limits of its own; the vocabulary of UMT5 has 2^18 words
_LENGTH = 256  # of a list


def checked(
    cls: type,
    values: Mapping[str, Any],
    limits: Limits = types.MappingProxyType({}),
    part: str = "",
) -> dict[str, Any]:
    """Arguments for the dataclass `cls`: `values` of the types of its fields, finite and in range,
    lists as tuples.

    Bounds come before anything is built: shapes alone of ten million layers take hours.

    Args:
      values: fields of `cls`, none other.
      limits: (least, most) of fields and of the numbers in lists; without any, whole
        numbers are 1 to 2^20 and others within as much of 0.
      part: what the fields belong to, for messages, such as "net.".

    Raises:
      ValueError: naming the field, its value, and what it has to be.
    """
    kinds = typing.get_type_hints(cls)
    return {
        name: _value(f"{part}{name}", value, kinds[name], limits.get(name))
        for name, value in values.items()
    }


def names(cls: type) -> list[str]:
    """The names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(cls)]


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """A part of a config.json that has to hold fields; ValueError for anything else."""
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json has no fields under '{name}'")
    return value


def _value(name: str, value: Any, kind: Any, limits: tuple[float, float] | None) -> Any:
    if isinstance(kind, types.UnionType):
        if value is None and types.NoneType in kind.__args__:
            return None
        kind = next(option for option in kind.__args__ if option is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        each, *rest = typing.get_args(kind)
        length = None if rest == [...] else 1 + len(rest)
        if not isinstance(value, list | tuple) or (length or len(value)) != len(value):
            _refuse(name, value, f"a list of {length or 'numbers'}")
        if len(value) > _LENGTH:
            _refuse(name, value, f"a list of at most {_LENGTH}")
        return tuple(_value(name, item, each, limits) for item in value)
    if kind in (bool, str):
        if not isinstance(value, kind):
            _refuse(name, value, "true or false" if kind is bool else "a text")
        return value
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float if kind is float else int):
        _refuse(name, value, wanted)
    least, most = limits or ((1, _MOST) if kind is int else (-_MOST, _MOST))
    if not least <= value <= most:  # nor is NaN
        _refuse(name, value, f"{wanted} from {least} to {most}")
    return value


def _refuse(name: str, value: Any, wanted: str) -> typing.NoReturn:
    raise ValueError(f"config field '{name}' is {short(repr(value))}; it has to be {wanted}")
