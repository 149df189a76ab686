"""Videos and pictures: mp4 files, grids and contact sheets."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from worldr1_jax.files import PathLike

_SMALLEST_SIDE = 256  # px; players blur and blow up anything much smaller
_CAPTION_HEIGHT = 18  # px


def write_mp4(path: PathLike, video: Float[np.ndarray, "F H W 3"], fps: float) -> None:
    """Writes H.264; the same video gives the same bytes on every machine with the same ffmpeg.

    Args:
      path: an .mp4 file; its folder is made.
      video: in [0, 1]; enlarged by whole pixels until its smaller side is 256 px or more.
      fps: frames per second, > 0.

    Raises:
      ValueError: a video of another shape, or with values that are not finite.
    """
    frames = to_bytes(video)
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
        strip = to_bytes(video_grid(video[chosen, None], columns=len(chosen))[0])
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


def to_bytes(image: Float[np.ndarray, ...]) -> np.ndarray:
    """[0, 1] floats -> 0 ... 255, rounded; values outside are clipped."""
    image = np.asarray(image, np.float32)
    if not np.isfinite(image).all():
        raise ValueError("video has values that are not finite; they must be in [0, 1].")
    return np.round(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


SIDE = 8  # px; smaller pictures have nothing to reconstruct


def read_video(path: str | Path, most_frames: int) -> Float[np.ndarray, "F H W 3"]:
    """Frames of a video file in [0, 1].

    Raises:
      ValueError: a file that is missing or no video, is smaller than 8 px, or has more frames than
        `most_frames`.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    # As images with their size in front; not imageio_ffmpeg.read_frames, which forks our threads.
    ppm = ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", "-i", str(path)]
    done = subprocess.run(
        [*command, "-frames:v", str(most_frames + 1), *ppm], capture_output=True, check=False
    )
    header = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", done.stdout)
    if done.returncode or not header:
        raise ValueError(f"{path} is no video that ffmpeg can read to its end")
    width, height = (int(number) for number in header.groups())
    images = np.frombuffer(done.stdout, np.uint8).reshape(-1, header.end() + 3 * height * width)
    frames = images[:, header.end() :].reshape(-1, height, width, 3)
    if len(frames) > most_frames:
        raise ValueError(
            f"{path} has more than {most_frames} frames: set --config.frames, and "
            "--config.rewards.frame_stride to look at fewer of them"
        )
    if min(height, width) < SIDE:
        raise ValueError(f"{path} is {height}x{width} px: it needs {SIDE} px a side")
    return frames.astype(np.float32) / 255.0
