"""How cheaply is each reward won without the thing that it stands for?

python -m tests.measure.gaming [--sheet docs/pictures/gaming.png] [--json gaming.json]

Every term of nano is climbed by its own gradient: by the pixels of a video, from the base policy's
videos and from white noise, and by the latents that the VAE decodes, which is how a policy would
have to do it. Beside these stand cheats that need no gradient. All are scored by all terms.

The table has a row a cheat: mean scores over the videos that can be scored, in bold the term that
is climbed, behind a bar how many cannot. `default` is the sum with nano's own weights, `equal` that
of all terms; "wins" says for how many of the videos a sum is higher than that of the base policy's
video of the same prompt. What cannot be scored wins nothing. Prompts are of held-out scenes.
"""

import argparse
import dataclasses
import io
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from configs.world import get_config
from tests.measure import corruptions
from worldr1_jax import media, settings
from worldr1_jax.camera import commands
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nano import palette, videos
from worldr1_jax.policies import generate
from worldr1_jax.rewards.choice import RECONSTRUCT, Choice, choose
from worldr1_jax.weights.shipped import WEIGHTS

SPATIAL = ("recon", "trajectory", "meta_view", "judge")
PLAIN = ("palette", "hps")
TERMS = (*SPATIAL, *PLAIN)
RATES = {"pixels": 0.02, "latents": 0.05}  # of Adam; pixels are in [0, 1], latents have a std of 1
CARD = 3.0  # distance of the flat card, world units: that of a thing
STICKER = 10  # px
SHOWN, COLUMNS = 3, 3  # frames of a cheat on the sheet, and cheats side by side


class Terms:
    """Scores of B videos and their gradients. One program holds the four terms that look through
    the 3D network, and picks one of them as it runs."""

    def __init__(self, choice: Choice, prompts: Sequence[str], paths: np.ndarray):
        mesh = make_mesh({"data": 1}, jax.devices()[:1])
        networks = {name: choice.rewards[name].networks(mesh, "float32") for name in TERMS}
        networks[RECONSTRUCT] = choice.reconstruct.networks(mesh, "float32")
        self._choice, self._paths = choice, jnp.asarray(paths, jnp.float32)
        self._asked = {name: choice.rewards[name].ask(prompts) for name in TERMS}
        self._graph, self._state = nnx.split(networks)
        self._spatial = self._program(SPATIAL)
        self._plain = {name: self._program((name,)) for name in PLAIN}

    def slope(self, term: str, videos: jax.Array) -> tuple[np.ndarray, jax.Array]:
        """Scores [B] of a term, NaN where there is none, and their gradients, 0 there."""
        program = self._spatial if term in SPATIAL else self._plain[term]
        which = SPATIAL.index(term) if term in SPATIAL else 0
        scores, gradient = program(self._state, videos, which)
        return np.asarray(scores), jnp.nan_to_num(gradient)

    def measure(self, videos: np.ndarray) -> dict[str, np.ndarray]:
        """Scores of all terms."""
        return {term: self.slope(term, jnp.asarray(videos, jnp.float32))[0] for term in TERMS}

    def _program(self, terms: Sequence[str]) -> Callable[..., tuple[jax.Array, jax.Array]]:
        rewards, needs = self._choice.rewards, self._choice.needs(terms)

        @jax.jit
        def program(state, videos, which):
            networks = nnx.merge(self._graph, state)

            def total(videos):
                evidence = self._choice.reconstruct.evidence(
                    networks[RECONSTRUCT], videos, self._paths, needs=needs, renderer="tiled"
                )

                def one(name):
                    return rewards[name].score(networks[name], evidence, self._asked[name])[name]

                scores = jax.lax.switch(which, [partial(one, name) for name in terms])
                return jnp.nansum(scores), scores

            (_, scores), gradient = jax.value_and_grad(total, has_aux=True)(videos)
            return scores, gradient

        return program


class Pixels:
    """Videos by their pixels."""

    def __init__(self, videos: np.ndarray):
        self.free = jnp.asarray(videos, jnp.float32)

    def decode(self, free: jax.Array) -> jax.Array:
        return jnp.clip(free, 0, 1)

    def pull(self, free: jax.Array, gradient: jax.Array) -> jax.Array:
        """By what is free, where `gradient` is by the video."""
        return gradient


