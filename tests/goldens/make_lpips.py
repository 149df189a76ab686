"""Distances by the lpips package on weights made from a seed, and the file that tests read.

python tests/goldens/make_lpips.py    (torch and lpips installed)
"""

from pathlib import Path

import numpy as np

from worldr1_jax.models import lpips

SIZE = (33, 40)


def weights() -> dict[str, np.ndarray]:
    """Every tensor under its maker's name; the heads are not negative, as published."""
    rng = np.random.default_rng(0)
    tensors = {}
    for index, (number, kernel, _, _, inputs, outputs) in enumerate(lpips.CONVOLUTIONS):
        spread = (2.0 / (inputs * kernel**2)) ** 0.5
        weight = rng.normal(size=(outputs, inputs, kernel, kernel)) * spread
        tensors[f"features.{number}.weight"] = weight.astype(np.float32)
        tensors[f"features.{number}.bias"] = rng.normal(size=outputs).astype(np.float32) * 0.1
        tensors[f"lin{index}.model.1.weight"] = rng.random((1, outputs, 1, 1), np.float32)
    return tensors


def images() -> np.ndarray:
    """Two batches of two images in [0, 1]."""
    return np.random.default_rng(1).random((2, 2, *SIZE, 3), np.float32)


def main() -> None:
    """Prints the package's distances."""
    import torch

    from tests.parity.test_lpips import alexnet, package_on

    tensors = {name: torch.from_numpy(value) for name, value in weights().items()}
    trunk = alexnet(0)
    trunk.load_state_dict({k[9:]: v for k, v in tensors.items() if k.startswith("features.")})
    network = package_on(trunk)
    network.load_state_dict({k: v for k, v in tensors.items() if k.startswith("lin")}, strict=False)
    pair = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in images())
    print(network(*pair, normalize=True).detach().numpy().ravel().tolist(), Path(__file__).name)


if __name__ == "__main__":
    main()
