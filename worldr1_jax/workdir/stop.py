"""Stopping: at the end of a stage, or at once where that is too far away."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

GRACE = 20.0  # seconds; a machine that is taken away gives some 30
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A stage was not begun, because the run is asked to stop."""


@contextlib.contextmanager
def listening(act: Callable[[int], object]) -> Iterator[None]:
    """Calls `act` with the number of each SIGTERM and ctrl-C, in a thread of its own.

    Python's own handlers wait for the main thread to come back from XLA, which at full size takes
    most of an hour; the bytes of `set_wakeup_fd` do not. Use it in the main thread; of two that are
    nested, the inner one listens.
    """
    ours, signals = socket.socketpair()
    signals.setblocking(False)
    former = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    outer = signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := ours.recv(64):
            for number in numbers:
                if number in _SIGNALS:
                    act(number)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(outer)
        for number, handler in former.items():
            signal.signal(number, handler)
        signals.close()
        thread.join(1.0)
        ours.close()


def say(text: str) -> None:
    """A line of its own on standard error, wherever a progress line stands."""
    os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


class StopSignal:
    """Turns SIGTERM and ctrl-C into a request that the training loop honours between stages.

        with StopSignal() as stop:
            for update in ...:
                stop.between_stages()  # raises Stopped
                ...

    At full size a stage takes longer than a preempted machine has. So after GRACE seconds the
    process ends, wherever it is: what is on disk then is the last checkpoint, and of one update no
    more is lost. A second ctrl-C ends it at once.
    """

    def __init__(self, saved: Callable[[], int] = lambda: 0, *, grace: float = GRACE) -> None:
        """Args: `saved` waits for a checkpoint that is being written, and says how many updates are
        in the newest one."""
        self.requested = False
        self._saved, self._grace = saved, grace
        self._open = contextlib.ExitStack()
        self._timer: threading.Timer | None = None
        self._busy = threading.Lock()

    def agreed(self) -> bool:
        """Whether any process was asked to stop; every process must call it at the same place.

        Saving is collective, so hosts that are told at different times have to stop together.
        """
        if jax.process_count() == 1:
            return self.requested
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.requested))))

    def between_stages(self) -> None:
        """Raises Stopped when the run is asked to stop; every process must call it."""
        if self.agreed():
            raise Stopped

    def saving(self) -> threading.Lock:
        """Held while a checkpoint is written, which is not to be cut short."""
        return self._busy

    def __enter__(self) -> StopSignal:
        self._open.enter_context(listening(self._asked))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        if self._timer is not None:
            self._timer.cancel()

    def _asked(self, number: int) -> None:
        first, self.requested = not self.requested, True
        if number == signal.SIGTERM:
            if self._timer is None:
                self._timer = threading.Timer(self._grace, self._leave, args=(0,))
                self._timer.daemon = True
                self._timer.start()
        elif first:
            say("stopping at the end of this stage; ctrl-C again stops at once")
        else:
            self._leave(130)

    def _leave(self, status: int) -> None:
        with self._busy:
            try:  # whatever a disk says that is full, the process is asked to end
                say(
                    f"stopped in the middle of a stage; the same command goes on after update "
                    f"{self._saved()}"
                )
            except Exception as error:
                say(f"stopped in the middle of a stage: {error}")
            finally:
                os._exit(status)
