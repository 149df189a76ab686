"""Stopping a run: at the end of a stage, or at once where that is too far away."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

GRACE = 20.0  # seconds; a machine that is taken away gives some 30


class Stopped(Exception):
    """A stage was not begun, because the run is asked to stop."""


class StopSignal:
    """Turns SIGTERM and ctrl-C into a request that the training loop honours between stages.

        with StopSignal() as stop:
            for update in ...:
                stop.between_stages()  # raises Stopped
                ...
                if stop.agreed():
                    save, and leave

    At full size a stage takes longer than a preempted machine has. So after GRACE seconds the
    process ends, wherever it is: what is on disk then is the last checkpoint, and of one update no
    more is lost. Use it in the main thread. After a first ctrl-C a second one interrupts as usual.
    """

    def __init__(self, saved: Callable[[], int] = lambda: 0, *, grace: float = GRACE) -> None:
        """Args: `saved` says how many updates are in the newest checkpoint."""
        self.requested = False
        self._saved, self._grace = saved, grace
        self._former: dict[int, Any] = {}
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
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()

    def _handle(self, number: int, _: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if number == signal.SIGINT:
            signal.signal(number, self._former[number])
            if first:
                self._say("stopping at the end of this stage; ctrl-C again stops at once")
        elif first:
            self._timer = threading.Timer(self._grace, self._leave)
            self._timer.daemon = True
            self._timer.start()

    def _leave(self) -> None:
        with self._busy:
            self._say(
                f"stopped in the middle of a stage; the same command goes on after update "
                f"{self._saved()}"
            )
            os._exit(0)

    def _say(self, text: str) -> None:
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
