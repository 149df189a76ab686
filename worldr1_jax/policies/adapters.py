"""Trained adapters from wherever they are: the folder of a run, or a file of LoRA."""

from __future__ import annotations

import json
from pathlib import Path

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
    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"the kind of adapters is '{kind}': it is {' or '.join(KINDS)}")
    if not (path / "checkpoints").is_dir():
        return lora_files.load(path, config)
    try:
        alpha = float(json.loads((path / "config.json").read_text())["policy"]["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has no config.json of a run: policy.lora_alpha gives the adapters' scale"
        ) from error
    _, state = checkpoint.read_state(path)
    return lora.from_state(state["ema" if kind == "ema" else "adapters"], alpha)
