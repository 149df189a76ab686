"""Videos and pictures: mp4 files, grids and contact sheets."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont

from worldr1_jax.files import PathLike, check_regular, local, make_folder, named, short

_SMALLEST_SIDE = 256  # px; players blur and blow up anything much smaller
_CAPTION_HEIGHT = 18  # px


def write_mp4(path: PathLike, video: Float[np.ndarray, "F H W 3"], fps: float) -> None:
    """Writes H.264; the same video gives the same bytes on every machine with the same ffmpeg.

    Args:
      path: an .mp4 file; its folder is made.
      video: in [0, 1]; enlarged by whole pixels until its smaller side is 256 px or more.
      fps: frames per second, > 0.

    Raises:
      ValueError: a video of another shape, or with values that are not finite, a rate that is
        none, or a path that cannot be written.
    """
    if not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}; it must be above 0 and finite")
    frames = to_bytes(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"video has shape {frames.shape}; it must be [F H W 3] and not empty")
    enlarge = math.ceil(_SMALLEST_SIDE / min(frames.shape[1:3]))
    frames = frames.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    odd = [side % 2 for side in frames.shape[1:3]]  # yuv420p halves both sides
    frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
    path = local(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    # One thread: x264 splits the work, and so the bits, by core count. No banner either.
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "pipe:0"]
    h264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "16", "-threads", "1"]
    exact = [
        "-fflags",
        "+bitexact",
        "-flags:v",
        "+bitexact",
        "-bsf:v",
        "filter_units=remove_types=6",
    ]
    done = _ffmpeg(["-y", *raw, *h264, *exact, "-f", "mp4", _url(temporary)], frames.tobytes())
    try:
        if done.returncode:
            reason = short(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
            raise ValueError(f"{path} cannot be written: ffmpeg says '{reason}'")
        with named(path, "written"):
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # what went wrong above is what counts
            temporary.unlink(missing_ok=True)


def _ffmpeg(arguments: list[str], content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs ffmpeg; not imageio_ffmpeg's generators, which run Python in a fork of our threads."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments]
    return subprocess.run(command, input=content, capture_output=True, check=False)


def _url(path: Path) -> str:
    """A path as ffmpeg takes it for nothing but a file: not "concat:a|b", "http:..." or an option.
    Absolute, for "file:-x" would do, but "file://host" would not."""
    return f"file:{path.absolute()}"


def video_grid(
    videos: Float[np.ndarray, "B F H W 3"], columns: int
) -> Float[np.ndarray, "F rows*H columns*W 3"]:
    """Lays videos out in rows of `columns` (>= 1), in reading order; the rest is black."""
    videos = np.asarray(videos)
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be 1 or more")
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
        raise ValueError(f"there are {len(captions)} captions for {len(videos)} videos")
    chosen = sheet_frames(videos.shape[1], columns)
    enlarge = max(1, _SMALLEST_SIDE // 2 // min(videos.shape[2:4]))
    rows = []
    for index, video in enumerate(videos):
        strip = to_bytes(video_grid(video[chosen, None], columns=len(chosen))[0])
        strip = strip.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
        if captions is not None:
            rows.append(_caption(captions[index], strip.shape[1]))
        rows.append(strip)
    png = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(png, "PNG")
    return png.getvalue()


def sheet_frames(frames: int, columns: int = 8) -> Int[np.ndarray, " shown"]:
    """Which of a video's frames a contact sheet shows, evenly spaced, the first and the last among
    them."""
    return np.linspace(0, frames - 1, min(columns, frames)).round().astype(int)


def _caption(text: str, width: int) -> np.ndarray:
    image = Image.new("RGB", (width, _CAPTION_HEIGHT), "white")
    font = ImageFont.load_default(size=12)
    ImageDraw.Draw(image).text((4, 2), " ".join(text.split()), fill="black", font=font)
    return np.asarray(image)


def to_bytes(image: Float[np.ndarray, ...]) -> np.ndarray:
    """[0, 1] floats -> 0 ... 255, rounded; values outside are clipped."""
    image = np.asarray(image, np.float32)
    if not np.isfinite(image).all():
        raise ValueError("video has values that are not finite; they must be in [0, 1]")
    return np.round(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


def marked(video: Float[np.ndarray, "*frames 3"]) -> Float[np.ndarray, "*frames 3"]:
    """The video with magenta where a pixel is not finite, so that it can be shown."""
    video = np.asarray(video, np.float32)
    magenta = np.array([1.0, 0.0, 1.0], np.float32)
    return np.where(np.isfinite(video).all(-1, keepdims=True), video, magenta)


SIDE = 8  # px; smaller pictures have nothing to reconstruct
_MOST_PIXELS = 2**25  # of a frame: 8K
_MOST_BYTES = 4 * 2**30  # of a video as it is returned: 81 frames of 2560x1440 take 3.6e9
# Containers that hold their video themselves. Scripts and playlists, which name other files, are
# recognised by their content whatever a file is called.
_FORMATS = "mov,matroska,webm,avi,gif,apng,nut,mpegts,mpeg,flv,ogg,asf,mxf,yuv4mpegpipe"
_JITTER = 0.1  # of the time between frames: how far a frame may be from its place
_SQUARE = 0.02  # that a pixel may be wider than high, or higher: sides are rounded to even ones
# What ffmpeg says, and goes on: a GIF that was cut, frames that it has made up.
_DAMAGE = re.compile(rb"prematurely|failed|error|corrupt|truncated", re.IGNORECASE)


def read_video(path: str | Path, most_frames: int) -> Float[np.ndarray, "F H W 3"]:
    """Frames of a video file in [0, 1], each that was stored once.

    Frame k is taken for the moment k / rate: a camera path has one pose a frame. A file whose
    timestamps say otherwise (variable rate, a delay in a GIF) is refused, not resampled.

    Raises:
      ValueError: a file that is missing, damaged or no video, is smaller than 8 px, has more frames
        than `most_frames`, would take more than 4 GiB, or whose pixels are not square or frames not
        evenly spaced in time.
    """
    check_regular(path)
    width, height, stored = _probe(Path(path), most_frames)
    room = min(_MOST_PIXELS, _MOST_BYTES // 12 // max(stored, 1))  # pixels of a frame
    if width * height > room:
        raise ValueError(
            f"{path} has {height}x{width} px and {stored} frames or more: a video may take "
            f"{_MOST_BYTES // 2**30} GiB, here {room} px a frame; make it smaller"
        )
    # Images with their size in front, and beside them, on the other pipe, their timestamps.
    each = ["-map", "0:V:0", "-fps_mode", "passthrough", "-frames:v", str(most_frames + 1)]
    ppm = ["-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "pipe:1"]
    stamps = ["-enc_time_base", "demux", "-f", "framecrc", "pipe:2"]
    # Twice the room: frames are decoded in whole blocks; more, and the container has lied.
    source = _input(Path(path), 2 * room)
    done = _ffmpeg(["-xerror", *source, *each, *ppm, *each, *stamps])
    header = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", done.stdout)
    if done.returncode or not header or _DAMAGE.search(done.stderr):
        raise ValueError(f"{path} is no video that ffmpeg can read to its end")
    width, height = (int(number) for number in header.groups())
    images = np.frombuffer(done.stdout, np.uint8).reshape(-1, header.end() + 3 * height * width)
    frames = images[:, header.end() :].reshape(-1, height, width, 3)
    if len(frames) > most_frames:
        raise ValueError(
            f"{path} has more than {most_frames} frames: set --config.frames, and "
            "--config.rewards.reconstruct.frame_stride to look at fewer of them"
        )
    if min(height, width) < SIDE:
        raise ValueError(f"{path} is {height}x{width} px: it needs {SIDE} px a side")
    _check_square(Path(path), done.stderr)
    _check_spacing(Path(path), done.stderr, len(frames))
    return frames.astype(np.float32) / 255.0


def _input(path: Path, most_pixels: int) -> list[str]:
    limits = ["-protocol_whitelist", "file", "-format_whitelist", _FORMATS]
    return ["-nostdin", *limits, "-max_pixels", str(most_pixels), "-i", _url(path)]


def _probe(path: Path, most_frames: int) -> tuple[int, int, int]:
    """Width, height and stored frames, of which at most `most_frames` + 1 are counted, from the
    container alone: nothing is decoded."""
    copy = ["-map", "0:V:0", "-c", "copy", "-frames:v", str(most_frames + 1), "-f", "framecrc"]
    done = _ffmpeg([*_input(path, 2**31 - 1), *copy, "pipe:1"])
    size = re.search(rb"^#dimensions 0: (\d+)x(\d+)$", done.stdout, re.MULTILINE)
    if done.returncode or not size:
        raise ValueError(f"{path} is no video that ffmpeg can read to its end")
    return int(size[1]), int(size[2]), len(re.findall(rb"^0,", done.stdout, re.MULTILINE))


def _check_square(path: Path, log: bytes) -> None:
    """Raises ValueError for pixels that are to be shown wider or higher than they are: the scene
    would be seen squeezed."""
    found = re.search(rb"^#sar 0: (\d+)/(\d+)$", log, re.MULTILINE)
    wide, high = (int(found[1]), int(found[2])) if found else (0, 1)
    if wide and abs(wide / high - 1) > _SQUARE:
        raise ValueError(
            f"{path} has pixels of {wide}:{high}, not square: scale it, such as by ffmpeg's "
            "-vf scale=iw*sar:ih,setsar=1"
        )


def _check_spacing(path: Path, log: bytes, count: int) -> None:
    """Raises ValueError unless frames lie on a grid of time, up to what a container's clock
    rounds."""
    base = re.search(rb"^#tb 0: (\d+)/(\d+)$", log, re.MULTILINE)
    found = re.findall(rb"^0, *-?\w+, *(-?\d+),", log, re.MULTILINE)
    if base is None or len(found) != count:
        raise ValueError(f"{path} does not say when each of its frames is shown: encode it anew")
    if count < 3:
        return
    ticks = np.array(found, np.int64)
    steps = np.diff(ticks)
    off = np.abs(ticks - np.linspace(ticks[0], ticks[-1], count)).max()
    if steps.min() <= 0 or off > max(1.0, _JITTER * steps.mean()):
        tick = int(base[1]) / int(base[2])
        raise ValueError(
            f"{path} has frames {1000 * tick * steps.min():.0f} to "
            f"{1000 * tick * steps.max():.0f} ms apart, not evenly spaced: give it a constant "
            "rate, such as by ffmpeg's -r"
        )
