"""Writes wan_dit.npz: a tiny random WanTransformer3DModel of diffusers, an input and its output.

Run as `python -m tests.goldens.make_wan_dit` where torch and diffusers are installed. The parity
tests build their networks and inputs here too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

PATH = Path(__file__).with_name("wan_dit.npz")
FIELDS = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
}


def make_reference(fields, seed):
    """diffusers' network with every parameter random (norm scales and biases included)."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(**fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
    return model


def make_inputs(fields, size, length, seed, batch=2):
    """latents [B f h w C], timestep [B] and text [B N D] as numpy float32."""
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((batch, *size, fields["in_channels"])).astype(np.float32)
    timestep = rng.uniform(0, 1000, batch).astype(np.float32)
    text = rng.standard_normal((batch, length, fields["text_dim"])).astype(np.float32)
    return latents, timestep, text


def run_reference(model, latents, timestep, text):
    """diffusers' answer, channels last."""
    import torch

    with torch.no_grad():
        channels_first = torch.from_numpy(latents).permute(0, 4, 1, 2, 3)
        out = model(channels_first, torch.from_numpy(timestep), torch.from_numpy(text)).sample
    return out.permute(0, 2, 3, 4, 1).numpy()


def main():
    """Writes the golden: `weights/` as save_pretrained wrote them, config, inputs and velocity."""
    model = make_reference(FIELDS, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "diffusion_pytorch_model.safetensors")
        config = (Path(folder) / "config.json").read_text()
    latents, timestep, text = make_inputs(FIELDS, (3, 4, 6), 5, seed=0)
    arrays = {f"weights/{key}": value for key, value in weights.items()}
    arrays |= {"latents": latents, "timestep": timestep, "text": text}
    arrays["velocity"] = run_reference(model, latents, timestep, text)
    np.savez_compressed(PATH, config=json.dumps(json.loads(config)), **arrays)


if __name__ == "__main__":
    main()