class Latents:
    """Videos by the latents of the shipped VAE."""

    def __init__(self, videos: np.ndarray):
        vae = wan_vae.load(WEIGHTS / "vae")
        self.free = jax.jit(vae.encode)(jnp.asarray(videos, jnp.float32))
        self.decode = jax.jit(vae.decode)
        self.pull = jax.jit(lambda free, gradient: jax.vjp(vae.decode, free)[1](gradient)[0])


def climb(terms: Terms, term: str, start: Pixels | Latents, rate: float, steps: int) -> np.ndarray:
    """The videos with the best score of a term that Adam finds from a start; a video that has no
    score at first stays as it is until it has one."""
    optimizer = optax.adam(rate)

    @jax.jit
    def step(free, state, gradient):
        updates, state = optimizer.update(-gradient, state)
        free = optax.apply_updates(free, updates)
        return jnp.clip(free, 0, 1) if isinstance(start, Pixels) else free, state

    free, state = start.free, optimizer.init(start.free)
    best, found = None, None
    for count in range(steps + 1):
        video = start.decode(free)
        scores, gradient = terms.slope(term, video)
        if best is None:
            best, found = scores, np.asarray(video)
        better = (scores > best) | (np.isfinite(scores) & ~np.isfinite(best))
        best = np.where(better, scores, best)
        found = np.where(better[:, None, None, None, None], video, found)
        if count < steps:
            free, state = step(free, state, start.pull(free, gradient))
    return found


# ---- Cheats without a gradient -------------------------------------------------------------------


def named(prompt: str) -> np.ndarray:
    """The colours that a prompt names [C 3]."""
    chosen = palette.targets([prompt])[0]
    return np.array(list(palette.PALETTE.values()))[chosen]


def bands(video: np.ndarray, prompt: str) -> np.ndarray:
    """Nothing but the colours that the prompt names, side by side."""
    colors = named(prompt)
    place = np.arange(video.shape[2]) * len(colors) // video.shape[2]
    return np.broadcast_to(colors[place], video.shape)


def stickers(video: np.ndarray, prompt: str) -> np.ndarray:
    """A square of each colour that the prompt names, stuck to the screen."""
    out = video.copy()
    for place, color in enumerate(named(prompt)):
        out[:, -STICKER:, place * STICKER : (place + 1) * STICKER] = color
    return out


