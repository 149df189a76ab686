"""Files of published weights that a run needs: all that are missing, named at once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from worldr1_jax.files import short


class Needed(NamedTuple):
    """One network's files.

    Attributes:
      field: of the config that names them.
      value: what it names; "nano" ships with the package.
      what: the publisher's repository, and what of it.
      size: of the download.
      licence: of the weights.
      parts: its folders among those that ship.
    """

    field: str
    value: str
    what: str
    size: str
    licence: str
    parts: tuple[str, ...] = ()

    @property
    def missing(self) -> bool:
        """Whether there is nothing of that name."""
        return self.value != "nano" and not (self.value and os.path.exists(self.value))


def check(wanted: Iterable[Needed]) -> None:
    """Raises ValueError that names every missing one, where to get it, its size and licence."""
    lacking = [one for one in wanted if one.missing]
    if not lacking:
        return
    lines = [
        f"{one.field} is '{short(one.value)}': give a folder or file of {one.what} ({one.size}, "
        f"{one.licence})"
        for one in lacking
    ]
    count = "a network is" if len(lines) == 1 else f"{len(lines)} networks are"
    raise ValueError(f"{count} missing; docs/wan says how to get each: {'; '.join(lines)}")
