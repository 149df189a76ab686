"""Trained adapters from wherever they are: folders of runs, or files of LoRA."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from worldr1_jax import files
from worldr1_jax.fields import is_number
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
    adapters = lora.from_state(jax.device_get(found), alpha)
    try:
        lora.check(nnx.eval_shape(lambda: wan_dit.WanDiT(config, nnx.Rngs(0))), adapters)
    except ValueError as error:
        raise ValueError(f"{path} is of another network: {error}") from error
    return adapters


def load_all(specs: Sequence[str], config: wan_dit.Config, kind: str = "ema") -> lora.Adapters:
    """The adapters of several paths together; "path:0.8" gives those of a path a strength, which is
    1 without. Arguments and errors as for `load`, and for a strength or a product that is not
    finite."""
    named = map(strength_of, specs)
    return _together(specs, [(load(path, config, kind), strength) for path, strength in named])


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
                with np.errstate(over="ignore", invalid="ignore"):
                    into[block] = into.get(block, np.float32(0)) + np.float32(strength) * value
                _check_finite(specs, leaf, into[block])
    return lora_files.Lora(dict(_together(specs, adapters)), differences)


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


def _together(specs: Sequence[str], several: list[tuple[lora.Adapters, float]]) -> lora.Adapters:
    """Joined; one alone, at its own strength, keeps its bits."""
    alone = len(several) == 1 and several[0][1] == 1
    found = several[0][0] if alone else lora.joined(several)
    for path, adapter in found.items():
        _check_finite(specs, path, adapter.a, adapter.b)
    return found


def _check_finite(specs: Sequence[str], path: str, *arrays: Any) -> None:
    """One number that is not would reach every output."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            f"adapters {', '.join(specs)}: '{path}' has numbers that are not finite in float32, as "
            "they are or by their strength"
        )


def _alpha(run: Path) -> float:
    """policy.lora_alpha of a run, which its config.json keeps."""
    path = run / checkpoint.CONFIG
    policy = files.read_json(path).get("policy") if os.path.lexists(path) else None
    alpha: Any = policy.get("lora_alpha") if isinstance(policy, dict) else None
    if not is_number(alpha, 1e-6, 1e6):  # as policies.base.Options has it
        raise ValueError(
            f"{run} has no config.json of a run: policy.lora_alpha gives the adapters' scale"
        )
    return float(alpha)


def _is_run(path: Path, kind: str) -> bool:
    if kind not in KINDS:
        raise ValueError(f"the kind of adapters is '{kind}': it is {' or '.join(KINDS)}")
    return os.path.isdir(path / "checkpoints")
