"""Scores mp4 files: what `launch/score.py` runs, for other programs too."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from worldr1_jax.camera import commands, trajectory
from worldr1_jax.data import prompts
from worldr1_jax.evaluation import pictures
from worldr1_jax.files import write_atomically
from worldr1_jax.media import read_video
from worldr1_jax.mesh import arrays, placement
from worldr1_jax.rewards import Evidence, Scorer, likeness
from worldr1_jax.rewards.trajectory import Trajectory
from worldr1_jax.workdir.metrics import Progress, write_summary


@dataclasses.dataclass(frozen=True)
class Scored:
    """One video's scores, or why there are none.

    Attributes:
      path, prompt: as given.
      scores: every part and "total"; empty where `error` says why.
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
    scorer: Scorer,
    pairs: Sequence[tuple[str, str]],
    *,
    magnitudes: trajectory.Magnitudes,
    most_frames: int,
    with_pictures: bool = False,
) -> Iterator[Scored]:
    """Scores of (video file, prompt) pairs, in their order, one video at a time.

    A video that cannot be judged gets a sentence instead of scores: a file that cannot be read, one
    with fewer frames than a path needs, one whose prompt asks for what no camera here can do, or
    one with a frame that shows nothing (`likeness.BLANK`), whose recovered path would be made up.
    """
    for path, prompt in pairs:
        try:
            video = read_video(path, most_frames)
            asked = _asked(path, prompt, video, scorer.frame_stride, magnitudes)
            found = _score_one(scorer, path, prompt, video, asked, with_pictures)
        except ValueError as error:
            found = Scored(path, prompt, {}, error=str(error))
        yield found


def keep(
    scored: Iterable[Scored], folder: Path, progress: Progress, save_every: float = 10.0
) -> list[Scored]:
    """Writes each picture as it comes, and folder/scores.json with the first video, then every so
    many seconds, and at the end; a file of before stays until there is a video to write. Returns
    the rows without their pictures, of which a long list would not fit."""
    rows: list[Scored] = []
    records: list[dict[str, object]] = []
    saved = -math.inf
    try:
        for done, row in enumerate(scored):
            if row.picture:
                write_atomically(folder / picture_name(done + 1, row.path), row.picture)
            rows.append(dataclasses.replace(row, picture=b""))
            records.append(dataclasses.asdict(rows[-1]) | {"picture": bool(row.picture)})
            progress.update(done)
            if time.monotonic() - saved > save_every:
                write_summary(folder / "scores.json", {"videos": records})
                saved = time.monotonic()
    finally:
        progress.close()
        if records:
            write_summary(folder / "scores.json", {"videos": records})
    return rows


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


def picture_name(number: int, path: str) -> str:
    """The file of a video's picture: its number and the beginning of its name, which may be as long
    as a file system allows."""
    stem = os.fsencode(Path(path).stem)[:100].decode("utf-8", "ignore")
    return f"{number:03d}-{stem}.png"


def check_any(rows: Sequence[Scored]) -> None:
    """Raises ValueError unless one of the videos at least was scored."""
    if all(row.error for row in rows):
        raise ValueError(f"none of the {len(rows)} videos could be scored; the table says why")


def named(rows: Sequence[Scored], names: Sequence[str]) -> list[str]:
    """Those of the names that every scored video has: rewards that were not asked have no score."""
    scored = [row.scores for row in rows if not row.error]
    return [name for name in names if all(name in scores for scores in scored)]


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
    scorer: Scorer,
    path: str,
    prompt: str,
    video: np.ndarray,
    asked: np.ndarray,
    with_pictures: bool,
) -> Scored:
    parts = placement.batch_parts(scorer.mesh)
    batch = arrays.to_global(np.repeat(video[None], parts, 0), arrays.batched(scorer.mesh))
    kept: list[Evidence] = []
    scores = scorer(
        batch, [prompt] * parts, np.repeat(asked[None], parts, 0),
        seen=lambda evidence, _: kept.append(evidence),
    )  # fmt: skip
    measured = {**scores.parts, "total": scores.total}
    values = {name: float(arrays.to_host(value)[0]) for name, value in measured.items()}
    (evidence,) = kept
    if evidence.texture is not None:
        least = float(arrays.to_host(evidence.texture)[0].min())
        if least < likeness.BLANK:
            text = (
                f"{path} has a frame that shows next to nothing (texture {least:.4f}, below "
                f"{likeness.BLANK:.4f})"
            )
            return Scored(path, prompt, {}, error=text)
    picture = b""
    if with_pictures and evidence.reconstruction is not None:
        one = jax.tree.map(
            lambda leaf: jnp.asarray(arrays.to_host(leaf)[:1]), evidence.reconstruction
        )
        stride = scorer.frame_stride
        reward = scorer.choice.rewards.get("trajectory")
        depth_scale = reward.depth_scale if isinstance(reward, Trajectory) else 1.0
        picture = pictures.sheet(video[::stride], one, asked[::stride], depth_scale=depth_scale)
    return Scored(path, prompt, values, picture=picture)
