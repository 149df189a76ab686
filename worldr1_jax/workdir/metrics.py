"""What a run leaves to look at: metrics.jsonl, TensorBoard, videos, timings, a summary.

TensorBoard goes through tensorboardX: clu's metric_writers would need TensorFlow.
"""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jaxtyping import Float
from tensorboardX import SummaryWriter

from worldr1_jax.files import (
    MIB,
    PathLike,
    make_folder,
    named,
    parse_json,
    read_bytes,
    write_atomically,
)
from worldr1_jax.media import marked, to_bytes, video_grid, write_mp4

_MOST_BYTES = 1024 * MIB  # of metrics.jsonl: a million updates

# ---------------------------------------------------------------------------------- files


def write_summary(path: PathLike, summary: Mapping[str, Any]) -> None:
    """Writes summary.json atomically; numbers that are not finite become null."""
    text = json.dumps(_plain(summary), indent=2, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def _plain(value: Any) -> Any:
    """Arrays and numpy scalars -> what JSON has; NaN and infinities, which it lacks, -> None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------------- scalars over time


class MetricsWriter:
    """Writes <workdir>/metrics.jsonl, TensorBoard events and videos/; does nothing off process 0.

    Args:
      workdir: folder of the run.
      restart_update: first update that this run will write. Lines of it and later ones, left by
        a run that was killed after its last checkpoint, are dropped, so that the file has each
        update once; TensorBoard is told to forget the same steps.

    Raises:
      ValueError: metrics.jsonl has a line, other than a last one cut short, that is not a record.
    """

    def __init__(self, workdir: PathLike, restart_update: int = 0) -> None:
        self._workdir = Path(workdir)
        self._active = jax.process_index() == 0
        if not self._active:
            return
        make_folder(self._workdir)
        path = self._workdir / "metrics.jsonl"
        _drop_updates_from(path, restart_update)
        with named(path, "written"), open(path, "ab"):
            pass
        with named(self._workdir, "written to"):
            self._board = SummaryWriter(
                str(self._workdir), purge_step=restart_update, flush_secs=30
            )

    def write(self, update: int, scalars: Mapping[str, Any]) -> None:
        """Appends one line for `update`; call it before that update's checkpoint is saved."""
        if not self._active:
            return
        record = _plain({"update": update, **scalars})
        path = self._workdir / "metrics.jsonl"
        # A mounted bucket keeps a file once it is closed, and gcsfuse 3 no sooner.
        with named(path, "written"), open(path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, allow_nan=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        for name, value in record.items():
            if isinstance(value, int | float) and name != "update":
                self._board.add_scalar(name, value, update)

    def video(
        self, update: int, name: str, video: Float[np.ndarray, "F H W 3"], fps: float
    ) -> None:
        """Writes videos/<name>_<update>.mp4, and its frames in a row to TensorBoard. Numbers that
        are not finite, of which a reward is NaN as well, are shown in magenta."""
        if not self._active:
            return
        video = marked(video)
        write_mp4(self._workdir / "videos" / f"{name}_{update:06d}.mp4", video, fps)
        row = video_grid(np.asarray(video)[:, None], columns=len(video))[0]
        self._board.add_image(name, to_bytes(row), update, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop_updates_from(path: Path, update: int) -> None:
    if not os.path.lexists(path):
        return
    lines = read_bytes(path, _MOST_BYTES).split(b"\n")
    kept = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: cut short
        try:
            before = parse_json(line, "line")["update"] < update
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path} line {number} is not a JSON record with an "update"; mend or remove it'
            ) from error
        if before:
            kept.append(line + b"\n")
    if len(kept) < len(lines) - 1 or lines[-1]:
        write_atomically(path, b"".join(kept))


# ---------------------------------------------------------------------- timings and progress


class Progress:
    """A line of progress: rewritten in place on a terminal, one per update elsewhere.

    Args:
      num_updates: updates of the whole run.
      first_update: where this process begins, after a resume.
      stream: where to; standard error by default. Silent off process 0.
      unit: what is counted.
    """

    def __init__(
        self,
        num_updates: int,
        first_update: int = 0,
        stream: TextIO | None = None,
        unit: str = "update",
    ) -> None:
        self._num_updates, self._update, self._unit = num_updates, first_update, unit
        self._stream = sys.stderr if stream is None else stream
        self._rewrites = self._stream.isatty()
        self._began = time.perf_counter()
        self._seconds: list[float] = []

    def stage(self, name: str) -> None:
        """Says which stage runs now (terminals only: elsewhere it would flood the log)."""
        if self._rewrites:
            self._print(
                f"{self._unit} {self._update + 1}/{self._num_updates}  {name}{self._pace()}"
            )

    def update(self, update: int, scalars: Mapping[str, float] | None = None) -> None:
        """Says that `update` is done, with the scalars given and the time left."""
        now = time.perf_counter()
        advanced = max(update + 1 - self._update, 1)  # several at a time where they come in batches
        self._seconds.append((now - self._began) / advanced)
        self._began, self._update = now, update + 1
        shown = "".join(f"  {name} {float(value):.4g}" for name, value in (scalars or {}).items())
        end = "" if self._rewrites else "\n"
        self._print(f"{self._unit} {self._update}/{self._num_updates}{shown}{self._pace()}{end}")

    def advance(self, by: int) -> None:
        """Says that so many more (>= 1) are done."""
        self.update(self._update + by - 1)

    def close(self) -> None:
        """Leaves the last line on a terminal standing, if there is one."""
        if self._rewrites and self._seconds:
            self._print("\n")

    def _pace(self) -> str:
        if not self._seconds:
            return ""
        recent = self._seconds[1:][-20:] or self._seconds  # the first one compiles
        each = statistics.median(recent)
        left = int(each * (self._num_updates - self._update))
        return f"  {each:.1f} s each  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"

    def _print(self, line: str) -> None:
        if jax.process_index() == 0:
            self._stream.write(f"\r\x1b[K{line}" if self._rewrites and line != "\n" else line)
            self._stream.flush()
