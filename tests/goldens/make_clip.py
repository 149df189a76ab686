"""Writes clip.npz: a tiny random CLIPModel of transformers, inputs and its embeddings.

Run as `python -m tests.goldens.make_clip` where torch is installed. The parity tests build their
networks here too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

PATH = Path(__file__).with_name("clip.npz")
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "hidden_act": "gelu",
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 12,
    "hidden_act": "gelu",
    "bos_token_id": 48,
    "eos_token_id": 49,
}


def make_reference(vision, text, projection, seed):
    """transformers' network with every parameter random (norm scales and biases included)."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPConfig(
        vision_config={**VISION, **vision}, text_config={**TEXT, **text}, projection_dim=projection
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif name != "logit_scale":
                parameter.normal_(0.0, 0.3)
    return model


def make_inputs(side, vocabulary, length, seed):
    """Frames [3 side side 3], as preprocessed, and token ids [4 length] that end with the largest
    id, at once, in the middle, twice and at the last place."""
    rng = np.random.default_rng(seed)
    frames = rng.normal(size=(3, side, side, 3)).astype(np.float32)
    ids = rng.integers(0, vocabulary - 2, (4, length))
    for row, ends in enumerate(([0], [length // 2], [length // 2, length - 1], [length - 1])):
        ids[row, ends] = vocabulary - 1
    return frames, ids.astype(np.int32)


def run_reference(model, frames, ids):
    """transformers' embeddings of frames and of prompts, of length 1."""
    import torch

    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(ids).long(), pixel_values=pixels)
    return out.image_embeds.numpy(), out.text_embeds.numpy()


def main():
    """Writes the golden: `weights/` as save_pretrained wrote them, config, inputs, embeddings."""
    model = make_reference({}, {}, 20, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        config = (Path(folder) / "config.json").read_text()
    frames, ids = make_inputs(VISION["image_size"], TEXT["vocab_size"], 12, seed=0)
    image, text = run_reference(model, frames, ids)
    arrays = {f"weights/{key}": value for key, value in weights.items()}
    arrays |= {"frames": frames, "token_ids": ids, "image": image, "text": text}
    np.savez_compressed(PATH, config=json.dumps(json.loads(config)), **arrays)


if __name__ == "__main__":
    main()
