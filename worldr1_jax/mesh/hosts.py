"""What the hosts of a run have to agree on before they work together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import jax
import numpy as np


def agree(things: Mapping[str, str]) -> None:
    """Compares a text of each name over all hosts; every host has to call it with the same names.

    Hosts whose configs differ would otherwise train together, each of them something else, and end
    with status 0.

    Raises:
      ValueError: hosts that differ, with the name of what they differ in.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digests = [hashlib.sha256(text.encode()).digest() for text in things.values()]
    mine = np.frombuffer(b"".join(digests), np.uint8).reshape(len(things), -1)
    all_hosts = np.asarray(multihost_utils.process_allgather(mine))
    for row, name in enumerate(things):
        others = [host for host in range(len(all_hosts)) if (all_hosts[host] != mine)[row].any()]
        if others:
            raise ValueError(
                f"hosts differ in their {name}: host {jax.process_index()} has another one than "
                f"host {others[0]}; start the same command with the same files on every host"
            )
