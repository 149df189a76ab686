"""Pictures of what the 3D rewards see: frames, re-renders, depth, and the two camera paths."""

from __future__ import annotations

import io

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from worldr1_jax.geometry import relative_to_first
from worldr1_jax.rewards import reconstruct, trajectory
from worldr1_jax.rewards.reconstruct import resize_frames
from worldr1_jax.splat import render as splat
from worldr1_jax.types import Reconstruction

ASKED, RECOVERED = "#1f5fbf", "#d0402b"
_PANEL, _MARGIN = 256, 28  # px
_ARROWS = 6  # views drawn along a path
_VIEWS = 8  # frames in a row


def sheet(
    video: Float[np.ndarray, "F H W 3"],
    found: Reconstruction,
    asked: Float[np.ndarray, "F 4 4"],
    *,
    depth_scale: float = 1.0,
) -> bytes:
    """One video as a PNG: a row of frames, one of their re-renders where there are Gaussians, one
    of depth, and the paths.

    Args:
      video: in [0, 1], exactly the frames that were reconstructed.
      found: of that video, with a leading axis of 1.
      asked: the path asked for, at the same instants.
      depth_scale: as in `trajectory.s_traj`.
    """
    size = (found.depth.shape[2], found.depth.shape[3])
    chosen = reconstruct.frame_indices(len(video), min(_VIEWS, len(video)))
    frames = np.asarray(resize_frames(jnp.asarray(video[None, chosen]), size))[0]
    rows = [frames, depth_colours(np.asarray(found.depth)[0, chosen])]
    if found.gaussians is not None:
        images = splat.render(
            found.gaussians, found.camtoworld[:, chosen], found.intrinsics[:, chosen], size
        )
        rows.insert(1, np.asarray(images.rgb)[0])
    enlarge = max(1, _PANEL // 2 // min(size))
    strips = [
        np.concatenate(list(_bytes(row)), axis=1).repeat(enlarge, 0).repeat(enlarge, 1)
        for row in rows
    ]
    paths = np.asarray(path_plot(asked, np.asarray(found.camtoworld)[0], depth_scale=depth_scale))
    width = max(strips[0].shape[1], paths.shape[1])
    padded = [_widen(part, width) for part in (*strips, paths)]
    png = io.BytesIO()
    Image.fromarray(np.concatenate(padded)).save(png, "PNG")
    return png.getvalue()


def depth_colours(depth: Float[np.ndarray, "F H W"]) -> Float[np.ndarray, "F H W 3"]:
    """Near is bright, on one scale for all frames: 1 / depth from its 2nd to 98th percentile."""
    inverse = 1.0 / np.maximum(depth, 1e-6)
    low, high = np.percentile(inverse, [2, 98])
    return np.repeat(((inverse - low) / max(high - low, 1e-9)).clip(0, 1)[..., None], 3, -1)


def path_plot(
    asked: Float[np.ndarray, "F 4 4"],
    recovered: Float[np.ndarray, "F 4 4"],
    *,
    depth_scale: float = 1.0,
) -> Image.Image:
    """The path asked for (blue) and the one recovered (red), from above and from the right.

    Positions are relative to the first camera, the recovered ones scaled as `s_traj` scales them;
    short strokes show where the camera looks.
    """
    pair = jnp.asarray(asked, jnp.float32)[None], jnp.asarray(recovered, jnp.float32)[None]
    positions = trajectory.aligned_positions(pair[0], pair[1], depth_scale=depth_scale)
    looks = [np.asarray(relative_to_first(p))[0, :, :3, 2] for p in pair]
    lines = [np.asarray(p)[0] for p in positions]
    reach = max(float(np.abs(np.concatenate(lines)).max()), 1e-3)
    picture = Image.new("RGB", (2 * _PANEL, _PANEL), "white")
    draw = ImageDraw.Draw(picture)
    panels = (
        (0, "from above: right, forward", 0, 2),
        (_PANEL, "from the right: forward, up", 2, 1),
    )
    for left, title, across, up in panels:
        draw.rectangle((left, 0, left + _PANEL - 1, _PANEL - 1), outline="#cccccc")
        draw.text((left + 6, 4), title, fill="black", font=ImageFont.load_default(size=11))
        for points, look, colour in zip(lines, looks, (ASKED, RECOVERED), strict=True):
            _draw_path(draw, left, points, look, (across, up), reach, colour)
    font = ImageFont.load_default(size=11)
    draw.text((6, _PANEL - 18), "asked", fill=ASKED, font=font)
    draw.text((50, _PANEL - 18), "recovered", fill=RECOVERED, font=font)
    return picture


def _draw_path(draw, left, points, looks, axes, reach, colour) -> None:
    centre, scale = _PANEL / 2, (_PANEL / 2 - _MARGIN) / reach
    # Up on the screen is forward from above; y points down in the world as on the screen.
    signs = np.array([1.0, -1.0 if axes[1] == 2 else 1.0])

    def screen(vectors: np.ndarray) -> np.ndarray:
        return vectors[..., list(axes)] * signs

    places = screen(points) * scale + [left + centre, centre]
    draw.line([tuple(p) for p in places], fill=colour, width=2)
    chosen = reconstruct.frame_indices(len(points), min(_ARROWS, len(points)))
    for place, look in zip(places[chosen], screen(looks[chosen]), strict=True):
        draw.line([tuple(place), tuple(place + 14 * look)], fill=colour, width=1)
        x, y = place
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)


def _widen(image: np.ndarray, width: int) -> np.ndarray:
    missing = width - image.shape[1]
    return np.pad(image, ((0, 0), (0, missing), (0, 0)), constant_values=255)


def _bytes(images: np.ndarray) -> np.ndarray:
    return np.round(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)
