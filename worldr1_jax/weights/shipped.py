"""The weights that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

from worldr1_jax.files import short

WEIGHTS = Path(__file__).resolve().parents[1] / "nano" / "weights"


def resolve(folder: str | Path, part: str = "", *, field: str = "policy.weights") -> Path:
    """The folder itself, or the shipped one when it is called "nano".

    Args:
      folder: of weights, or "nano".
      part: the network's folder among those that ship; "": all of them.
      field: what the user calls `folder`, for the error.

    Raises:
      ValueError: no folder is given, or it does not exist.
    """
    if str(folder) == "nano":
        path = WEIGHTS / part
        if not path.is_dir():
            raise ValueError(
                f"{field} is 'nano', and this copy of the package has no nano/weights/{part}: "
                "install it again, or give a folder of published weights"
            )
        return path
    path = Path(folder)
    if not str(folder) or not os.path.isdir(path):  # False, too, for names that no system takes
        raise ValueError(
            f"{field} '{short(str(folder))}' is no folder: give one of published weights, or 'nano'"
        )
    return path
