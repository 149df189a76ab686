"""How cheaply is each reward won without the thing that it stands for?

python -m tests.measure.gaming [--sheet docs/pictures/gaming.png] [--json gaming.json]

Every term of nano is climbed by its own gradient: by the pixels of a video, from the base policy's
videos and from white noise, and by the latents that the VAE decodes, which is how a policy would
have to do it. So is what nano learns from. Beside these stand cheats that need no gradient. All are
scored by all terms. Prompts are of held-out scenes.

The table has a row a cheat: mean scores over the videos that can be scored, in bold what is
climbed, in brackets how many cannot. Behind them, how far each of SUMS is from that of the base
policy's video of the same prompt, in the mean, and in how many of the videos it wins. What cannot
be scored wins nothing.
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
from worldr1_jax.rewards.choice import RECONSTRUCT, Choice
from worldr1_jax.weights.shipped import WEIGHTS

TERMS = ("recon", "trajectory", "meta_view", "judge", "palette", "hps")
# default: by the weights of nano. learnt: by the same, each term in units of its spread among the
# base policy's videos of a prompt, as nano's advantages have it. equal: all terms, weight 1.
SUMS = ("default", "learnt", "equal")
DRAWN = ("recon", "meta_view", "judge")  # ten times as dear a step as the others: they render
RATES = {
    "pixels": 0.01,
    "latents": 0.05,
}  # of the first step; pixels are in [0, 1], latents about 1
CARD = 3.0  # distance of the flat card, world units: that of a thing
STICKER = 10  # px
SAMPLES = 4  # videos a prompt, of which the spreads are
SHOWN, COLUMNS = 3, 3  # frames of a cheat on the sheet, and cheats side by side

Scored = dict[str, np.ndarray]  # by term, [B]
Slope = Callable[[jax.Array], tuple[np.ndarray, jax.Array]]  # scores [B] and gradients of videos


class Terms:
    """Scores of B videos and their gradients. A program a term, for one video at a time: it need
    not be compiled anew for another B."""

    def __init__(self, choice: Choice, prompts: Sequence[str], paths: np.ndarray):
        mesh = make_mesh({"data": 1}, jax.devices()[:1])
        networks = {name: choice.rewards[name].networks(mesh, "float32") for name in TERMS}
        networks[RECONSTRUCT] = choice.reconstruct.networks(mesh, "float32")
        self._choice, self._paths = choice, np.asarray(paths, np.float32)
        self._asked = {name: choice.rewards[name].ask(prompts) for name in TERMS}
        self._graph, self._state = nnx.split(networks)
        self._programs = {name: self._program(name) for name in TERMS}

    def slope(self, weights: dict[str, float], videos: Any) -> tuple[np.ndarray, jax.Array]:
        """Sums of terms [B], NaN where one has no score, and their gradients, 0 there."""
        videos = jnp.asarray(videos, jnp.float32)
        # All are dispatched before any is waited for.
        found = {name: [self._one(name, videos, row) for row in range(len(videos))]
                 for name in weights}  # fmt: skip
        scores = weighed(
            {name: np.concatenate([one[0] for one in each]) for name, each in found.items()},
            weights,
        )
        gradient = sum(
            weights[name] * jnp.concatenate([one[1] for one in each])
            for name, each in found.items()
        )
        return scores, jnp.where(_rows(np.isfinite(scores)), jnp.nan_to_num(gradient), 0.0)

    def measure(self, videos: np.ndarray, terms: Sequence[str] = TERMS) -> Scored:
        """Scores of terms."""
        return {term: self.slope({term: 1.0}, videos)[0] for term in terms}

    def _one(self, name: str, videos: jax.Array, row: int) -> tuple[jax.Array, jax.Array]:
        given = (videos, self._paths, self._asked[name])
        return self._programs[name](self._state, *jax.tree.map(lambda x: x[row : row + 1], given))

    def _program(self, name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
        reward, look = self._choice.rewards[name], self._choice.reconstruct

        def total(videos, state, paths, asked):
            networks = nnx.merge(self._graph, state)
            evidence = look.evidence(
                networks[RECONSTRUCT], videos, paths, needs=reward.needs, renderer="tiled"
            )
            scores = reward.score(networks[name], evidence, asked)[name]
            return jnp.nansum(scores), scores

        @jax.jit
        def program(state, videos, paths, asked):
            slope = jax.value_and_grad(total, has_aux=True)
            (_, scores), gradient = slope(videos, state, paths, asked)
            return scores, gradient

        return program


class Pixels:
    """Videos by their pixels."""

    def __init__(self, videos: np.ndarray):
        self.free = jnp.asarray(videos, jnp.float32)

    def within(self, free: jax.Array) -> jax.Array:
        """The nearest that is a video."""
        return jnp.clip(free, 0, 1)

    def decode(self, free: jax.Array) -> jax.Array:
        return free

    def pull(self, free: jax.Array, gradient: jax.Array) -> jax.Array:
        """By what is free, where `gradient` is by the video."""
        return gradient


class Latents:
    """Videos by the latents of the shipped VAE."""

    def __init__(self, videos: np.ndarray):
        vae = wan_vae.load(WEIGHTS / "vae")
        self.free = jax.jit(vae.encode)(jnp.asarray(videos, jnp.float32))
        self.within = lambda free: free
        self.decode = jax.jit(vae.decode)
        self.pull = jax.jit(lambda free, gradient: jax.vjp(vae.decode, free)[1](gradient)[0])


def climb(slope: Slope, start: Pixels | Latents, rate: float, steps: int) -> np.ndarray:
    """The best videos found from a start; one without a score stays as it is.

    Each step goes by `rate` along the sign of the gradient, which moves most where no number may
    move by more. A step to a worse video is taken back and the next is half as long, after one to a
    better video half as long again, video by video: terms such as exp(-error) are so steep that
    what is once lost shows no way back.
    """
    best, found = start.free, np.asarray(start.decode(start.free))
    scores, gradient = slope(start.decode(best))
    uphill, rates = start.pull(best, gradient), np.full(len(scores), rate)
    if not np.isfinite(scores).any():
        return found
    for _ in range(steps):
        free = start.within(best + _rows(rates) * jnp.sign(uphill))
        video = start.decode(free)
        tried, gradient = slope(video)
        better = tried > scores
        best, uphill, found = (
            np.where(_rows(better), new, old)
            for new, old in (
                (free, best), (start.pull(free, gradient), uphill), (video, found),
            )
        )  # fmt: skip
        scores, rates = np.where(better, tried, scores), rates * np.where(better, 1.5, 0.5)
    return found


def _rows(values: np.ndarray) -> np.ndarray:
    """[B] -> [B 1 1 1 1]"""
    return values[:, None, None, None, None]


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


def on_cards(videos: np.ndarray, paths: np.ndarray) -> np.ndarray:
    """Their first frames on a flat card, seen along the paths asked for."""
    pairs = zip(videos, paths, strict=True)
    return np.stack([corruptions.card(video[0], path, CARD) for video, path in pairs])


def simple(base: np.ndarray, prompts: Sequence[str], paths: np.ndarray) -> dict[str, np.ndarray]:
    """By name; made of the base policy's videos, or of nothing."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(size=base.shape)
    told = list(zip(base, prompts, strict=True))
    colors = np.stack([bands(*pair) for pair in told])
    return {
        "white noise": noise,
        "noise that stands still": np.repeat(noise[:, :1], base.shape[1], 1),
        "grey": np.full_like(base, 0.5),
        "bands of the named colours": colors,
        "stickers of the named colours": np.stack([stickers(*pair) for pair in told]),
        "a still": np.repeat(base[:, :1], base.shape[1], 1),
        "blur": np.stack([corruptions.blur(video, 1.0, rng) for video in base]),
        "a flat card on the asked path": on_cards(base, paths),
        "a card of the named colours": on_cards(colors, paths),
    }


