"""The hosts of a run: what they have to agree on, and how each hears of the end of another.

jax's own health check ends a process by SIGABRT and pages of a dump. So every host says here that
it lives, and whether it has ended, in the store that jax.distributed keeps at process 0; and a host
that hears of an end ends with a sentence. jax's check stands behind it: it alone hears at once of
the death of process 0, which takes the store with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np

PATIENCE = 60  # seconds of silence after which a host is given up
_AGAIN = "start the same command on every host, and the run goes on from its newest checkpoint"
_BEATS, _ENDS = "worldr1_jax/beat/", "worldr1_jax/end/"


def join(
    coordinator: str | None, processes: int | None, process: int | None, patience: float = PATIENCE
) -> Host:
    """Joins the other hosts of a run (jax.distributed) before anything else is done.

    Args:
      coordinator: host:port of process 0, where that one listens; None where the cluster says.
      processes, process: how many hosts there are, and the number of this one; None likewise.
      patience: seconds after which a silent host is given up.

    Raises:
      ValueError: an address or number that cannot be, or other hosts that do not come.
    """
    if coordinator is not None:
        name, colon, port = coordinator.rpartition(":")
        if not (colon and name and port.isdigit() and 0 < int(port) < 2**16):
            raise ValueError(f"--coordinator is '{coordinator}': it has to be host:port")
    if patience < 1:
        raise ValueError(f"--heartbeat is {patience}: it has to be 1 second or more")
    if processes is not None and processes < 1:
        raise ValueError(f"--processes is {processes}: it has to be 1 or more")
    if process is not None and not 0 <= process < (processes or process + 1):
        raise ValueError(f"--process is {process}: it has to be 0 or more, below --processes")
    listen = coordinator if process == 0 and coordinator and _is_ours(coordinator) else None
    try:
        jax.distributed.initialize(
            coordinator, processes, process, coordinator_bind_address=listen,
            heartbeat_timeout_seconds=round(2 * patience),  # ours are to come first
        )  # fmt: skip
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"the hosts of this run do not come together: {reason}") from error
    # jax's preemption service has taken SIGTERM for itself, which workdir/stop.py answers.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return Host(patience)


def _is_ours(address: str) -> bool:
    """Whether this machine can listen there. Where process 0 is known by another address, such as
    behind a cluster's network, it has to listen on all that it has."""
    name = address.rpartition(":")[0].strip("[]")
    try:
        family, kind, _, _, (place, *_) = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.bind((place, 0))
    except OSError:
        return False
    return True


class Host:
    """This process among those of a run, from when they have come together.

    Args:
      patience: see `join`.
    """

    def __init__(self, patience: float):
        from jax._src.distributed import global_state  # jax gives its store no public name

        self._client: Any = global_state.client
        self._me, self._patience, self._period = global_state.process_id, patience, patience / 12
        self._leaving = threading.Lock()
        now = time.monotonic()
        self._answered = now  # when the store last did
        self._heard = {str(host): ("", now) for host in range(global_state.num_processes)}
        self._ends: dict[str, str] = {}  # of the others
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def leave(self, reason: str) -> NoReturn:
        """Ends this process with status 1, and so the others, each with a sentence.

        Nothing waits for what they were computing together. Process 0 goes last, for its store
        tells the others why.
        """
        if not self._leaving.acquire(blocking=False):
            time.sleep(2 * self._patience)  # another thread is ending the process
        print(f"error: {' '.join(reason.split())}", file=sys.stderr, flush=True)
        telling = threading.Thread(target=self._tell, args=(reason[:400],), daemon=True)
        telling.start()
        telling.join(2 * self._period)  # a store that hangs tells nobody
        if self._me == 0:
            time.sleep(3 * self._period)
        os._exit(1)

    def _tell(self, reason: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is left to be told
            self._client.key_value_set(f"{_ENDS}{self._me}", reason, allow_overwrite=True)

    def lost(self, reason: str) -> NoReturn:
        """`leave`, when what the hosts compute together has failed: mostly because one of them has
        ended, which may yet say why."""
        time.sleep(3 * self._period)
        self.leave(
            f"this host lost the others, one of which has probably ended ({reason}); {_AGAIN}"
        )

    def _exchange(self) -> None:
        """Says that this host lives, and hears who else does; waits for as long as the store."""
        number = 0
        while True:
            try:
                self._client.key_value_set(f"{_BEATS}{self._me}", str(number), allow_overwrite=True)
                beats = self._client.key_value_dir_get(_BEATS)
                ends = self._client.key_value_dir_get(_ENDS)
            except jax.errors.JaxRuntimeError:
                return  # the store is gone, and with it process 0: `_judge` will say so
            now, number = time.monotonic(), number + 1
            self._answered = now
            for key, value in beats:
                host = key.removeprefix(_BEATS)
                if self._heard[host][0] != value:
                    self._heard[host] = (value, now)
            self._ends = {k.removeprefix(_ENDS): reason for k, reason in ends}
            self._ends.pop(str(self._me), None)
            time.sleep(self._period)

    def _judge(self) -> None:
        """Ends this process once another one has ended or is silent."""
        while True:
            time.sleep(self._period / 2)
            now = time.monotonic()
            silent = {host: at for host, (_, at) in self._heard.items() if host != str(self._me)}
            if now - self._answered > self._patience:
                silent = {"0": self._answered}
            lost = [host for host, at in silent.items() if now - at > self._patience]
            if self._ends:
                host, reason = next(iter(self._ends.items()))
                self.leave(f"host {host} has ended: {reason}")
            if lost:
                self.leave(
                    f"host {lost[0]} has been silent for {self._patience:.0f} seconds, and no host "
                    f"goes on without the others; {_AGAIN}"
                )


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
