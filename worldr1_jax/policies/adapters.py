"""Trained adapters from wherever they are: folders of runs, or files of LoRA."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from worldr1_jax import files
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import lora_files
from worldr1_jax.nn import lora
from worldr1_jax.workdir import checkpoint

KINDS = ("ema", "last")


def load(path: str | Path, config: wan_dit.Config, kind: str = "ema") -> lora.Adapters:
    """Adapters for a network of this config, for `lora.attach`.

    Args:
      path: the workdir of a run of launch/tpu_train.py, whose newest checkpoint is read, or what
        `lora_files.load` reads.
      config: shape of the network.
      kind: of a run, "ema" (the average, which its report evaluates) or "last".

    Raises:
      ValueError: a path that is neither, a damaged checkpoint, or adapters of another network.
    """
    path = files.local(path)
    if not _is_run(path, kind):
        return lora_files.load(path, config)
    _, state = checkpoint.read_state(path)
    alpha = _alpha(path)
    found = state.get("ema" if kind == "ema" else "adapters")
    if not isinstance(found, dict):
        raise ValueError(f"the checkpoint of {path} holds no adapters: it is of another program")
    # On the host, as those of files: they may go onto any mesh.
    return lora.from_state(jax.device_get(found), alpha)


def load_all(specs: Sequence[str], config: wan_dit.Config, kind: str = "ema") -> lora.Adapters:
    """The adapters of several paths together; "path:0.8" gives those of a path a strength, which is
    1 without. Arguments and errors as for `load`, and for a strength that is not finite."""
    named = map(strength_of, specs)
    return _together([(load(path, config, kind), strength) for path, strength in named])


def read_all(specs: Sequence[str], config: wan_dit.Config, kind: str = "ema") -> lora_files.Lora:
    """`load_all` with the differences of whole weights that files hold, to be folded in."""
    adapters: list[tuple[lora.Adapters, float]] = []
    differences: dict[str, dict[int | None, np.ndarray]] = {}
    for path, strength in map(strength_of, specs):
        if _is_run(files.local(path), kind):
            adapters.append((load(path, config, kind), strength))
            continue
        found = lora_files.read(path, config)
        adapters.append((found.adapters, strength))
        for leaf, blocks in found.differences.items():
            into = differences.setdefault(leaf, {})
            for block, value in blocks.items():
                into[block] = into.get(block, np.float32(0)) + np.float32(strength) * value
    return lora_files.Lora(dict(_together(adapters)), differences)


def strength_of(spec: str) -> tuple[str, float]:
    """Path and strength: "lora.safetensors:0.8" has 0.8, what exists as it is written has 1.

    Raises:
      ValueError: a strength that is not finite.
    """
    path, colon, text = spec.rpartition(":")
    strength = math.nan
    with contextlib.suppress(ValueError):
        strength = float(text)
    if not colon or os.path.lexists(spec) or (math.isnan(strength) and text.lower() != "nan"):
        return spec, 1.0
    if not math.isfinite(strength):
        raise ValueError(f"adapters '{spec}' have the strength {text}; it has to be finite")
    return path, strength


def _together(several: list[tuple[lora.Adapters, float]]) -> lora.Adapters:
    """Joined; one alone, at its own strength, keeps its bits."""
    if len(several) == 1 and several[0][1] == 1:
        return several[0][0]
    return lora.joined(several)


def _alpha(run: Path) -> float:
    """policy.lora_alpha of a run, which its config.json keeps."""
    path = run / checkpoint.CONFIG
    policy = files.read_json(path).get("policy") if os.path.lexists(path) else None
    alpha = policy.get("lora_alpha") if isinstance(policy, dict) else None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(
            f"{run} has no config.json of a run: policy.lora_alpha gives the adapters' scale"
        )
    return float(alpha)


def _is_run(path: Path, kind: str) -> bool:
    if kind not in KINDS:
        raise ValueError(f"the kind of adapters is '{kind}': it is {' or '.join(KINDS)}")
    return os.path.isdir(path / "checkpoints")
