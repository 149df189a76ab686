"""What a run leaves to look at: metrics.jsonl, TensorBoard, videos, timings, a summary.

TensorBoard goes through tensorboardX: clu's metric_writers would need TensorFlow.
"""

import contextlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import imageio_ffmpeg
import jax
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from tensorboardX import SummaryWriter

from worldr1_jax import memory

PathLike = str | os.PathLike[str]
_SMALLEST_SIDE = 256  # px; players blur and blow up anything much smaller
_CAPTION_HEIGHT = 18  # px

# ---------------------------------------------------------------------------------- files


def write_atomically(path: PathLike, content: bytes) -> None:
    """Writes a file so that at every moment it is the old one or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / "metrics.jsonl"
        _drop_updates_from(path, restart_update)
        self._lines = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(str(self._workdir), purge_step=restart_update, flush_secs=30)

    def write(self, update: int, scalars: Mapping[str, Any]) -> None:
        """Appends one line for `update`; call it before that update's checkpoint is saved."""
        if not self._active:
            return
        record = _plain({"update": update, **scalars})
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in record.items():
            if isinstance(value, int | float) and name != "update":
                self._board.add_scalar(name, value, update)

    def video(
        self, update: int, name: str, video: Float[np.ndarray, "F H W 3"], fps: float
    ) -> None:
        """Writes videos/<name>_<update>.mp4, and its frames in a row to TensorBoard."""
        if not self._active:
            return
        write_mp4(self._workdir / "videos" / f"{name}_{update:06d}.mp4", video, fps)
        row = video_grid(np.asarray(video)[:, None], columns=len(video))[0]
        self._board.add_image(name, _bytes(row), update, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            self._lines.close()
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop_updates_from(path: Path, update: int) -> None:
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: cut short
        try:
            before = json.loads(line)["update"] < update
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path} line {number} is not a JSON record with an "update"; mend or remove it.'
            ) from error
        if before:
            kept.append(line + b"\n")
    if len(kept) < len(lines) - 1 or lines[-1]:
        write_atomically(path, b"".join(kept))


# ---------------------------------------------------------------------- timings and progress


class StageTimer:
    """Adds up the seconds of named stages.

        timer = StageTimer(on_stage=progress.stage)
        with timer("rollout") as wait_for:
            trajectory = wait_for(rollout(...))
        timer.collect()  # {"seconds/rollout": 1.2}

    jax returns before it has computed, so a stage ends when what went through `wait_for` is ready.
    A stage that exhausts a device's memory raises a ValueError with advice (memory.py).

    Args:
      on_stage: called with a stage's name as it begins.
    """

    def __init__(self, on_stage: Callable[[str], object] | None = None) -> None:
        self._seconds: dict[str, float] = {}
        self._on_stage = on_stage

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[Any], Any]]:
        outputs: list[Any] = []

        def wait_for(output: Any) -> Any:
            outputs.append(output)
            return output

        if self._on_stage:
            self._on_stage(name)
        start = time.perf_counter()
        try:
            with memory.explained(name):
                yield wait_for
                jax.block_until_ready(outputs)
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def collect(self) -> dict[str, float]:
        """Returns {"seconds/<stage>": seconds} since the last call, and starts afresh."""
        seconds = {f"seconds/{name}": value for name, value in self._seconds.items()}
        self._seconds = {}
        return seconds


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

    def close(self) -> None:
        """Leaves the last line on a terminal standing."""
        if self._rewrites:
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


# ------------------------------------------------------------------------------------ videos


def write_mp4(path: PathLike, video: Float[np.ndarray, "F H W 3"], fps: float) -> None:
    """Writes H.264; the same video gives the same bytes on every machine with the same ffmpeg.

    Args:
      path: an .mp4 file; its folder is made.
      video: in [0, 1]; enlarged by whole pixels until its smaller side is 256 px or more.
      fps: frames per second, > 0.

    Raises:
      ValueError: a video of another shape, or with values that are not finite.
    """
    frames = _bytes(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"video has shape {frames.shape}; it must be [F H W 3] and not empty.")
    enlarge = math.ceil(_SMALLEST_SIDE / min(frames.shape[1:3]))
    frames = frames.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    odd = [side % 2 for side in frames.shape[1:3]]  # yuv420p halves both sides
    frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp.mp4")
    # One thread: x264 splits the work, and so the bits, by core count. No banner either.
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    h264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "16", "-threads", "1"]
    exact = [
        "-fflags",
        "+bitexact",
        "-flags:v",
        "+bitexact",
        "-bsf:v",
        "filter_units=remove_types=6",
    ]
    _ffmpeg(["-y", *raw, *h264, *exact, str(temporary)], frames.tobytes())
    os.replace(temporary, path)


