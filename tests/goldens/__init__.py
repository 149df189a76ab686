"""Answers of the publishers' code on small random weights, and the files they came from."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a golden."""
    with np.load(path) as file:
        return dict(file)


def publish(golden: dict[str, np.ndarray], folder: Path, name: str) -> Path:
    """Writes the golden's network as its publisher's save_pretrained did: weights and config."""
    weights = {k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")}
    save_file(weights, folder / name)
    (folder / "config.json").write_text(str(golden["config"]))
    return folder
