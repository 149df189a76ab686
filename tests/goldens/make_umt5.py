"""Writes umt5.npz: a tiny random UMT5EncoderModel of transformers, an input and its output.

Run as `python -m tests.goldens.make_umt5` where torch is installed. The parity tests build their
networks here too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

PATH = Path(__file__).with_name("umt5.npz")
FIELDS = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
}


def make_reference(fields, seed):
    """transformers' network with every parameter random (norm scales and biases included)."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.normal_(1.0, 0.2)
            if "relative_attention_bias" in name:
                parameter.normal_(0.0, 1.0)
    return model


def make_inputs(fields, length, seed):
    """Token ids and mask, [3 N]: a full prompt, half of one and a single token."""
    ids = np.random.default_rng(seed).integers(0, fields["vocab_size"], (3, length))
    ends = np.array([[length], [max(1, length // 2)], [1]])
    return ids.astype(np.int32), (np.arange(length)[None] < ends).astype(np.int32)


def run_reference(model, ids, mask):
    """transformers' last hidden state, padding included."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(ids), torch.from_numpy(mask))
    return out.last_hidden_state.numpy()


def main():
    """Writes the golden: `weights/` as save_pretrained wrote them, config, inputs, embeddings."""
    model = make_reference(FIELDS, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        config = (Path(folder) / "config.json").read_text()
    ids, mask = make_inputs(FIELDS, 21, seed=0)
    arrays = {f"weights/{key}": value for key, value in weights.items()}
    arrays |= {"token_ids": ids, "mask": mask, "embeddings": run_reference(model, ids, mask)}
    np.savez_compressed(PATH, config=json.dumps(json.loads(config)), **arrays)


if __name__ == "__main__":
    main()
