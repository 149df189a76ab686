"""What the nano networks can do on held-out scenes, in the figures that their makers promise.

python launch/pretrain_nano.py --stage=check --config=configs/world.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldr1_jax.camera import commands
from worldr1_jax.geometry import rotation_angle
from worldr1_jax.models import clip
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nano import captions, damage, videos
from worldr1_jax.rewards import Scorer, judge
from worldr1_jax.rewards.reconstruct import frame_indices

TURNS = ("pan_left", "pan_right", "orbit_left", "orbit_right")
MOVES = ("push_in", "pull_out", "move_left", "move_right")


def vae_psnr(folder: Path, truth: videos.Videos, batch: int = 16) -> float:
    """Mean PSNR of decode(encode(video)) over videos, dB."""
    vae = wan_vae.load(folder)
    again = jax.jit(lambda video: vae.decode(vae.encode(video)))
    values = []
    for i in range(0, len(truth) - batch + 1, batch):
        video = jnp.asarray(truth.video[i : i + batch], jnp.float32) / 255.0
        error = jnp.mean((again(video) - video) ** 2, (1, 2, 3, 4))
        values.append(-10 * jnp.log10(error))
    return float(jnp.concatenate(values).mean())


def retrieval(
    folder: Path, truth: videos.Videos, among: int = 32, views: int = 8
) -> dict[str, Any]:
    """How well CLIP tells which sentence about a scene belongs to a video, by the mean cosine over
    `views` frames.

    Returns:
      retrieval: share of videos whose own sentence beats those of `among - 1` others, exact over
        every choice of them;
      altered: the share whose own sentence beats itself with one thing in it wrong.
    """
    network = clip.load(folder)
    words = clip.Tokenizer(folder, network.config.max_position_embeddings)
    scenes = [commands.scene(caption) for caption in truth.captions]
    rng = np.random.default_rng(0)
    wrong = [captions.altered(scene, rng) for scene in scenes]
    text = network.text(jnp.asarray(words([*scenes, *wrong])))
    frames = truth.video[:, frame_indices(truth.video.shape[1], views)]
    frames = frames.reshape(-1, *frames.shape[2:]).astype(np.float32) / 255
    embed = jax.jit(lambda x: network.image(clip.preprocess(x, network.config, "squeeze")))
    image = embed(frames).reshape(len(truth), views, -1).mean(1)
    cosine = np.asarray(image @ text.T)
    own, others = np.diag(cosine), cosine[:, : len(truth)]
    better = (others > own[:, None]).sum(1)
    choices = math.comb(len(truth) - 1, among - 1)
    found = [math.comb(len(truth) - 1 - int(n), among - 1) / choices for n in better]
    told = own > np.diag(cosine[:, len(truth) :])
    return {"retrieval": float(np.mean(found)), "altered": float(np.mean(told))}


def grading(folder: Path, views: int = 256) -> dict[str, Any]:
    """How well the judge's grades of views of held-out scenes follow their damage.

    Returns:
      spearman: rank correlation of grade and 1 - damage, 1 at best;
      answered: share of views that it grades at all;
      of each way to break a scene, by its name: the mean grade of views broken in that way alone
        (or not at all, "clean").
    """
    seen = damage.sample(12345, views, held_out=True)
    grades = judge.make(folder)(seen.images / 255.0, judge.NANO_QUESTION)
    return {"spearman": spearman(grades, -seen.damage), **by_kind(grades, seen)}


def by_kind(grades: np.ndarray, seen: damage.Graded) -> dict[str, Any]:
    """The share of views with a grade, and mean grades by what broke them."""
    alone = (seen.broken > 0).sum(1) == 1
    chosen = {"clean": ~seen.broken.any(1)}
    for index, kind in enumerate(damage.BREAKS):
        chosen[kind.__name__] = alone & (seen.broken[:, index] > 0)
    means = {name: float(np.nanmean(grades[rows])) for name, rows in chosen.items() if rows.any()}
    return {"answered": float(np.mean(np.isfinite(grades))), **means}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two rows of numbers, pairs that are not finite left out; equal numbers
    have the mean of their ranks."""
    sound = np.isfinite(a) & np.isfinite(b)

    def ranks(x: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(a[sound]), ranks(b[sound]))[0, 1])


def reconstruction(scorer: Scorer, truth: videos.Videos, batch: int = 16) -> dict[str, Any]:
    """Cameras and re-rendering of ground-truth videos, and the rewards that they get.

    Returns:
      rotation_error_degrees: median over videos with one turning command, at the last frame;
      direction_cosine: median over videos with one moving command, at the last frame;
      psnr, recon, trajectory: means over all videos.
    """
    rotation: list[float] = []
    cosine: list[float] = []
    scores: dict[str, list[np.ndarray]] = {}
    for i in range(0, len(truth) - batch + 1, batch):
        video = jnp.asarray(truth.video[i : i + batch], jnp.float32) / 255.0
        asked = truth.camtoworld[i : i + batch]
        evidence = scorer.look(video, asked)
        captions = truth.captions[i : i + batch]
        for name, value in scorer.measure(evidence, captions).items():
            scores.setdefault(name, []).append(np.asarray(value))
        poses = np.asarray(evidence.found().camtoworld)[:, -1]
        wanted = asked[:, :: scorer.frame_stride][:, -1]
        angle = np.degrees(
            np.asarray(rotation_angle(np.swapaxes(wanted[:, :3, :3], 1, 2) @ poses[:, :3, :3]))
        )
        for k, caption in enumerate(captions):
            clause = caption.lower().split(".")[0].replace(" ", "_")
            if any(clause == f"camera_{name}" for name in TURNS):
                rotation.append(angle[k])
            if any(clause == f"camera_{name}" for name in MOVES):
                a, b = wanted[k, :3, 3], poses[k, :3, 3]
                cosine.append(float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-9)))
    return {
        "rotation_error_degrees": float(np.median(rotation)),
        "direction_cosine": float(np.median(cosine)),
        **{name: float(np.nanmean(np.concatenate(values))) for name, values in scores.items()},
    }


def noise_scores(scorer: Scorer, truth: videos.Videos, batch: int = 16) -> dict[str, float]:
    """The rewards that videos of white noise get against the same asked paths."""
    shape = (batch, *truth.video.shape[1:])
    noise = jnp.asarray(np.random.default_rng(0).uniform(size=shape), jnp.float32)
    evidence = scorer.look(noise, truth.camtoworld[:batch])
    scores = scorer.measure(evidence, truth.captions[:batch])
    return {name: float(np.nanmean(np.asarray(value))) for name, value in scores.items()}
