"""Batches of nano videos with captions, exact depth and exact cameras."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from worldr1_jax.camera import trajectory
from worldr1_jax.nano import captions, world

FRAMES, SIZE = 17, 64  # every nano video: frames, height and width in pixels
MAGNITUDES = trajectory.Magnitudes.nano()


@dataclasses.dataclass(frozen=True)
class Videos:
    """Ground truth of a batch."""

    video: np.ndarray  # [B F H W 3] uint8
    depth: np.ndarray  # [B F H W] float16, along the optical axis, world units
    camtoworld: np.ndarray  # [B F 4 4] float32
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def path(names: tuple[str, ...]) -> np.ndarray:
    """The camera's path `[F 4 4]` for these commands."""
    return np.asarray(trajectory.path(names, FRAMES, magnitudes=MAGNITUDES))


def render_specs(specs: list[captions.Spec], rng: np.random.Generator, every: int = 1) -> Videos:
    """Renders each spec once, every so many-th frame of it (a divisor of FRAMES - 1); what a spec
    leaves open comes from `rng`."""
    videos, depths, poses = [], [], []
    for spec in specs:
        pose = path(spec.commands)[::every]
        video, depth = world.render(world.build(spec, rng), pose, height=SIZE, width=SIZE)
        videos.append(np.round(np.asarray(video) * 255).astype(np.uint8))
        depths.append(np.asarray(depth, np.float16))
        poses.append(pose)
    return Videos(np.stack(videos), np.stack(depths), np.stack(poses), [s.text() for s in specs])


def sample(
    seed: int, count: int, *, held_out: bool = False, dynamic_share: float = 0.0, every: int = 1
) -> Videos:
    """Draws specs and renders them; the result is a function of the arguments."""
    rng = np.random.default_rng(seed)
    specs = [
        captions.sample_held_out(rng, held_out, dynamic=bool(rng.random() < dynamic_share))
        for _ in range(count)
    ]
    return render_specs(specs, rng, every)


def cached(
    folder: str | Path, seed: int, count: int, *, chunk: int = 250, every: int = 1, **choices
) -> Videos:
    """`sample` in chunks that are kept as files in `folder`, so that a second stage reads them
    again."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for index in range(0, count, chunk):
        kind = "videos" if every == 1 else f"every{every}"
        file = folder / f"{kind}_{seed}_{index:06d}.npz"
        if not file.is_file():
            size = min(chunk, count - index)
            part = sample(hash_seed(seed, index), size, every=every, **choices)
            unfinished = file.with_name(f"unfinished_{file.name}")
            np.savez(
                unfinished, **{**dataclasses.asdict(part), "captions": np.array(part.captions)}
            )
            unfinished.rename(file)
        with np.load(file) as data:
            parts.append({name: data[name] for name in data.files})
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Videos(
        joined["video"], joined["depth"], joined["camtoworld"], [str(c) for c in joined["captions"]]
    )


def hash_seed(seed: int, index: int) -> int:
    """One seed per chunk, so that chunks can be made in any order."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