def simple(base: np.ndarray, prompts: Sequence[str], paths: np.ndarray) -> dict[str, np.ndarray]:
    """By name; made of the base policy's videos, or of nothing."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(size=base.shape)
    told = list(zip(base, prompts, strict=True))
    cards = [corruptions.card(v[0], path, CARD) for v, path in zip(base, paths, strict=True)]
    return {
        "white noise": noise,
        "noise that stands still": np.repeat(noise[:, :1], base.shape[1], 1),
        "grey": np.full_like(base, 0.5),
        "bands of the named colours": np.stack([bands(*pair) for pair in told]),
        "stickers of the named colours": np.stack([stickers(*pair) for pair in told]),
        "a still": np.repeat(base[:, :1], base.shape[1], 1),
        "blur": np.stack([corruptions.blur(video, 1.0, rng) for video in base]),
        "a flat card on the asked path": np.stack(cards),
    }


def scenes(seed: int, count: int) -> videos.Videos:
    """Held-out scenes that the camera is asked to move in."""
    drawn = videos.sample(seed, 3 * count, held_out=True)
    moves = [commands.parse(text) not in ((), ("fixed",)) for text in drawn.captions]
    rows = np.flatnonzero(moves)[:count]
    kept = {
        field.name: [getattr(drawn, field.name)[row] for row in rows]
        for field in dataclasses.fields(drawn)
    }
    return videos.Videos(**{k: v if k == "captions" else np.stack(v) for k, v in kept.items()})


# ---- The table -----------------------------------------------------------------------------------


def line(name: str, scores: dict, base: dict, sums: dict[str, dict[str, float]], own: str) -> str:
    """A row of the table."""
    cells = []
    for term in TERMS:
        lost = int(np.sum(~np.isfinite(scores[term])))
        mean = f"{np.nanmean(scores[term]):.2f}" if lost < len(scores[term]) else "none"
        cells.append((f"**{mean}**" if term == own else mean) + (f" ({lost} lost)" if lost else ""))
    for weights in sums.values():
        total, before = (weighed(one, weights) for one in (scores, base))
        known = np.isfinite(total)
        mean = f"{total[known].mean():.2f}" if known.any() else "none"
        cells.append(f"{mean}, wins {int(np.sum(total > before))} of {len(total)}")
    return f"| {name} | " + " | ".join(cells) + " |"


def weighed(scores: dict, weights: dict[str, float]) -> np.ndarray:
    """The sum of the terms that count; NaN where one is missing."""
    return sum(weight * scores[name] for name, weight in weights.items() if weight)


def sheet(cheats: dict[str, np.ndarray]) -> bytes:
    """A PNG of the first video of each cheat."""
    columns = [list(cheats)[first::COLUMNS] for first in range(COLUMNS)]
    strips = []
    for names in columns:
        shown = np.stack([cheats[name][0] for name in names]).astype(np.float32)
        png = media.contact_sheet(shown, names, SHOWN)
        strips.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
    height = max(len(strip) for strip in strips)
    padded = [
        np.pad(strip, ((0, height - len(strip)), (0, 8), (0, 0)), constant_values=255)
        for strip in strips
    ]
    out = io.BytesIO()
    Image.fromarray(np.concatenate(padded, 1)).quantize(128).save(out, "PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    """Prints the table as it grows, and writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4, help="videos of each cheat")
    parser.add_argument("--steps", type=int, default=100, help="of Adam")
    parser.add_argument("--seed", type=int, default=4321, help="of scenes and videos")
    parser.add_argument("--terms", nargs="*", default=list(TERMS), choices=TERMS)
    parser.add_argument("--sheet", type=Path, help="file for a PNG of all cheats")
    parser.add_argument("--json", type=Path, help="file for the scores of each video")
    args = parser.parse_args()
    began = time.time()
    found = settings.read(get_config("nano"))
    truth = scenes(args.seed, args.prompts)
    pipeline = settings.build_pipeline(found, make_mesh({"data": 1}, jax.devices()[:1]), None)
    made = generate.generate(pipeline, truth.captions, seed=args.seed, batch=args.prompts)
    base = np.stack([np.asarray(one.video) for one in made])
    choice = choose(
        dict.fromkeys(TERMS, 1.0), recon={"likeness": "ssim"}, trajectory={"depth_scale": 4.0},
        reconstruct={"da3": "nano", "frame_stride": 4}, judge={"weights": "nano"},
        hps={"weights": "nano", "fit": "squeeze"},
    )  # fmt: skip
    terms = Terms(choice, truth.captions, truth.camtoworld)
    counted = {name: found.rewards.weights.get(name, 0.0) for name in TERMS}
    sums = {"default": counted, "equal": dict.fromkeys(TERMS, 1.0)}
    print("default weights:", counted)
    print(f"| cheat | {' | '.join((*TERMS, *sums))} |\n|{' --- |' * (1 + len(TERMS) + len(sums))}")

    cheats: dict[str, np.ndarray] = {}
    scored: dict[str, Any] = {}

    def add(name: str, some: np.ndarray, own: str = "") -> None:
        cheats[name], scored[name] = some, terms.measure(some)
        print(line(name, scored[name], scored["the base policy"], sums, own), flush=True)

    add("the base policy", base)
    add("ground truth", truth.video / 255.0)
    for name, some in simple(base, truth.captions, truth.camtoworld).items():
        add(name, some)
    starts = [("pixels", Pixels(base)), ("pixels of noise", Pixels(cheats["white noise"])),
              ("latents", Latents(base))]  # fmt: skip
    for term in args.terms:
        for name, start in starts:
            rate = RATES[name.partition(" ")[0]]
            add(f"{term} by {name}", climb(terms, term, start, rate, args.steps), term)
    print(f"{time.time() - began:.0f} s, {time.process_time():.0f} s of CPU")
    if args.sheet:
        args.sheet.write_bytes(sheet(cheats))
    if args.json:
        rows = {n: {t: s.tolist() for t, s in row.items()} for n, row in scored.items()}
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
