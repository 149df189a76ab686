"""How well policies tell captions apart, as the contrast of captions teaches it, and where from.

python -m tests.measure.told_apart --adapters runs/world runs/longer

Videos of the base on nano's training prompts, each with the rival that hindsight chooses, are put
on the way to noise, the same for every policy. Printed for each noise level, of videos that obeyed
their caption and of those that did something else: the gap (algorithms/contrast.py), which is above
0 where the caption that the video obeys better fits it better, with its 95% interval over videos;
how many pairs have it above 0; and the mean square difference of the velocities of both captions,
which is what the gap would be, times the misses' size, of a policy that knows how its videos came
about. "Pan or move" is the same of videos that were asked for one of these and made one of them,
beside the other, which moves the picture alike and differs by parallax alone.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from configs.world import get_config
from worldr1_jax import episode, settings
from worldr1_jax.algorithms.contrast import contrast
from worldr1_jax.algorithms.forward import mean_square
from worldr1_jax.camera import commands
from worldr1_jax.evaluation.statistics import paired_bootstrap_ci95
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.policies.stages import Pipeline
from worldr1_jax.rewards.hindsight import CLEAR, LEAST, Rivals, clauses
from worldr1_jax.rollout.sample import Sampler, sample_keys

BATCH = 32
ALIKE = {
    "move_left": "pan_left", "pan_left": "move_left", "move_right": "pan_right",
    "pan_right": "move_right",
}  # fmt: skip
LABELS = (
    ("obeyed", "did something else"),
    ("pan or move, obeyed", "pan or move, did the other"),
)
Pair = tuple[Array, Array, Array, Array]  # latents, own and rival embeddings, lead


def pairs(found: settings.Settings, pipeline: Pipeline, count: int) -> Iterator[tuple[Pair, Pair]]:
    """Videos with their rivals, and with what looks alike, BATCH at a time; those that nothing
    clear can be said of with a lead of 0."""
    scorer = settings.build_scorer(found, pipeline.mesh)
    hindsight = settings.make_hindsight(found, pipeline)
    assert hindsight is not None  # nano contrasts captions
    chosen = settings.load_prompts(found).train[:count]
    for first in range(0, len(chosen), BATCH):
        prompts = chosen[first : first + BATCH]
        keys = sample_keys(jax.random.key(found.run.seed), len(prompts), first=first)
        rolled = pipeline.roll(
            pipeline.adapters, prompts, keys, sampler=Sampler(kind="none"),
            text_null=pipeline.negative(), guidance=found.sample.guidance,
        )  # fmt: skip
        episode.judge(pipeline, scorer, rolled, off=found.rewards.measured(), witness=hindsight.see)
        alike = beside_what_looks_alike(prompts, hindsight.rows)
        rivals = hindsight.choose(prompts, np.random.default_rng((found.run.seed, first)))
        kept, text = rolled.trajectory.latents, rolled.text
        some, like = (
            (kept, text, pipeline.encode(one.prompts), jnp.asarray(one.lead))
            for one in (rivals, alike)
        )
        yield some, like


def beside_what_looks_alike(prompts: Sequence[str], rows: Mapping[int, np.ndarray]) -> Rivals:
    """Of a pan the move, and of a move the pan, for videos that clearly made one of them."""
    every = clauses()
    rivals, leads = list(prompts), np.zeros(len(prompts), np.float32)
    for place, row in rows.items():
        asked = tuple(move.name for move in commands.moves(prompts[place]))
        if len(asked) == 1 and asked[0] in ALIKE:
            other = every.index((ALIKE[asked[0]],))
            own, its = row[0], row[1 + other]
            if max(own, its) >= LEAST and abs(own - its) >= CLEAR:
                rivals[place] = commands.replaced(prompts[place], every[other])
                leads[place] = own - its
    return Rivals(rivals, leads)


@functools.partial(jax.jit, static_argnames="pipeline")
def told(
    pipeline: Pipeline, adapters, base, pair: Pair, sigma: Array, key: Array
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """The gap of each pair, and how far the velocities of its captions are apart."""
    kept, text, rival, lead = pair
    noise = jax.random.normal(key, kept.shape)
    noised, level = (1 - sigma) * kept + sigma * noise, jnp.full(len(kept), sigma)
    own, other = (pipeline.velocity(adapters, base, noised, 1000 * level, t) for t in (text, rival))
    _, gap = contrast(own, other, noise - kept, level, lead, sharpness=1.0, margin=0.0)
    return gap, mean_square(own - other)


def rows(
    name: str,
    pipeline: Pipeline,
    every: Sequence[Pair],
    levels: Sequence[float],
    labels: tuple[str, str],
) -> Iterator[str]:
    """Lines of the table of one policy: of leads above 0, and below."""
    lead = np.concatenate([np.asarray(pair[3]) for pair in every])
    for sigma in levels:
        with arrays.on(pipeline.mesh):
            found = [
                told(pipeline, pipeline.adapters, pipeline.base, pair, sigma, jax.random.key(i))
                for i, pair in enumerate(every)
            ]
        gaps, apart = (np.concatenate([np.asarray(x[i]) for x in found]) for i in range(2))
        for label, mask in zip(labels, (lead > 0, lead < 0), strict=True):
            gap = gaps[mask]
            low, high = paired_bootstrap_ci95(np.zeros_like(gap), gap, 0)
            yield (
                f"| {name} | {sigma:g} | {label} | {gap.mean():+.3f} [{low:+.3f}, {high:+.3f}] | "
                f"{np.mean(gap > 0):.0%} | {apart[mask].mean():.3f} |"
            )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", nargs="*", default=[], help="workdirs of runs, or LoRA")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.6, 0.75, 0.85, 0.92, 0.97])
    parser.add_argument("--seed", type=int, default=100)
    args = parser.parse_args()
    config = get_config("nano")
    config.seed = args.seed
    found, mesh = settings.read(config), make_mesh({"data": 1}, jax.devices()[:1])
    base = settings.build_pipeline(found, mesh, None)
    sets = dict(zip(LABELS, zip(*pairs(found, base, args.prompts), strict=True), strict=True))
    for labels, every in sets.items():
        lead = np.concatenate([np.asarray(pair[3]) for pair in every])
        print(f"{labels[0]}: {np.sum(lead > 0)} videos; {labels[1]}: {np.sum(lead < 0)}")
    print("| policy | noise level | of | gap | above 0 | captions apart |\n" + "| --- " * 6 + "|")
    for name in ("base", *args.adapters):
        adapters = None if name == "base" else settings.load_adapters(found, [name])
        pipeline = settings.build_pipeline(found, mesh, None, adapters) if adapters else base
        for labels, every in sets.items():
            for row in rows(name, pipeline, every, args.levels, labels):
                print(row, flush=True)


if __name__ == "__main__":
    main()
