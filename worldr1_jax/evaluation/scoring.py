"""Scores mp4 files: what `launch/score.py` runs, for other programs too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from worldr1_jax.camera import commands, trajectory
from worldr1_jax.data import prompts
from worldr1_jax.evaluation import pictures
from worldr1_jax.media import read_video
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.rewards import recon
from worldr1_jax.rewards.scorer import Reward


@dataclasses.dataclass(frozen=True)
class Scored:
    """One video's scores, or why there are none.

    Attributes:
      path, prompt: as given.
      scores: every part, "mvcs" and "total"; empty where `error` says why.
      error: one sentence; empty when the video was scored.
      picture: PNG, or empty.
    """

    path: str
    prompt: str
    scores: Mapping[str, float]
    error: str = ""
    picture: bytes = b""


def read_list(source: str | Path) -> list[tuple[str, str]]:
    """(video, prompt) pairs of a .jsonl file with lines {"video": ..., "prompt": ...}; relative
    paths are relative to the file. Lines are read by the rules of data/prompts.py.

    Raises:
      ValueError: a file that cannot be read, a line that is no such record, or none at all.
    """
    records = prompts.records(source, ("video", "prompt"))
    return [(str(Path(source).parent / record["video"]), record["prompt"]) for record in records]


def score(
    reward: Reward,
    pairs: Sequence[tuple[str, str]],
    *,
    magnitudes: trajectory.Magnitudes,
    most_frames: int,
    depth_scale: float = 1.0,
    with_pictures: bool = False,
) -> Iterator[Scored]:
    """Scores of (video file, prompt) pairs, in their order, one video at a time.

    A video that cannot be judged gets a sentence instead of scores: a file that cannot be read, one
    with fewer frames than a path needs, one whose prompt asks for what no camera here can do, or
    one with a frame that shows nothing (see `recon.BLANK`), whose recovered path would be made up.
    """
    for path, prompt in pairs:
        try:
            video = read_video(path, most_frames)
            asked = _asked(path, prompt, video, reward.frame_stride, magnitudes)
        except ValueError as error:
            yield Scored(path, prompt, {}, error=str(error))
            continue
        yield _score_one(reward, path, prompt, video, asked, depth_scale, with_pictures)


def table(rows: Sequence[Scored], names: Sequence[str]) -> str:
    """The scores `names` as lines of text; a video without scores shows its sentence."""
    width = max(len(Path(row.path).name) for row in rows)
    lines = [f"{'video':<{width}}" + "".join(f"{name:>13}" for name in names)]
    for row in rows:
        name = f"{Path(row.path).name:<{width}}"
        if row.error:
            lines.append(f"{name}  {row.error}")
        else:
            lines.append(name + "".join(f"{row.scores[n]:>13.4f}" for n in names))
    return "\n".join(lines)


def _asked(
    path: str, prompt: str, video: np.ndarray, stride: int, magnitudes: trajectory.Magnitudes
) -> Float[np.ndarray, "F 4 4"]:
    seen = math.ceil(len(video) / stride)
    if seen < 2:
        raise ValueError(
            f"{path} has {len(video)} frame(s), and the 3D network would see {seen}: a camera path "
            "needs 2"
        )
    return np.asarray(
        trajectory.path(commands.understood(prompt), len(video), magnitudes=magnitudes)
    )


def _score_one(
    reward: Reward,
    path: str,
    prompt: str,
    video: np.ndarray,
    asked: np.ndarray,
    depth_scale: float,
    with_pictures: bool,
) -> Scored:
    parts = sharding.batch_parts(reward.mesh)
    batch = arrays.to_global(
        np.repeat(video[None], parts, 0), arrays.batched(reward.mesh)
    )  # fmt: skip
    # One program at a time: of several under way, one has been seen to keep the others waiting for
    # ever on a CPU of two cores.
    found = jax.block_until_ready(reward.reconstruct(batch))
    paths = np.repeat(asked[None], parts, 0)
    measured: dict[str, Any] = jax.block_until_ready(dict(reward.geometry(batch, found, paths)))
    measured["mvcs"] = jax.block_until_ready(reward.consistency(found))
    measured["general"] = reward.general(batch, [prompt] * parts)
    measured["total"] = reward.combine(measured).total
    values = {name: float(arrays.to_host(value)[0]) for name, value in measured.items()}
    least = values["texture_least"]
    if least < recon.BLANK:
        text = (
            f"{path} has a frame that shows next to nothing (texture {least:.4f}, below "
            f"{recon.BLANK:.4f})"
        )
        return Scored(path, prompt, {}, error=text)
    picture = b""
    if with_pictures:
        one = jax.tree.map(lambda leaf: jnp.asarray(arrays.to_host(leaf)[:1]), found)
        stride = reward.frame_stride
        picture = pictures.sheet(video[::stride], one, asked[::stride], depth_scale=depth_scale)
    return Scored(path, prompt, values, picture=picture)
