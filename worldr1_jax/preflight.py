"""Before anything is loaded or compiled: whether a run can be had, and whether a folder is its own.

`check_files` comes first, for the mesh already asks for the policy's shape; then `check`. Of a run
that goes on, `contents` and `MAY_CHANGE` say what has to be as it was, and `identity` what all
hosts have to have in common.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

import worldr1_jax
from worldr1_jax import settings
from worldr1_jax.camera import commands, trajectory
from worldr1_jax.data import text_cache
from worldr1_jax.data.prompts import PromptSets
from worldr1_jax.fields import defaults_of
from worldr1_jax.mesh import placement
from worldr1_jax.nn import lora
from worldr1_jax.policies.adapters import strength_of
from worldr1_jax.policies.base import family
from worldr1_jax.rewards.base import REWARDS, find
from worldr1_jax.rewards.reconstruct import Reconstruct
from worldr1_jax.settings import Settings
from worldr1_jax.weights import needed
from worldr1_jax.weights.needed import Needed
from worldr1_jax.weights.shipped import resolve

# What a resume may change without becoming another run: memory, speed, pictures, and how long. Of
# what is learnt it changes the rounding of sums at most, as another mesh does.
MAY_CHANGE = (
    "num_updates", "checkpoint_every", "checkpoint_keep", "videos_every", "evaluate", "fps", "mesh",
    "idle_on_host", "policy.text_cache", "policy.chunked_vae", "policy.remat",
    "sample.videos_at_once", "train.microbatches",
)  # fmt: skip


def check_files(found: Settings) -> None:
    """Raises ValueError that names every network that is missing, where to get it and its size; to
    be called first, for the mesh already asks for the policy's shape."""
    needed.check((_policy(found), *found.rewards.needed()))


def check_policy(found: Settings) -> None:
    """The part of `check` that sampling videos depends on."""
    folder = resolve(found.policy.weights)
    family(folder).read(folder).latents(found.run.size)


def check(found: Settings, mesh: jax.sharding.Mesh, prompts: PromptSets) -> None:
    """Raises ValueError for what would only fail later, after minutes of loading and compiling."""
    check_policy(found)
    _check_start(found)
    found.rewards.check()
    found.rewards.check_frames(found.run.frames)
    trajectory.check_fit(settings.texts(found, prompts), found.run.frames)
    cache = settings.open_text_cache(found)
    if cache is not None:
        cache.check(settings.texts(found, prompts))
    parts = placement.batch_parts(mesh)
    if found.run.videos % parts:
        raise ValueError(
            f"groups x group_size is {found.run.videos} videos, which the mesh's data x fsdp = "
            f"{parts} cannot divide"
        )
    placement.turns(mesh, found.run.videos, found.sample.videos_at_once)
    _check_step(found, mesh)
    draw = found.algorithm.draw(jax.random.key(0), 0, found.plan)
    if draw.prefix and (found.run.groups % parts or found.camera.mode == "step"):
        raise ValueError(
            f"algorithm.share is 'prefix' and groups is {found.run.groups}: the mesh's data x fsdp "
            f"= {parts} has to divide the groups, and camera.mode must not be step; noise has no "
            "such conditions"
        )
    if draw.prefix:
        placement.turns(mesh, found.run.groups, found.sample.videos_at_once)
    if draw.solver is not None and found.camera.mode == "step":
        raise ValueError("algorithm.solver is 'unipc', which undoes camera.mode=step: use initial")


def _check_start(found: Settings) -> None:
    """Adapters can be trained, and on from those that are given."""
    policy = found.policy
    if policy.dtype == "float16":
        raise ValueError(
            "policy.dtype is 'float16', whose smallest number is larger than the gradients of a "
            "velocity: train in bfloat16 or float32"
        )
    start = settings.load_adapters(found, [policy.adapters]) if policy.adapters else None
    layers = lora.LAYERS[policy.lora_layers]

    def rank(path: str) -> int | None:
        return policy.lora_rank if any(re.fullmatch(layer, path) for layer in layers) else None

    lora.check_growth(start or {}, rank)


def _check_step(found: Settings, mesh: jax.sharding.Mesh) -> None:
    """What an optimizer step evaluates at a time lies on all devices: of another number of videos
    each device would evaluate all."""
    rules, parts = settings.rules_on(found, mesh), placement.batch_parts(mesh)
    rules.check_parts(found.run.videos)
    at_once = found.run.videos // (rules.minibatches * rules.microbatches)
    if at_once % parts:
        raise ValueError(
            f"train.minibatches x train.microbatches is {rules.minibatches * rules.microbatches}: "
            f"the {at_once} videos that are evaluated at a time are not divided by the mesh's data "
            f"x fsdp = {parts}, and each device would evaluate all of them"
        )


def shared_scenes(found: Settings, prompts: PromptSets) -> list[str]:
    """Scenes that are both learnt from and held out, under whatever camera clauses: where captions
    are contrasted, rivals may be the held-out prompts."""
    seen = {commands.scene(text) for texts in _learnt(found, prompts) for text in texts}
    return sorted(seen & {commands.scene(text) for text in prompts.test})


def _learnt(found: Settings, prompts: PromptSets) -> tuple[Sequence[str], Sequence[str]]:
    """Prompts of the main phase, and of the dynamic one, if there is one."""
    return prompts.train, prompts.dynamic if found.dynamic.dynamic_updates else ()


def contents(found: Settings, prompts: PromptSets) -> dict[str, str]:
    """Field of the config that names files -> hash of what they hold, as far as it is learnt
    from."""
    start, strength = strength_of(found.policy.adapters)
    times = "" if strength == 1 else f" times {strength!r}"
    run = Path(start) / "checkpoints"  # of another run, which has more that is not learnt from
    used = repr(_learnt(found, prompts))
    return {
        "prompts": hashlib.sha256(used.encode()).hexdigest(),
        **{one.field: _held(*_files(one)) for one in (_policy(found), *found.rewards.needed())},
        **({"policy.adapters": _held(run if run.is_dir() else start) + times} if start else {}),
    }


def defaults(found: Settings) -> dict[str, Any]:
    """Field of the config -> its default, which a folder from before the field has: that of a new
    field has to do what was done before. None: a reward that is left out."""
    kinds = {**settings.SECTIONS, "algorithm": type(found.algorithm)}
    kinds |= {"rewards.reconstruct": Reconstruct, **{f"rewards.{n}": find(n) for n in REWARDS}}
    return defaults_of(kinds) | {f"rewards.weights.{name}": None for name in REWARDS}


def identity(
    config: ml_collections.ConfigDict, prompts: PromptSets, contents: Mapping[str, str]
) -> dict[str, str]:
    """What hosts have to have in common, as texts: config, prompts, code, and weights."""
    return {
        "config": config.to_json(sort_keys=True),
        "prompts": repr(prompts),
        "version of worldr1_jax and jax": f"{worldr1_jax.__version__} {jax.__version__}",
        "files of weights": repr(sorted(contents.items())),
    }


def _files(one: Needed) -> Sequence[str | Path]:
    """Of what ships, the network's own."""
    return [resolve("nano", part) for part in one.parts] if one.value == "nano" else [one.value]


def _held(*paths: str | Path) -> str:
    return text_cache.fingerprint(paths)


def _policy(found: Settings) -> Needed:
    sizes = {"large": ("Wan-AI/Wan2.1-T2V-14B", "69 GB")}
    what, size = sizes.get(found.run.variant, ("Wan-AI/Wan2.1-T2V-1.3B", "18 GB"))
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    return Needed("policy.weights", found.policy.weights, what, size, "Apache-2.0", parts)
