"""Trains every nano network from nothing: VAE, 3D network (its cameras, then the whole), policy
with its text encoder, CLIP, and the judge.

Each stage reads ground truth from `nano.videos`, trains (`nano.fit`), and writes the publisher's
files. A stage is a function of its seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file, save_file

from worldr1_jax import geometry
from worldr1_jax.camera import commands
from worldr1_jax.mesh import arrays
from worldr1_jax.models import clip, umt5
from worldr1_jax.models.da3 import gaussians as da3_gaussians
from worldr1_jax.models.da3 import model as da3
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nano import captions, damage, tokenizer, world
from worldr1_jax.nano.fit import Batch, Schedule, fit
from worldr1_jax.nano.videos import Videos
from worldr1_jax.splat import render as splat

TOKENS = 32  # caption length in tokens, padded
CAPTION_DROPOUT = 0.1
# What the policy's captions say of the camera is wrong this often, as it is in captions of video
# from the web, and the policy learns to obey accordingly. It is what RL has to put right.
CAPTION_ERROR = 0.3
TURN_SHARE = 3  # pans and orbits, the hardest movements to draw, come so many times as often

# (steps, learning rate, batch) of each stage; the batch of "vae" is in frames. The shipped weights
# were made in three rounds: AdamW on a sharper world; these stages with `start` at its result, with
# exact captions (camera: 1100 steps of AdamW; policy: 2800 steps); the policy once more as here.
STEPS = {
    "vae": (1000, 2e-3, 32),
    "camera": (1100, 1e-3, 10),
    "da3": (650, 8e-4, 6),
    "policy": (2500, 1.5e-3, 48),
    "clip": (450, 2e-3, 96),
    "judge": (900, 3e-3, 48),
}
VIEWS = 8000  # that the judge learns from; 2,000 it knows by heart, and grades others worse


def run_stage(
    stage: str,
    see: Callable[[], Videos],
    weights: Path,
    *,
    seed: int,
    scale: float = 1.0,
    start: Path | None = None,
    log=print,
) -> None:
    """Trains one stage of `STEPS` with `scale` times its steps, into the folder `weights`.

    `see` gives the training videos; the judge sees none, and makes views beside the folder instead.
    `start` is a folder of weights to go on from, laid out alike; None starts fresh.
    """
    steps, rate, batch = STEPS[stage]
    average = 0.998 if stage == "policy" else 0.99
    schedule = Schedule(max(1, round(steps * scale)), rate, batch, average)
    options: dict[str, Any] = {"seed": seed, "log": log}
    if stage == "judge":
        views = damage.cached(weights.parent / "views", seed, VIEWS, log=log)
        options["start"] = _in(start, "judge")
        damage.train_judge(views, weights / "judge", schedule, **options)
        return
    videos = see()
    if stage == "vae":
        train_vae(videos, weights / "vae", schedule, start=_in(start, "vae"), **options)
    elif stage == "camera":
        options |= {"terms": ("camera",), "frames": 5, "start": _in(start, "da3")}
        train_da3(videos, weights / "da3", schedule, **options)
    elif stage == "da3":
        options |= {"terms": ("camera", "depth", "render"), "frames": 5, "start": weights / "da3"}
        train_da3(videos, weights / "da3", schedule, **options)
    elif stage == "clip":
        train_clip(videos, weights / "clip", schedule, start=_in(start, "clip"), **options)
    else:
        train_policy(videos, weights, schedule, start=start, **options)


def _in(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def pack(weights: Path, folder: Path) -> None:
    """Copies trained weights in half precision, as they ship; names and shapes stay."""
    for source in sorted(weights.rglob("*")):
        target = folder / source.relative_to(weights)
        if source.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".safetensors":
            tensors = {k: v.astype(np.float16) for k, v in load_file(source).items()}
            save_file(tensors, target, metadata={"format": "pt"})
        else:
            target.write_bytes(source.read_bytes())


def train_vae(
    videos: Videos,
    folder: Path,
    schedule: Schedule,
    *,
    seed: int,
    log=print,
    start: Path | None = None,
) -> None:
    """Autoencoder on clips; then measures latent mean and std, as the published config states
    them."""
    if start:
        model = wan_vae.load(start)
    else:
        model = wan_vae.WanVAE(wan_vae.Config.nano(), rngs=nnx.Rngs(seed))
    config = model.config
    graph, params = nnx.split(model)

    def loss(params, batch, key):
        vae = nnx.merge(graph, params)
        video = batch["video"].astype(jnp.float32) / 255.0
        mean, log_var = vae.encode_moments(video)
        noise = jax.random.normal(key, mean.shape)
        decoded = vae.decode_raw(normalise(vae, mean + noise * jnp.exp(0.5 * log_var)))
        error = jnp.mean((decoded - video) ** 2)
        absolute = jnp.mean(jnp.abs(decoded - video))
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_var) - 1 - log_var)
        value = error + 0.1 * absolute + 1e-5 * kl
        return value, {"loss": value, "psnr": -10 * jnp.log10(error), "kl": kl}

    def snapshot(average):
        wan_vae.save(nnx.merge(graph, average), folder)

    rng = np.random.default_rng(seed)
    clips = clip_batches(videos, schedule.batch, rng)
    average = fit(loss, params, clips, schedule, seed=seed, log=log, snapshot=snapshot)
    mean, std = latent_statistics(nnx.merge(graph, average), videos)
    scaled = wan_vae.WanVAE(
        dataclasses.replace(config, latents_mean=tuple(mean), latents_std=tuple(std)),
        rngs=nnx.Rngs(seed),
    )
    nnx.update(scaled, average)
    wan_vae.save(scaled, folder)


def normalise(vae: wan_vae.WanVAE, latents: jax.Array) -> jax.Array:
    """Latents in the publisher's normalised units."""
    mean, std = jnp.array(vae.config.latents_mean), jnp.array(vae.config.latents_std)
    return (latents - mean) / std


