"""How well policies tell captions apart, as the contrast of captions teaches it, and where from.

python -m tests.measure.told_apart --adapters runs/world runs/longer

Videos of the base on nano's training prompts, each with the rival that hindsight chooses, are put
on the way to noise, the same for every policy. Printed for each noise level, of videos that obeyed
their caption and of those that did something else: the gap (algorithms/contrast.py), which is above
0 where the caption that the video obeys better fits it better, with its 95% interval over videos;
how many pairs have it above 0; and the mean square difference of the velocities of both captions,
which is what the gap would be, times the misses' size, of a policy that knows how its videos came
about.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from configs.world import get_config
from worldr1_jax import episode, settings
from worldr1_jax.algorithms.contrast import contrast
from worldr1_jax.algorithms.forward import mean_square
from worldr1_jax.evaluation.statistics import paired_bootstrap_ci95
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.policies.stages import Pipeline
from worldr1_jax.rollout.sample import Sampler, sample_keys

BATCH = 32
Pair = tuple[Array, Array, Array, Array]  # latents, own and rival embeddings, lead


def pairs(found: settings.Settings, pipeline: Pipeline, count: int) -> Iterator[Pair]:
    """Videos with their rivals, BATCH at a time; those that nothing clear can be said of with a
    lead of 0."""
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
        rivals = hindsight.choose(prompts, np.random.default_rng((found.run.seed, first)))
        yield (
            rolled.trajectory.latents, rolled.text, pipeline.encode(rivals.prompts),
            jnp.asarray(rivals.lead),
        )  # fmt: skip


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


def rows(name: str, pipeline: Pipeline, every: list[Pair], levels: list[float]) -> Iterator[str]:
    """Lines of the table of one policy."""
    lead = np.concatenate([np.asarray(pair[3]) for pair in every])
    for sigma in levels:
        with arrays.on(pipeline.mesh):
            found = [
                told(pipeline, pipeline.adapters, pipeline.base, pair, sigma, jax.random.key(i))
                for i, pair in enumerate(every)
            ]
        gaps, apart = (np.concatenate([np.asarray(x[i]) for x in found]) for i in range(2))
        for label, mask in (("obeyed", lead > 0), ("did something else", lead < 0)):
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
    every = list(pairs(found, base, args.prompts))
    lead = np.concatenate([np.asarray(pair[3]) for pair in every])
    print(f"{np.sum(lead > 0)} videos obeyed, {np.sum(lead < 0)} did something else")
    print("| policy | noise level | of | gap | above 0 | captions apart |\n" + "| --- " * 6 + "|")
    for name in ("base", *args.adapters):
        adapters = None if name == "base" else settings.load_adapters(found, [name])
        pipeline = settings.build_pipeline(found, mesh, None, adapters) if adapters else base
        for row in rows(name, pipeline, every, args.levels):
            print(row, flush=True)


if __name__ == "__main__":
    main()
