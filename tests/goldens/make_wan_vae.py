"""Writes wan_vae.npz: a tiny random AutoencoderKLWan of diffusers, an input and its outputs.

Run as `python -m tests.goldens.make_wan_vae` where torch and diffusers are installed. The parity
tests build their networks here too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

PATH = Path(__file__).with_name("wan_vae.npz")
FIELDS = {
    "base_dim": 4,
    "z_dim": 3,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.3, -0.2, 0.1],
    "latents_std": [0.5, 2.0, 1.5],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}


def make_reference(fields, seed):
    """diffusers' network with every parameter random (norm scales and biases included)."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLWan(**fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run_reference(model, video):
    """video [B F H W 3] in [0, 1] -> mean, logvar [B f h w C], and the decoded mean [B F H W 3]."""
    import torch

    def last(x):
        return x.permute(0, 2, 3, 4, 1).numpy()

    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist
        decoded = model.decode(posterior.mode()).sample
    return last(posterior.mode()), last(posterior.logvar), last(decoded) / 2 + 0.5


def make_video(shape, seed):
    """Uniform noise: [B F H W 3] float32 in [0, 1]."""
    return np.random.default_rng(seed).uniform(size=(*shape, 3)).astype(np.float32)


def main() -> None:
    model = make_reference(FIELDS, seed=0)
    video = make_video((1, 9, 16, 24), seed=0)
    mean, logvar, decoded = run_reference(model, video)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "diffusion_pytorch_model.safetensors")
        config = (Path(folder) / "config.json").read_text()
    arrays = {f"weights/{name}": value for name, value in weights.items()}
    np.savez_compressed(
        PATH,
        config=json.dumps(json.loads(config)),
        video=video,
        mean=mean,
        logvar=logvar,
        decoded=decoded,
        **arrays,
    )
    print(PATH.name, PATH.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