def scenes(seed: int, count: int) -> videos.Videos:
    """Held-out scenes that the camera is asked to move in."""
    drawn = videos.sample(seed, 3 * count, held_out=True)
    moves = [commands.parse(text) not in ((), ("fixed",)) for text in drawn.captions]
    rows = np.flatnonzero(moves)[:count]

    def kept(values: Any) -> Any:
        return [values[row] for row in rows] if isinstance(values, list) else values[rows]

    fields = [field.name for field in dataclasses.fields(drawn)]
    return videos.Videos(**{name: kept(getattr(drawn, name)) for name in fields})


# ---- The table -----------------------------------------------------------------------------------


def weighed(scores: Scored, weights: dict[str, float]) -> np.ndarray:
    """The sum of the terms that count; NaN where one is missing."""
    return np.sum([weight * scores[name] for name, weight in weights.items() if weight], axis=0)


def spread(scores: np.ndarray) -> float:
    """Std of scores [prompts samples] around the mean of their prompt, as in an advantage."""
    known = scores[np.isfinite(scores).all(1)]
    return float((known - known.mean(1, keepdims=True)).std())


def sums(counted: dict[str, float], spreads: dict[str, float]) -> dict[str, dict[str, float]]:
    """Weights of SUMS."""
    learnt = {name: weight / spreads[name] for name, weight in counted.items()}
    return dict(zip(SUMS, (counted, learnt, dict.fromkeys(TERMS, 1.0)), strict=True))


def line(
    name: str, scores: Scored, base: Scored, sums: dict[str, dict[str, float]], own: Sequence[str]
) -> str:
    """A row of the table, with `own` in bold."""
    cells = [name]
    for term in TERMS:
        known = scores[term][np.isfinite(scores[term])]
        mean = f"{known.mean():.2f}" if len(known) else "none"
        lost = f" ({len(scores[term]) - len(known)})" if 0 < len(known) < len(scores[term]) else ""
        cells.append((f"**{mean}**" if term in own else mean) + lost)
    for weights in sums.values():
        gain = weighed(scores, weights) - weighed(base, weights)
        known = gain[np.isfinite(gain)]
        mean = f"{known.mean():+.2f}" if len(known) else "none"
        cells.append(f"{mean}, {int(np.sum(gain > 0))} of {len(gain)}")
    return f"| {' | '.join(cells)} |"


