"""Writes qwen3_vl.npz: a tiny random Qwen3VLForConditionalGeneration of transformers, images, a
question, and the logits of the next token.

Run as `python -m tests.goldens.make_qwen3_vl` where torch is installed. The parity tests build
their networks here too.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

PATH = Path(__file__).with_name("qwen3_vl.npz")
IMAGE, START, END = 60, 61, 62  # ids of the special tokens below a vocabulary of 64
SIZE = (32, 48)  # 2 x 3 tokens
PREPROCESSOR = {"size": {"shortest_edge": 256, "longest_edge": 16_777_216}}
TINY = {
    "text_config": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8,
        "out_hidden_size": 32, "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1, 2],
    },
    "tie_word_embeddings": True,
    "image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END,
    "video_token_id": 63,
}  # fmt: skip


def fields_of(text=None, vision=None, **others):
    """TINY with some fields of its parts replaced."""
    fields = copy.deepcopy(TINY)
    fields["text_config"] |= text or {}
    fields["vision_config"] |= vision or {}
    return fields | others


def make_reference(fields, seed):
    """transformers' network with every parameter random, large enough for each to be seen."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3VLConfig(**copy.deepcopy(fields))
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            if parameter.ndim == 1:
                parameter.normal_(1.0 if norm else 0.0, 0.2)
            elif "embed" in name:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    return model


def save_reference(model, folder):
    """The publisher's folder, with bounds on pixels that let small images pass as they are."""
    model.save_pretrained(folder)
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def make_inputs(fields, images, size, seed, pads=(0, 0)):
    """Token ids [B N], mask [B N] and images [B V H W 3], which need no resizing; a row for each
    number of padding tokens on the left, with text before, between and behind the images."""
    rng = np.random.default_rng(seed)
    vision = fields["vision_config"]
    side = vision["patch_size"] * vision.get("spatial_merge_size", 2)
    tokens = (size[0] // side) * (size[1] // side)

    def words(count):
        return list(rng.integers(1, IMAGE, count))

    rows = []
    for pad in pads:
        row = words(3)
        for _ in range(images):
            row += [START, *[IMAGE] * tokens, END, *words(2)]
        rows.append([0] * pad + row + words(4 + max(pads) - pad))
    ids = np.array(rows, np.int32)
    mask = np.arange(ids.shape[1])[None] >= np.array(pads)[:, None]
    return ids, mask, rng.random((len(pads), images, *size, 3), np.float32)


def pixel_values(fields, images):
    """Patches [patches, features] and grids [images, 3], as the published processor flattens
    images [S H W 3] that need no resizing."""
    vision = fields["vision_config"]
    p, m = vision["patch_size"], vision.get("spatial_merge_size", 2)
    t = vision.get("temporal_patch_size", 2)
    count, height, width, _ = images.shape
    grid = (height // p, width // p)
    x = (images * 2 - 1).transpose(0, 3, 1, 2)
    x = x.reshape(count, 3, grid[0] // m, m, p, grid[1] // m, m, p)
    x = x.transpose(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    x = np.repeat(x, t, axis=6).reshape(count * grid[0] * grid[1], -1)
    return x, np.array([[1, *grid]] * count)


def run_reference(model, fields, ids, mask, images):
    """transformers' logits at the last position, [B vocabulary]."""
    import torch

    patches, grids = pixel_values(fields, images.reshape(-1, *images.shape[2:]))
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            pixel_values=torch.from_numpy(patches),
            image_grid_thw=torch.from_numpy(grids),
            mm_token_type_ids=torch.from_numpy((ids == IMAGE).astype(np.int32)),
        )
    return out.logits[:, -1].numpy()


def main():
    """Writes the golden: `weights/` as save_pretrained wrote them in half precision, which is half
    the file, config, inputs, and the logits of a network with these weights in float32."""
    fields = fields_of({"num_hidden_layers": 3}, {"depth": 3, "deepstack_visual_indexes": [0, 2]})
    model = make_reference(fields, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(model).half().save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        config = (Path(folder) / "config.json").read_text()
    ids, mask, images = make_inputs(fields, 2, SIZE, seed=0, pads=(0, 5))
    images = np.round(images * 255).astype(np.uint8)
    for parameter in model.parameters():  # and no buffer, such as RoPE's frequencies
        parameter.data = parameter.data.half().float()
    logits = run_reference(model, fields, ids, mask, images.astype(np.float32) / 255)
    arrays = {f"weights/{key}": value for key, value in weights.items()}
    arrays |= {"token_ids": ids, "mask": mask, "images": images, "logits": logits}
    np.savez_compressed(PATH, config=json.dumps(json.loads(config)), **arrays)


if __name__ == "__main__":
    main()
