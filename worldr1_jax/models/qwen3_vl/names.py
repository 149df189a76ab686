"""Qwen3-VL's files: names of its tensors, where its leaves lie on a mesh, loading and saving."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from worldr1_jax import files
from worldr1_jax.mesh.placement import COLUMN, ROW, SMALL, SPLIT, Rules, placer
from worldr1_jax.models.qwen3_vl.config import Config
from worldr1_jax.models.qwen3_vl.model import Qwen3VL
from worldr1_jax.nn.attention import Implementation, for_mesh
from worldr1_jax.weights import convert

FILENAME, PREPROCESSOR = "model.safetensors", "preprocessor_config.json"

# Where the leaves live (mesh/placement.py); token tables are split over their rows.
PLACES: Rules = (
    (r"text\.blocks\.([qkv]|gate|up)\.kernel", (None, *COLUMN)),
    (r"text\.blocks\.(o|down)\.kernel", (None, *ROW)),
    (r"vision\.blocks\.(qkv|mlp\.linear_1)\.kernel", (None, *COLUMN)),
    (r"vision\.blocks\.(proj|mlp\.linear_2)\.kernel", (None, *ROW)),
    (r"vision\.(merger|taps\.\d+)\.mlp\.linear_1\.kernel", COLUMN),
    (r"vision\.(merger|taps\.\d+)\.mlp\.linear_2\.kernel", ROW),
    (r"(text\.token_embedding|lm_head)\.embedding", (SPLIT, None)),
    (r"vision\.patch_embedding\.kernel", ()),
    (SMALL, ()),
)

_TEXT_LINEARS = {
    **{f"self_attn.{n}_proj": n for n in "qkvo"},
    **{f"mlp.{n}_proj": n for n in ("gate", "up", "down")},
}
_TEXT_NORMS = {
    "input_layernorm": "norm1", "post_attention_layernorm": "norm2", "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
}  # fmt: skip
_VISION_LINEARS = {
    "attn.qkv": "qkv", "attn.proj": "proj", "mlp.linear_fc1": "mlp.linear_1",
    "mlp.linear_fc2": "mlp.linear_2",
}  # fmt: skip
# Where the towers lie in the files: as published, and as single files without "model." have them.
_VISION_ROOTS = ("model.visual.", "visual.")
_TEXT_ROOTS = ("model.language_model.", "language_model.", "model.", "")


def table(
    config: Config, vision: str = _VISION_ROOTS[0], text: str = _TEXT_ROOTS[0]
) -> convert.Table:
    """Rows for convert.load and convert.save; `vision` and `text` are where the towers lie."""

    def both(key: str, leaf: str, weight: str, kind: str) -> list[tuple[str, str, str]]:
        return [
            (f"{key}.weight", f"{leaf}.{weight}", kind),
            (f"{key}.bias", f"{leaf}.bias", "copy"),
        ]

    rows = [
        *both(f"{vision}patch_embed.proj", "vision.patch_embedding", "kernel", "conv3d"),
        (f"{vision}pos_embed.weight", "vision.pos_embed", "copy"),
        (f"{text}embed_tokens.weight", "text.token_embedding.embedding", "copy"),
        (f"{text}norm.weight", "text.norm_out.scale", "copy"),
    ]
    block, layer = f"{vision}blocks.{{i}}", f"{text}layers.{{j}}"
    for norm in ("norm1", "norm2"):
        rows += both(f"{block}.{norm}", f"vision.blocks.{norm}", "scale", "copy")
    for key, leaf in _VISION_LINEARS.items():
        rows += both(f"{block}.{key}", f"vision.blocks.{leaf}", "kernel", "linear")
    for key, leaf in (("merger", "merger"), ("deepstack_merger_list.{k}", "taps.{k}")):
        rows += both(f"{vision}{key}.norm", f"vision.{leaf}.norm", "scale", "copy")
        for i in (1, 2):
            name = f"vision.{leaf}.mlp.linear_{i}"
            rows += both(f"{vision}{key}.linear_fc{i}", name, "kernel", "linear")
    for key, leaf in _TEXT_LINEARS.items():
        rows.append((f"{layer}.{key}.weight", f"text.blocks.{leaf}.kernel", "linear"))
    for key, leaf in _TEXT_NORMS.items():
        rows.append((f"{layer}.{key}.weight", f"text.blocks.{leaf}.scale", "copy"))
    if not config.tie_word_embeddings:
        rows.append(("lm_head.weight", "lm_head.embedding", "copy"))
    return rows


def _repeats(config: Config) -> dict[str, int]:
    taps = len(config.vision.deepstack_visual_indexes)
    return {"i": config.vision.depth, "j": config.text.num_hidden_layers, "k": taps}


def load(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    remat: str = "none",
    implementation: Implementation | None = None,
) -> Qwen3VL:
    """Reads a folder of transformers' Qwen3VLForConditionalGeneration, as published, strictly.

    Args:
      path: the folder (config.json, safetensors in one file or shards, preprocessor_config.json if
        images have other bounds than the published ones), or one file beside its config.json.
      dtype: compute dtype (see Qwen3VL); files of any float of 16 bits or more are converted.
      param_dtype: dtype in which kernels and tables rest; None means `dtype`.
      mesh: where the leaves go as they stream in, by `PLACES`; None: on the default device.
      remat, implementation: see Qwen3VL; None takes what suits the mesh (attention.for_mesh).

    Raises:
      ValueError: a config of another architecture or that this network cannot honour, or files,
        keys, shapes or dtypes (such as fp8) that do not fit it, named.
    """
    config = read_config(path)
    kernels = dtype if param_dtype is None else param_dtype
    kernel = implementation or for_mesh(mesh, config.vision.num_heads, dtype)
    model = nnx.eval_shape(
        lambda: Qwen3VL(
            config, nnx.Rngs(0), dtype=dtype, param_dtype=kernels, remat=remat,
            implementation=kernel,
        )
    )  # fmt: skip
    vision = _root(path, _VISION_ROOTS, "pos_embed.weight")
    text = _root(path, _TEXT_ROOTS, "embed_tokens.weight")
    convert.load(
        model, path, table(config, vision, text), _repeats(config), mesh=mesh,
        shardings=placer(PLACES, mesh),
        # Some files of a tied network hold the token table under its second name too.
        ignore=(r"lm_head\.weight",) if config.tie_word_embeddings else (),
    )  # fmt: skip
    return model


def _root(path: str | Path, roots: tuple[str, ...], key: str) -> str:
    """The prefix by which the files name a tower; the published one where none is found, so that
    the loader says what is missing."""
    return next((root for root in roots if convert.holds(path, root + key)), roots[0])


def read_config(path: str | Path) -> Config:
    """The config of a folder, or beside a file. Raises ValueError as `load` does."""
    values = convert.read_config(path)
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    file = folder / PREPROCESSOR
    images = files.read_json(file) if os.path.lexists(file) else None
    try:
        return Config.from_dict(values, images)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def save(model: Qwen3VL, path: str | Path) -> None:
    """Writes the folder that transformers' from_pretrained reads, but for the tokenizer."""
    config = model.config
    convert.save(model, path, table(config), _repeats(config), config.to_dict(), filename=FILENAME)
    text = json.dumps(config.preprocessor_dict(), indent=2, sort_keys=True) + "\n"
    (Path(path) / PREPROCESSOR).write_text(text)
