"""Makes the folder of LPIPS out of what its two halves are published as: torch files.

python -m worldr1_jax.models.lpips_files --trunk=alexnet-owt-7be5be79.pth --folder=weights/lpips

Needs torch, and the lpips package or its heads (--heads), once; training needs neither.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from worldr1_jax.models import lpips


def convert_published(trunk: str | Path, heads: str | Path, folder: str | Path) -> None:
    """Writes folder/model.safetensors from torchvision's and the lpips package's files.

    torch reads them, as tensors alone: the heads are in its format from before 1.6, which
    `weights.torch_zip` does not read.

    Raises:
      ValueError: a key that is missing, unknown, or of another shape, named.
    """
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for path in (trunk, heads):
        tensors |= dict(torch.load(path, map_location="cpu", weights_only=True))
    kept = {k: v.contiguous() for k, v in tensors.items() if not k.startswith("classifier.")}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(kept, Path(folder) / lpips.FILENAME)
    lpips.load(folder)  # strictly: a wrong file is refused here, not when training starts


def main(arguments: list[str] | None = None) -> None:
    """Writes what `rewards.recon.lpips` reads."""
    parser = argparse.ArgumentParser(prog="python -m worldr1_jax.models.lpips_files")
    parser.add_argument("--trunk", required=True, help="torchvision's alexnet-owt-7be5be79.pth")
    parser.add_argument("--heads", help="lpips' weights/v0.1/alex.pth; by default as installed")
    parser.add_argument("--folder", required=True, help="where model.safetensors is written")
    flags = parser.parse_args(arguments)
    package = importlib.util.find_spec("lpips")
    if importlib.util.find_spec("torch") is None or not (flags.heads or package):
        parser.error("this needs torch and lpips: pip install torch && pip install --no-deps lpips")
    if not flags.heads and package and package.origin:
        flags.heads = Path(package.origin).parent / "weights" / "v0.1" / "alex.pth"
    try:
        convert_published(flags.trunk, flags.heads, flags.folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"--config.rewards.recon.lpips={flags.folder}")


if __name__ == "__main__":
    main()
