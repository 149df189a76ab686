"""The weights that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

from worldr1_jax.files import short

WEIGHTS = Path(__file__).resolve().parents[1] / "nano" / "weights"


def resolve(folder: str | Path, part: str = "") -> Path:
    """The folder itself, or the shipped one when it is called "nano".

    Raises:
      ValueError: no folder is given, or it does not exist.
    """
    path = WEIGHTS / part if str(folder) == "nano" else Path(folder)
    if not str(folder) or not os.path.isdir(path):  # False, too, for names that no system takes
        field = f"rewards.reconstruct.{part}" if part else "policy.weights"
        raise ValueError(
            f"{field} '{short(str(folder))}' is no folder: give one of published weights, or 'nano'"
        )
    return path