def sheet(cheats: dict[str, np.ndarray]) -> bytes:
    """A PNG of the first video of each cheat."""
    names = list(cheats)
    strips = []
    for first in range(min(COLUMNS, len(names))):
        shown = np.stack([cheats[name][0] for name in names[first::COLUMNS]]).astype(np.float32)
        png = media.contact_sheet(shown, names[first::COLUMNS], SHOWN)
        strips.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
    height = max(len(strip) for strip in strips)
    padded = [
        np.pad(strip, ((0, height - len(strip)), (0, 8), (0, 0)), constant_values=255)
        for strip in strips
    ]
    out = io.BytesIO()
    Image.fromarray(np.concatenate(padded, 1)).quantize(128).save(out, "PNG", optimize=True)
    return out.getvalue()


class Table:
    """Cheats and their scores, printed and written as they come."""

    def __init__(self, terms: Terms, base: Scored, sums: dict[str, dict[str, float]], files: Any):
        self._terms, self._base, self._sums, self._files = terms, base, sums, files
        self._videos: dict[str, np.ndarray] = {}
        self._scores: dict[str, Scored] = {}
        print(
            f"| cheat | {' | '.join((*TERMS, *sums))} |\n|{' --- |' * (1 + len(TERMS) + len(sums))}"
        )

    def add(self, name: str, videos: np.ndarray, own: Sequence[str] = ()) -> None:
        """Scores videos, prints their row, and writes both files anew."""
        self._videos[name], self._scores[name] = videos, self._terms.measure(videos)
        print(line(name, self._scores[name], self._base, self._sums, own), flush=True)
        if self._files.sheet:
            self._files.sheet.write_bytes(sheet(self._videos))
        if self._files.json:
            rows = {n: {t: s.tolist() for t, s in row.items()} for n, row in self._scores.items()}
            self._files.json.write_text(
                json.dumps({"weights": self._sums, "scores": rows}, indent=1)
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=3, help="videos of each cheat")
    parser.add_argument("--steps", type=int, default=100, help="of a climb")
    parser.add_argument(
        "--drawn-steps", type=int, default=25, help="of a climb of the terms that render"
    )
    parser.add_argument("--seed", type=int, default=4321, help="of scenes and videos")
    parser.add_argument("--climb", nargs="*", default=[*TERMS, "learnt"], choices=[*TERMS, *SUMS])
    parser.add_argument("--sheet", type=Path, help="file for a PNG of all cheats")
    parser.add_argument("--json", type=Path, help="file for the scores of each video")
    return parser.parse_args()


def main() -> None:
    """Prints the table as it grows."""
    args, began = arguments(), time.time()
    config = get_config("nano")
    config.rewards.weights.judge = 0.0  # it is measured too
    found = settings.read(config)
    truth = scenes(args.seed, args.prompts)
    pipeline = settings.build_pipeline(found, make_mesh({"data": 1}, jax.devices()[:1]), None)
    made = generate.generate(
        pipeline, truth.captions, seed=args.seed, samples=SAMPLES, batch=args.prompts
    )
    videos = np.stack([np.asarray(one.video) for one in made])
    videos = videos.reshape(args.prompts, SAMPLES, *videos.shape[1:])
    terms = Terms(found.rewards, truth.captions, truth.camtoworld)
    counted = {name: weight for name, weight in found.rewards.weights.items() if weight}
    scored = [terms.measure(videos[:, number], list(counted)) for number in range(SAMPLES)]
    spreads = {term: spread(np.stack([one[term] for one in scored], 1)) for term in counted}
    weights = sums(counted, spreads)
    print("weights:", counted, "spreads:", {term: round(one, 3) for term, one in spreads.items()})
    base = videos[:, 0]
    table = Table(terms, terms.measure(base), weights, args)
    table.add("the base policy", base)
    table.add("ground truth", truth.video / 255.0)
    table.add("ground truth of another prompt", np.roll(truth.video / 255.0, 1, 0))
    cheats = simple(base, truth.captions, truth.camtoworld)
    for name, some in cheats.items():
        table.add(name, some)
    starts: dict[str, Pixels | Latents] = {
        "pixels": Pixels(base),
        "pixels of noise": Pixels(cheats["white noise"]),
        "latents": Latents(base),
    }
    for climbed in args.climb:
        chosen = weights.get(climbed, {climbed: 1.0})
        for name, start in starts.items():
            steps = args.drawn_steps if set(chosen) & set(DRAWN) else args.steps
            rate = RATES[name.partition(" ")[0]]
            best = climb(partial(terms.slope, chosen), start, rate, steps)
            table.add(f"{climbed} by {name}", best, list(chosen))
    print(f"{time.time() - began:.0f} s, {time.process_time():.0f} s of CPU")


if __name__ == "__main__":
    main()