def latent_statistics(vae: wan_vae.WanVAE, videos: Videos, count: int = 128) -> tuple[list, list]:
    """Mean and std `[C]` of raw latents over the first videos."""
    encode = nnx.jit(lambda vae, video: vae.encode_moments(video)[0])
    latents = np.concatenate([
        np.asarray(encode(vae, jnp.asarray(videos.video[i : i + 16], jnp.float32) / 255.0))
        for i in range(0, min(count, len(videos)), 16)
    ])  # fmt: skip
    flat = latents.reshape(-1, latents.shape[-1])
    return [float(v) for v in flat.mean(0)], [float(v) for v in flat.std(0)]


def clip_batches(videos: Videos, frames: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Random clips of about `frames` frames together: many short ones, some of whole videos.

    Five frames teach a causal convolution most of what it needs, but a decoder that never saw the
    later frames of a video drifts there. A shape is drawn per batch, so that only as many programs
    are compiled as there are shapes.
    """
    longest = videos.video.shape[1]
    while True:
        length = int(rng.choice([5, 9, longest], p=[0.5, 0.2, 0.3]))
        batch = max(1, round(frames / length))
        rows = rng.integers(0, len(videos), batch)
        starts = rng.integers(0, longest - length + 1, batch)
        clips = np.stack(
            [videos.video[r, s : s + length] for r, s in zip(rows, starts, strict=True)]
        )
        flips = rng.random(batch) < 0.5
        clips[flips] = clips[flips][:, :, :, ::-1]
        yield {"video": clips}


def mirror_caption(caption: str) -> str:
    """The caption of the mirrored video: left and right change places."""
    swap = {"left": "right", "right": "left"}
    words = caption.replace(",", " ,").replace(".", " .").split()
    return " ".join(swap.get(w, w) for w in words).replace(" ,", ",").replace(" .", ".")


def encode_all(
    vae: wan_vae.WanVAE, videos: Videos, batch: int = 32
) -> tuple[np.ndarray, list[str]]:
    """Normalised latents of every video and of its mirror image, with their captions."""
    encode = nnx.jit(lambda vae, video: vae.encode(video.astype(jnp.float32) / 255.0))
    latents = []
    for mirrored in (False, True):
        for i in range(0, len(videos), batch):
            part = videos.video[i : i + batch]
            padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), 0)])
            padded = padded[:, :, :, ::-1] if mirrored else padded
            latents.append(np.asarray(encode(vae, padded))[: len(part)])
    return np.concatenate(latents), videos.captions + [mirror_caption(c) for c in videos.captions]


def train_policy(
    videos: Videos,
    folder: Path,
    schedule: Schedule,
    *,
    seed: int,
    log=print,
    start: Path | None = None,
) -> None:
    """Flow matching of the DiT, and the text encoder with it; captions are dropped for guidance."""
    tokens = tokenizer.build()
    tokenizer.save(folder / "tokenizer")
    vae = wan_vae.load(folder / "vae", dtype=jnp.float32)
    latents, texts = encode_all(vae, videos)
    log(f"{len(latents)} latents, mean {latents.mean():.3f}, std {latents.std():.3f}")
    rngs = nnx.Rngs(seed)
    if start:
        dit = wan_dit.load(start / "transformer", remat="dots")
        text = umt5.load(start / "text_encoder")
    else:
        dit = wan_dit.WanDiT(wan_dit.Config.nano(), rngs=rngs, remat="dots")
        text = umt5.UMT5Encoder(umt5.Config.nano(), rngs=rngs)
    (dit_graph, dit_params), (text_graph, text_params) = nnx.split(dit), nnx.split(text)

    def loss(params, batch, key):
        noise_key, sigma_key = jax.random.split(key)
        size = batch["latents"].shape[0]
        embedded = encode_text(nnx.merge(text_graph, params["text"]), batch["ids"], batch["mask"])
        # Stratified over the batch: less noise in the gradient at no cost. Shift 3, as in sampling.
        uniform = (jnp.arange(size) + jax.random.uniform(sigma_key, (size,))) / size
        sigma = 3 * uniform / (1 + 2 * uniform)
        noise = jax.random.normal(noise_key, batch["latents"].shape)
        weight = sigma[:, None, None, None, None]
        noisy = (1 - weight) * batch["latents"] + weight * noise
        velocity = nnx.merge(dit_graph, params["dit"])(noisy, sigma * 1000.0, embedded)
        error = jnp.mean((velocity - (noise - batch["latents"])) ** 2)
        return error, {"loss": error}

    def snapshot(average):
        wan_dit.save(nnx.merge(dit_graph, average["dit"]), folder / "transformer")
        umt5.save(nnx.merge(text_graph, average["text"]), folder / "text_encoder")

    def batches():
        rng = np.random.default_rng(seed)
        share = np.array([TURN_SHARE if _turns(text) else 1.0 for text in texts])
        while True:
            rows = rng.choice(len(latents), schedule.batch, p=share / share.sum())
            drawn = [spoilt(texts[row], rng) for row in rows]
            encoded = tokens(drawn, padding="max_length", max_length=TOKENS, return_tensors="np")
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
            yield {"latents": latents[rows], "ids": ids, "mask": mask}

    params = {"dit": dit_params, "text": text_params}
    fit(loss, params, batches(), schedule, seed=seed, log=log, snapshot=snapshot)


def _turns(caption: str) -> bool:
    return any(name in commands.TURNS for name in commands.parse(caption))


def spoilt(text: str, rng: np.random.Generator) -> str:
    """A caption as the policy learns from it: at times dropped, at times wrong about the camera."""
    if rng.random() < CAPTION_DROPOUT:
        return ""
    if rng.random() < CAPTION_ERROR:
        return commands.replaced(text, captions.sample_commands(rng))
    return text


def encode_text(encoder: umt5.UMT5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Embeddings with padded places at zero, as Wan's pipeline gives them to the DiT."""
    return encoder(ids, mask) * mask[..., None]


def train_da3(
    videos: Videos,
    folder: Path,
    schedule: Schedule,
    *,
    terms: tuple[str, ...],
    frames: int,
    seed: int,
    log: Callable[[str], None] = print,
    start: Path | None = None,
) -> None:
    """Depth, cameras and Gaussians from exact depth, exact cameras and re-rendering of other
    frames.

    Args:
      terms: what is learnt: "camera", "depth", "render" (two other frames of each video). Heads
        that no term needs are not run: the camera alone costs a tenth, and needs by far the most
        videos.
      frames: seen of each video, the first one among them; all videos of a batch see the same
        instants.
      start: folder of weights to go on from; None starts fresh.
    """
    network = da3.load(start) if start else da3.DA3(da3.Config.nano(), rngs=nnx.Rngs(seed))
    graph, params = nnx.split(network)
    size = videos.video.shape[2:4]

    def loss(params, batch, key):
        network = nnx.merge(graph, params)
        video = batch["video"].astype(jnp.float32) / 255.0
        raw = network.forward(video)
        values: dict[str, jax.Array] = {}
        if "camera" in terms:
            values |= camera_terms(raw, batch["camtoworld"])
        if "depth" in terms:
            values |= depth_terms(raw, batch["depth"])
        if "render" in terms:
            values |= render_terms(network, raw, batch["camtoworld"], video, size, key)
        psnr = {"psnr": values.pop("psnr")} if "psnr" in values else {}
        total = sum(values.values())
        return total, {"loss": total, **values, **psnr}

    def batches():
        rng = np.random.default_rng(seed)
        while True:
            rows = rng.integers(0, len(videos), schedule.batch)
            later = 1 + rng.choice(videos.video.shape[1] - 1, frames - 1, replace=False)
            yield mirror_batch(videos, rows, np.sort(np.append(0, later)), rng.random() < 0.5)

    def snapshot(average):
        da3.save(nnx.merge(graph, average), folder)

    fit(loss, params, batches(), schedule, seed=seed, log=log, snapshot=snapshot)


def camera_terms(raw: da3.Raw, camtoworld: jax.Array) -> dict[str, jax.Array]:
    """Losses of the camera decoder against exact cameras whose first one is the identity.

    Squared errors, because most poses of a still or barely moving camera are near zero: under an
    absolute error the network first learns their median, which is to say nothing. The quaternion is
    compared before normalisation, or its length would grow and its gradient vanish.
    """
    quaternion = jnp.roll(geometry.matrix_to_quaternion(camtoworld[..., :3, :3]), -1, -1)  # xyzw
    turn, move = raw.quaternion - quaternion, raw.translation - camtoworld[..., :3, 3]
    fov = 2 * np.arctan(0.5 / world.FOCAL)
    return {
        "rotation": jnp.mean(60 * turn**2 + jnp.abs(turn)),
        "translation": jnp.mean(3 * move**2 + 0.2 * jnp.abs(move)),
        "fov": jnp.mean(jnp.abs(raw.fov - fov)),
    }


def depth_terms(raw: da3.Raw, depth: jax.Array) -> dict[str, jax.Array]:
    """Relative depth error, and a confidence that learns where it is small."""
    depth = da3_gaussians.resample_depth(
        depth.astype(jnp.float32), (raw.depth.shape[2], raw.depth.shape[3])
    )
    error = jnp.abs(jnp.log(raw.depth) - jnp.log(depth))
    confidence = raw.confidence * jax.lax.stop_gradient(error) - 0.05 * jnp.log(raw.confidence)
    return {"depth": jnp.mean(error), "confidence": 0.1 * jnp.mean(confidence)}


def render_terms(
    network, raw, camtoworld, video, size, key, views: int = 2
) -> dict[str, jax.Array]:
    """Error of the Gaussians, placed with exact cameras and the network's depth, seen from `views`
    of the frames."""
    matrix = jnp.asarray(world.intrinsics(*size))
    intrinsics = jnp.broadcast_to(matrix, (*camtoworld.shape[:2], 3, 3))
    gaussians = network.gaussians_from(raw, camtoworld, intrinsics)
    chosen = jax.random.choice(key, camtoworld.shape[1], (views,), replace=False)
    render = partial(splat.render, size=size)
    image = arrays.each_device(render)(gaussians, camtoworld[:, chosen], intrinsics[:, chosen])
    difference = image.rgb - video[:, chosen]
    error = jnp.mean(difference**2)
    return {
        "render": 5 * error + 0.5 * jnp.mean(jnp.abs(difference)),
        "psnr": -10 * jnp.log10(error),
    }


def mirror_batch(videos: Videos, rows: np.ndarray, instants: np.ndarray, mirrored: bool) -> Batch:
    """Videos, depth and cameras of some rows at some frames, seen in a mirror (x to -x) when
    asked."""
    at = np.ix_(rows, instants)
    video, depth, camtoworld = videos.video[at], videos.depth[at], videos.camtoworld[at]
    if mirrored:
        flip = np.diag([-1.0, 1.0, 1.0, 1.0]).astype(np.float32)
        video, depth, camtoworld = video[..., ::-1, :], depth[..., ::-1], flip @ camtoworld @ flip
    return {"video": video, "depth": depth, "camtoworld": camtoworld}


def train_clip(
    videos: Videos,
    folder: Path,
    schedule: Schedule,
    *,
    seed: int,
    log: Callable[[str], None] = print,
    start: Path | None = None,
) -> None:
    """Contrast of frames with the sentences about their scenes, camera left out: each frame has to
    find its own sentence among those of the batch and one that is wrong in a word, each sentence
    its own frame."""
    tokenizer.save(folder)
    vocabulary = tokenizer.vocabulary()
    config = clip.Config.nano(len(vocabulary), vocabulary.index(tokenizer.END))
    network = clip.load(start) if start else clip.CLIP(config, nnx.Rngs(seed))
    words = clip.Tokenizer(folder, config.max_position_embeddings)
    graph, params = nnx.split(network)
    scenes = [commands.scene(caption) for caption in videos.captions]

    def loss(params, batch, key):
        network = nnx.merge(graph, params)
        frames = batch["frames"].astype(jnp.float32) / 255.0
        image = network.image(clip.preprocess(frames, network.config, "squeeze"))
        text, wrong = network.text(batch["ids"]), network.text(batch["wrong"])
        scale = jnp.exp(jnp.minimum(network.logit_scale[...], np.log(100.0)))
        logits, spoilt = scale * image @ text.T, scale * jnp.sum(image * wrong, -1, keepdims=True)
        right = jnp.arange(len(logits))
        of_frames = jnp.concatenate([logits, spoilt], axis=1)
        error = optax.softmax_cross_entropy_with_integer_labels
        value = (error(of_frames, right).mean() + error(logits.T, right).mean()) / 2
        return value, {
            "loss": value,
            "found": jnp.mean(jnp.argmax(logits, 1) == right),
            "told": jnp.mean(jnp.diag(logits) > spoilt[:, 0]),
        }

    def batches():
        rng = np.random.default_rng(seed)
        while True:
            rows = rng.integers(0, len(videos), schedule.batch)
            frames = videos.video[rows, rng.integers(0, videos.video.shape[1], schedule.batch)]
            texts, flips = [scenes[row] for row in rows], rng.random(schedule.batch) < 0.5
            frames = np.where(flips[:, None, None, None], frames[:, :, ::-1], frames)
            texts = [mirror_caption(t) if flip else t for t, flip in zip(texts, flips, strict=True)]
            wrong = [captions.altered(text, rng) for text in texts]
            yield {"frames": frames, "ids": words(texts), "wrong": words(wrong)}

    def snapshot(average):
        clip.save(nnx.merge(graph, average), folder)

    fit(loss, params, batches(), schedule, seed=seed, log=log, snapshot=snapshot)
