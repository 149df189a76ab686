"""One run at a time in a folder: a lock that a dead process cannot keep.

<workdir>/lock says who runs there. On its own host the system holds it for as long as the process
lives, whatever ends it. On another host, which may see the folder through a mounted bucket that
passes no locks on, its heartbeat tells: who holds the lock rewrites the file every BEAT seconds,
and one that stands still for PATIENCE is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from worldr1_jax import files

NAME = "lock"
BEAT, PATIENCE = 20.0, 70.0  # seconds


class Lock:
    """Holds a run's folder; a context manager that every process of a run enters.

        with Lock(workdir) as lock:
            for update in ...:
                ...
                lock.check()

    Args:
      workdir: the folder, made if it is missing; process 0 takes the lock for all.
      beat, patience: of the heartbeat, in seconds.

    Raises:
      ValueError: on entering, when another run holds the folder, which is left as it is.
    """

    def __init__(
        self, workdir: files.PathLike, *, beat: float = BEAT, patience: float = PATIENCE
    ) -> None:
        self._path = files.local(workdir).absolute() / NAME
        self._beat, self._patience = beat, patience
        self._file: IO[bytes] | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._count = 0

    def check(self) -> None:
        """Raises ValueError when the folder or the lock is gone, as after `rm -r` of a run: what
        such a run goes on to write is lost."""
        if self._file is not None and not _is_at(self._file, self._path):
            raise ValueError(
                f"{self._path} is gone: the folder was removed or taken under this run, which ends "
                "here"
            )

    def seen(self, wait: float = 20.0) -> str:
        """The name of a file that process 0 makes in the folder, as this host sees it; "" where it
        does not within so many seconds: then its workdir is not the folder that process 0 has.

        Every process must call it. The name is new, for a mounted bucket may go on showing what
        a file held before, such as this lock's."""
        number = np.asarray(secrets.randbits(31))
        # First the file, then its name: a host that looked too early would go on seeing none.
        if jax.process_index() == 0:
            files.write_atomically(self._token(number), b"")
        if jax.process_count() > 1:
            number = multihost_utils.broadcast_one_to_all(number)
        path = self._token(number)
        end = time.monotonic() + wait
        while not (found := path.exists()) and time.monotonic() < end:
            time.sleep(0.2)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(path.name)  # all have looked
        if jax.process_index() == 0:
            path.unlink(missing_ok=True)
        return path.name if found else ""

    def _token(self, number: np.ndarray) -> Path:
        return self._path.with_name(f".seen-{int(number):08x}")

    def __enter__(self) -> Lock:
        refusal = ""
        if jax.process_index() == 0:
            try:
                self._acquire()
            except ValueError as error:
                refusal = str(error)
        if jax.process_count() > 1:
            refused = multihost_utils.broadcast_one_to_all(np.asarray(bool(refusal)))
            refusal = refusal or ("process 0 could not take the workdir" if refused else "")
        if refusal:
            raise ValueError(refusal)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if self._file is not None:
            if _is_at(self._file, self._path):
                with contextlib.suppress(OSError):  # a folder that has gone has no lock either
                    self._path.unlink()
            self._file.close()
            self._file = None

    def _acquire(self) -> None:
        files.make_folder(self._path.parent)
        with files.named(self._path, "locked"):
            while self._file is None:
                file = open(self._path, "r+b", 0, opener=_made)  # noqa: SIM115 (held until exit)
                try:
                    self._claim(file)
                except BaseException:
                    file.close()
                    raise
                if _is_at(file, self._path):
                    self._file = file
                else:  # who held it has just left, and the file with it
                    file.close()
        self._write()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def _claim(self, file: IO[bytes]) -> None:
        """Locks the open file, once its owner is known to be gone."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(self._refusal(_owner(self._path))) from error
        owner = _owner(self._path)
        if owner and owner.get("host") != socket.gethostname():
            end = time.monotonic() + self._patience
            while time.monotonic() < end:
                time.sleep(min(self._beat, self._patience) / 4)
                if _owner(self._path) != owner:
                    raise ValueError(self._refusal(owner))

    def _refusal(self, owner: dict[str, Any]) -> str:
        who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
        return (
            f"workdir {self._path.parent} is in use by {who}: wait for that run, stop it, or "
            "choose another workdir"
        )

    def _write(self) -> None:
        """Says who holds the lock, in place: another file would be another lock. In one write, over
        what was there: another host that found the file empty would take the lock."""
        if self._file is None:
            return
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "beat": self._count}
        self._count += 1
        length = os.fstat(self._file.fileno()).st_size - 1  # of who held it before
        os.pwrite(self._file.fileno(), f"{json.dumps(owner):<{max(length, 0)}}\n".encode(), 0)
        os.fsync(self._file.fileno())  # without which a mounted bucket shows others nothing

    def _keep_alive(self) -> None:
        while not self._done.wait(self._beat):
            with contextlib.suppress(OSError):  # a full disk ends the run elsewhere, in words
                self._write()


def _made(path: str, flags: int) -> int:
    """Opens a file that may not be there yet."""
    return os.open(path, flags | os.O_CREAT, 0o666)


def _owner(path: Path) -> dict[str, Any]:
    """What the file says; {} for one that is empty, half written or gone."""
    try:
        return files.read_json(path, files.MIB)
    except ValueError:
        return {}


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
