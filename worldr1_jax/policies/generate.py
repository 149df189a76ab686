"""Prompts to videos, one by one: what `launch/generate.py` runs, for other programs too."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from worldr1_jax.camera import commands
from worldr1_jax.data import prompts as prompt_files
from worldr1_jax.data.loader import check_seed
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.nn.lora import Adapters
from worldr1_jax.policies.stages import Pipeline
from worldr1_jax.rollout import unipc
from worldr1_jax.rollout.sample import Sampler


@dataclasses.dataclass(frozen=True)
class Generated:
    """One video [F H W 3] in [0, 1], and what it was made from."""

    prompt: str
    number: int  # of the prompt's videos, from 0
    video: Float[np.ndarray, "F H W 3"]

    @property
    def name(self) -> str:
        """A file name that only prompt and number decide: words of the prompt, its hash, number."""
        words = "-".join(re.findall(r"[a-z0-9]+", self.prompt.lower()))[:48].strip("-")
        return f"{words or 'video'}-{_digest(self.prompt):08x}-{self.number}"


def tag(made_by: Sequence[Any], adapters: Adapters | None) -> str:
    """Six digits that any other setting, or any other number of the adapters, changes: for names of
    files that do not write over those of others."""
    found = hashlib.sha256(repr(list(made_by)).encode())
    for path, (a, b, scale) in sorted((adapters or {}).items()):
        found.update(repr((path, a.shape, scale)).encode())
        for half in (a, b):
            found.update(np.asarray(half).tobytes())
    return found.hexdigest()[:6]


def read_prompts(source: str) -> list[str]:
    """The prompts of a file in its order, or of standard input for "-", by the rules of
    data/prompts.py: .jsonl records, of whatever split, or text, one prompt a line.

    Raises:
      ValueError: a file that cannot be read, or a prompt that is none, named by its line.
    """
    if source.endswith(".jsonl"):
        found = [one["prompt"] for one in prompt_files.records(source, ("prompt",))]
        commands.check_prompts(found)
        return found
    if source == "-":
        return prompt_files.texts(sys.stdin.buffer.read(), "standard input", commands.complaint)
    return prompt_files.texts(prompt_files.read_content(source), source, commands.complaint)


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    samples: int = 1,
    batch: int = 1,
    adapters: Any = None,
    solver: unipc.UniPC | None = None,
) -> Iterator[Generated]:
    """Videos in the order of the prompts, `samples` each.

    A video's noise follows from (seed, prompt, its number) alone, and every batch has one size, so
    that the same prompt and seed give the same bytes whatever else is asked for.

    Args:
      pipeline: the model, its video size, schedule, guidance and camera.
      prompts: any texts; camera commands at their head steer the starting noise.
      seed: 0 to 2^32 - 1.
      samples: videos per prompt, >= 1.
      batch: videos at a time, a multiple of the devices that share a batch; the last batch is
        filled up with repeats, which are dropped.
      adapters: LoRA leaves as `pipeline.adapters`; None is the pipeline's own.
      solver: UniPC (`unipc.make`); None is Euler on the pipeline's sigmas.

    Raises:
      ValueError: as `check`, at once and not with the first video.
    """
    check([*prompts, pipeline.sampling.negative_prompt], pipeline.mesh, seed, samples, batch)
    return _generate(pipeline, prompts, seed, samples, batch, adapters, solver)


def check(
    prompts: Sequence[str], mesh: jax.sharding.Mesh, seed: int, samples: int, batch: int
) -> None:
    """What `generate` can say before a weight is read.

    Raises:
      ValueError: a seed out of range, samples or batch below 1, a batch that the mesh does not
        divide, or prompts that are no texts or ask for a camera movement that is none.
    """
    check_seed(seed)
    prompt_files.check_texts(prompts)
    commands.check_prompts(prompts)
    parts = sharding.batch_parts(mesh)
    if samples < 1 or batch < 1 or batch % parts:
        raise ValueError(
            f"samples is {samples} and batch {batch}: both have to be at least 1, and batch a "
            f"multiple of the {parts} devices that share it"
        )


def _generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seed: int,
    samples: int,
    batch: int,
    adapters: Any,
    solver: unipc.UniPC | None,
) -> Iterator[Generated]:
    guidance = pipeline.sampling.guidance
    text_null = pipeline.negative() if guidance != 1 else None
    sampler = Sampler(kind="none", guidance=guidance)
    adapters = pipeline.adapters if adapters is None else adapters
    wanted = [(prompt, number) for prompt in prompts for number in range(samples)]
    for first in range(0, len(wanted), batch):
        chosen = wanted[first : first + batch]
        filled = chosen + [chosen[-1]] * (batch - len(chosen))
        texts = [prompt for prompt, _ in filled]
        rolled = pipeline.roll(
            adapters, texts, _keys(seed, filled), sampler=sampler, text_null=text_null,
            solver=solver,
        )  # fmt: skip
        videos = pipeline.decode(rolled.trajectory.latents)
        for row, (prompt, number) in enumerate(chosen):
            yield Generated(prompt, number, arrays.to_host(videos[row]))
        del videos  # the next rollout needs the room


def _keys(seed: int, wanted: Sequence[tuple[str, int]]) -> jax.Array:
    base = jax.random.key(seed)
    keys = [
        jax.random.fold_in(jax.random.fold_in(base, _digest(prompt)), number)
        for prompt, number in wanted
    ]
    return jnp.stack(keys)


def _digest(prompt: str) -> int:
    """32 bits of the prompt's hash."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