def _ffmpeg(arguments: list[str], content: bytes) -> None:
    """Runs ffmpeg; not imageio_ffmpeg.write_frames, which runs Python in a fork of our threads."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments]
    done = subprocess.run(command, input=content, capture_output=True, check=False)
    if done.returncode:
        raise OSError(f"ffmpeg failed: {done.stderr.decode(errors='replace').strip()}")


def video_grid(
    videos: Float[np.ndarray, "B F H W 3"], columns: int
) -> Float[np.ndarray, "F rows*H columns*W 3"]:
    """Lays videos out in rows of `columns` (>= 1), in reading order; the rest is black."""
    videos = np.asarray(videos)
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be 1 or more.")
    count, frames, height, width, channels = videos.shape
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, *videos.shape[1:]), videos.dtype)
    cells[:count] = videos
    cells = cells.reshape(rows, columns, frames, height, width, channels)
    grid = cells.transpose(2, 0, 3, 1, 4, 5)
    return grid.reshape(frames, rows * height, columns * width, channels)


def contact_sheet(
    videos: Float[np.ndarray, "B F H W 3"],
    captions: Sequence[str] | None = None,
    columns: int = 8,
) -> bytes:
    """Draws one row per video, of up to `columns` (>= 1) frames from first to last, as a PNG.

    Args:
      videos: in [0, 1]; small ones are enlarged by whole pixels.
      captions: one a video, written above its row and cut at the sheet's edge.

    Raises:
      ValueError: captions and videos differ in number.
    """
    videos = np.asarray(videos)
    if captions is not None and len(captions) != len(videos):
        raise ValueError(f"there are {len(captions)} captions for {len(videos)} videos.")
    chosen = np.linspace(0, videos.shape[1] - 1, min(columns, videos.shape[1])).round().astype(int)
    enlarge = max(1, _SMALLEST_SIDE // 2 // min(videos.shape[2:4]))
    rows = []
    for index, video in enumerate(videos):
        strip = _bytes(video_grid(video[chosen, None], columns=len(chosen))[0])
        strip = strip.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
        if captions is not None:
            rows.append(_caption(captions[index], strip.shape[1]))
        rows.append(strip)
    png = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(png, "PNG")
    return png.getvalue()


def _caption(text: str, width: int) -> np.ndarray:
    image = Image.new("RGB", (width, _CAPTION_HEIGHT), "white")
    font = ImageFont.load_default(size=12)
    ImageDraw.Draw(image).text((4, 2), " ".join(text.split()), fill="black", font=font)
    return np.asarray(image)


def _bytes(image: Float[np.ndarray, "..."]) -> np.ndarray:
    """[0, 1] floats -> 0 ... 255, rounded; values outside are clipped."""
    image = np.asarray(image, np.float32)
    if not np.isfinite(image).all():
        raise ValueError("video has values that are not finite; they must be in [0, 1].")
    return np.round(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


# -------------------------------------------------------------------------------- statistics


def paired_bootstrap_ci95(
    before: Float[np.ndarray, " N"],
    after: Float[np.ndarray, " N"],
    seed: int,
    resamples: int = 10_000,
) -> tuple[float, float]:
    """95% percentile interval of mean(after - before), resampling the N pairs.

    Args:
      before, after: scores of the same N >= 2 items, in the same order.
      seed: of the resampling; the same seed gives the same interval.

    Raises:
      ValueError: other shapes, or scores that are not finite.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.ndim != 1 or before.shape != after.shape or len(before) < 2:
        raise ValueError(
            f"before has shape {before.shape} and after {after.shape}; both must be [N], N >= 2."
        )
    difference = after - before
    if not np.isfinite(difference).all():
        raise ValueError("before or after has scores that are not finite; leave those pairs out.")
    picks = np.random.default_rng(seed).integers(len(difference), size=(resamples, len(difference)))
    low, high = np.percentile(difference[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
