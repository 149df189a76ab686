"""What the base policy gains when guidance is put on the camera clause alone: a knob that costs
forwards and no training, and what training has to be held against.

python -m tests.measure.camera_guidance --weights 0 1 2 --above 0.85

With v(c) of the whole prompt, v(s) of the same prompt without its camera clause and v(0) of the
negative prompt, a video follows

    v(0) + guidance (v(c) - v(0)) + weight (v(c) - v(s))

where its noise level is not below `above`: 0 is everywhere, and near 1 the camera is decided.

Held-out prompts of nano. Prints S_traj and the rest for each weight, and the paired change from the
first of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from configs.world import get_config
from worldr1_jax import settings
from worldr1_jax.camera import commands
from worldr1_jax.evaluation import held_out
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.policies.stages import Pipeline


def guide(pipeline: Pipeline, weight: float, above: float = 0.0) -> None:
    """Makes this pipeline sample so. A prompt's embedding becomes two, its own and that without the
    clause; the negative prompt's are equal, so that nothing is added there."""
    plain, embed = pipeline.velocity, pipeline.encode
    share = weight / pipeline.sampling.guidance  # which multiplies what velocity returns

    def encode(prompts: Sequence[str]):
        scenes = [commands.scene(prompt) for prompt in prompts]
        return jnp.concatenate([embed(prompts), embed(scenes)], axis=1)

    def velocity(adapters, base, latents, timestep, text, adapters_on=True):
        own, scene = jax.lax.map(
            lambda words: plain(adapters, base, latents, timestep, words, adapters_on),
            jnp.stack(jnp.split(text, 2, axis=1)),
        )
        guided = timestep >= 1000.0 * above
        return own + share * guided.reshape(-1, 1, 1, 1, 1) * (own - scene)

    pipeline.encode, pipeline.velocity = encode, velocity  # type: ignore[method-assign]


def main() -> None:
    """Prints a table for each weight."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 1.0, 2.0])
    parser.add_argument("--above", type=float, default=0.0, help="noise level, 0 to 1")
    parser.add_argument("--guidance", type=float, default=0.0, help="0: the config's")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the noise, as the run's")
    args = parser.parse_args()
    config = get_config("nano")
    config.sample.guidance = args.guidance or config.sample.guidance
    found = settings.read(config)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    scorer = settings.build_scorer(found, mesh)
    prompts = settings.load_prompts(found).test[: args.prompts]
    exam = held_out.Exam(prompts, jax.random.key(args.seed), samples=2, batch=16)
    first = None
    for weight in args.weights:
        pipeline = settings.build_pipeline(found, mesh, None)
        guide(pipeline, weight, args.above)
        measures, _ = held_out.measure(
            pipeline, scorer, pipeline.adapters, exam, guidance=found.sample.guidance,
            text_null=pipeline.negative(),
        )  # fmt: skip
        first = measures if first is None else first
        print(f"weight {weight:g}, from {args.weights[0]:g}", flush=True)
        print(held_out.table(held_out.report(first, measures, args.seed)), flush=True)


if __name__ == "__main__":
    main()
