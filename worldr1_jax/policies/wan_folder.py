"""Folders of Wan2.1: where the four parts lie in either layout, and what makes another model of
one.

diffusers and launch/convert_weights.py:  transformer/  vae/  text_encoder/  tokenizer/
                          and, of diffusers alone, model_index.json  scheduler/
Wan-Video's own release:  config.json and diffusion_pytorch_model*.safetensors,  Wan2.1_VAE.pth,
                          models_t5_umt5-xxl-enc-bf16.pth,  google/umt5-xxl/
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldr1_jax import files

# Where each part lies in a folder, by layout; "" is the folder itself.
LAYOUTS = {
    "diffusers": {
        "transformer": "transformer",
        "vae": "vae",
        "text_encoder": "text_encoder",
        "tokenizer": "tokenizer",
    },
    "original": {
        "transformer": "",
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "google/umt5-xxl",
    },
}
# What says that a folder is of another model, of which reading the four parts alone would make
# something that nobody trained.
_OTHERS = {
    "transformer_2": "the second expert of Wan2.2-A14B",
    "high_noise_model": "the first expert of Wan2.2-A14B",
    "low_noise_model": "the second expert of Wan2.2-A14B",
    "Wan2.2_VAE.pth": "the VAE of Wan2.2-TI2V-5B",
    "image_encoder": "the image encoder of image-to-video",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "that of image-to-video",
}
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
_MOST_TOKENIZER = 256 * files.MIB
# diffusers' class -> the part that has to be of it.
CLASSES = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
}


def parts(folder: str | Path) -> dict[str, Path]:
    """Paths of transformer, vae, text_encoder and tokenizer.

    Raises:
      ValueError: no such folder, one of neither layout, or a part that is missing, named.
    """
    root = files.local(folder)
    if not str(folder) or not os.path.isdir(root):
        raise ValueError(
            f"policy.weights '{files.short(str(folder))}' is no folder: give one in diffusers' "
            "layout or of Wan-Video's own release"
        )
    _check_model(root)
    places = {name: {p: root / place for p, place in d.items()} for name, d in LAYOUTS.items()}
    there = {
        name: [part for part, path in found.items() if path != root and path.exists()]
        for name, found in places.items()
    }
    layout = max(there, key=lambda name: len(there[name]))
    if not there[layout]:
        names = "; ".join(", ".join(filter(None, d.values())) for d in LAYOUTS.values())
        raise ValueError(
            f"policy.weights {folder} is of neither layout that is read: it needs {names}"
        )
    for part, path in places[layout].items():
        if not path.exists():
            wanted = ", ".join(filter(None, LAYOUTS[layout].values()))
            raise ValueError(
                f"policy.weights {folder} lacks {LAYOUTS[layout][part]}, its {part}: it needs "
                f"{wanted}"
            )
    return places[layout]


def _check_model(root: Path) -> None:
    """Raises ValueError for what makes another model of a folder than the four parts do."""
    for name, what in _OTHERS.items():
        if os.path.lexists(root / name):
            raise ValueError(
                f"policy.weights {root} has {name}, {what}: what is read is Wan2.1's text-to-video "
                "model"
            )
    if not os.path.lexists(root / INDEX):
        return
    index = files.read_json(root / INDEX)
    kind = index.pop("_class_name", None)
    if kind != "WanPipeline":
        raise ValueError(
            f"{root / INDEX} is of {files.short(repr(kind))}: what is read is a 'WanPipeline'"
        )
    for name, value in index.items():
        if name.startswith("_") or name in ("tokenizer", "scheduler"):
            continue
        wanted = CLASSES.get(name)
        made = value[1] if isinstance(value, list) and len(value) == 2 else value
        if made != wanted and (wanted or made):  # null, [null, null] and false: not in use
            raise ValueError(
                f"{root / INDEX} has '{files.short(name)}' = {files.short(repr(made))}: Wan2.1's "
                f"text-to-video model needs {repr(wanted) if wanted else 'it null'}"
            )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, of whose own code none is run.

    Raises:
      ValueError: a folder with code of its own, without a tokenizer that transformers knows, or
        with one that does not pad and end prompts as UMT5 has learnt them.
    """
    from transformers import AutoTokenizer

    for file in files.visible(folder, "*.json"):
        if "auto_map" in files.read_json(file, _MOST_TOKENIZER):
            raise ValueError(
                f"{file} names code to run ('auto_map'): none is run from a folder of weights; use "
                "a tokenizer that transformers knows"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises no narrower type
        reason = files.short(str(error).strip().split("\n")[0]).rstrip(".")
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can read: {reason}"
        ) from error
    end = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None or end is None or tokenizer("a")["input_ids"][-1] != end:
        raise ValueError(
            f"{folder} holds no tokenizer of UMT5's kind: it has to have a token that pads, and to "
            "end every prompt with its end token"
        )
    return tokenizer


def tokenize(tokenizer: Any, prompts: Sequence[str], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask `[B N]` int32, padded to N = `tokens` and cut there.

    Prompts are cleaned as Wan and diffusers do: HTML entities are resolved, white space is made
    single. Departure: without ftfy, which mends text of a wrong encoding and straightens quotes.
    """
    out = tokenizer(
        [" ".join(html.unescape(html.unescape(prompt)).split()) for prompt in prompts],
        padding="max_length",
        max_length=tokens,
        truncation=True,
        return_tensors="np",
    )
    return out["input_ids"].astype(np.int32), out["attention_mask"].astype(np.int32)
