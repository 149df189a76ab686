"""CLIP's files: names in both layouts, where leaves live on a mesh, loading and saving.

A published CLIP is one of

    a file of OpenCLIP's names (HPS_v2.1_compressed.pt), or a folder that holds one; no config.json
    a folder of transformers' CLIPModel (PickScore_v1): config.json and model.safetensors, or
    pytorch_model.bin

and is read by the same strict table whichever it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from worldr1_jax.files import visible
from worldr1_jax.mesh.placement import COLUMN, ROW, SMALL, SPLIT, Rules, placer
from worldr1_jax.models.clip.config import Config
from worldr1_jax.models.clip.model import CLIP
from worldr1_jax.weights import convert
from worldr1_jax.weights import orbax as stored
from worldr1_jax.weights.safetensors import Tensor, open_tensors

# Leaf, transformers' name, OpenCLIP's name, kind in both.
_BLOCK = (
    ("norm1.scale", "layer_norm1.weight", "ln_1.weight", "copy"),
    ("norm1.bias", "layer_norm1.bias", "ln_1.bias", "copy"),
    *(
        (f"{x}.{leaf}", f"self_attn.{x}_proj.{name}", f"attn.in_proj_{name}.{x}", kind)
        for x in "qkv"
        for leaf, name, kind in (("kernel", "weight", "linear"), ("bias", "bias", "copy"))
    ),
    ("o.kernel", "self_attn.out_proj.weight", "attn.out_proj.weight", "linear"),
    ("o.bias", "self_attn.out_proj.bias", "attn.out_proj.bias", "copy"),
    ("norm2.scale", "layer_norm2.weight", "ln_2.weight", "copy"),
    ("norm2.bias", "layer_norm2.bias", "ln_2.bias", "copy"),
    ("linear_1.kernel", "mlp.fc1.weight", "mlp.c_fc.weight", "linear"),
    ("linear_1.bias", "mlp.fc1.bias", "mlp.c_fc.bias", "copy"),
    ("linear_2.kernel", "mlp.fc2.weight", "mlp.c_proj.weight", "linear"),
    ("linear_2.bias", "mlp.fc2.bias", "mlp.c_proj.bias", "copy"),
)
_IMAGE = (
    ("class_token", "embeddings.class_embedding", "class_embedding", "copy"),
    ("patch_kernel", "embeddings.patch_embedding.weight", "conv1.weight", "conv2d"),
    ("positions", "embeddings.position_embedding.weight", "positional_embedding", "copy"),
    ("norm_in.scale", "pre_layrnorm.weight", "ln_pre.weight", "copy"),  # sic
    ("norm_in.bias", "pre_layrnorm.bias", "ln_pre.bias", "copy"),
    ("norm_out.scale", "post_layernorm.weight", "ln_post.weight", "copy"),
    ("norm_out.bias", "post_layernorm.bias", "ln_post.bias", "copy"),
)
_TEXT = (
    ("token_embedding.embedding", "embeddings.token_embedding.weight", "token_embedding.weight",
     "copy"),
    ("positions", "embeddings.position_embedding.weight", "positional_embedding", "copy"),
    ("norm_out.scale", "final_layer_norm.weight", "ln_final.weight", "copy"),
    ("norm_out.bias", "final_layer_norm.bias", "ln_final.bias", "copy"),
)  # fmt: skip
# OpenCLIP keeps queries, keys and values in one tensor, below each other.
_FUSED = {r".*\.attn\.in_proj_(weight|bias)": ("q", "k", "v")}
# Position numbers, which files of transformers < 4.31 hold.
_IGNORE = (r"(text|vision)_model\.embeddings\.position_ids",)
_OPEN_CLIP = "visual.conv1.weight"  # tells OpenCLIP's layout

# Why these places: see mesh/placement.py. Towers are split as the DiT is, over fsdp and context on
# the input of a product, over tensor on its heads or hidden units; what is small is whole.
PLACES: Rules = (
    (r"\w+_encoder\.blocks\.([qkv]|linear_1)\.kernel", (None, *COLUMN)),
    (r"\w+_encoder\.blocks\.(o|linear_2)\.kernel", (None, *ROW)),
    (r"(text_encoder\.token_embedding\.embedding|\w+_encoder\.projection\.kernel)", (SPLIT, None)),
    (r".*\.(patch_kernel|positions)|logit_scale", ()),
    (SMALL, ()),
)


def table(layout: str = "transformers") -> convert.Table:
    """Rows for convert.load and convert.save; layout is "transformers" or "open_clip"."""
    ours, heads = layout == "transformers", {"vision": _IMAGE, "text": _TEXT}
    rows = []
    for tower, repeat in (("vision", "i"), ("text", "j")):
        encoder = "image_encoder" if tower == "vision" else "text_encoder"
        prefix = f"{tower}_model." if ours else ("visual." if tower == "vision" else "")
        layer = f"encoder.layers.{{{repeat}}}." if ours else f"transformer.resblocks.{{{repeat}}}."
        rows += [
            (prefix + (theirs if ours else opens), f"{encoder}.{leaf}", kind)
            for leaf, theirs, opens, kind in heads[tower]
        ]
        rows += [
            (prefix + layer + (theirs if ours else opens), f"{encoder}.blocks.{leaf}", kind)
            for leaf, theirs, opens, kind in _BLOCK
        ]
    if ours:
        rows += [
            ("visual_projection.weight", "image_encoder.projection.kernel", "linear"),
            ("text_projection.weight", "text_encoder.projection.kernel", "linear"),
        ]
    else:
        rows += [
            ("visual.proj", "image_encoder.projection.kernel", "copy"),
            ("text_projection", "text_encoder.projection.kernel", "copy"),
        ]
    return (*rows, ("logit_scale", "logit_scale", "copy"))


def load(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    config: Config | None = None,
) -> CLIP:
    """Reads a published CLIP, in either layout.

    Args:
      path: a folder or file as in the module's first lines.
      dtype: compute dtype (see CLIP).
      param_dtype: dtype in which kernels and the token table rest; None means `dtype`.
      mesh: where the leaves go as they stream in, by `PLACES`; None: on the default device.
      config: shape of the network; None reads config.json, or takes a file without one for
        ViT-H/14, whose numbers of heads no tensor tells.

    Raises:
      ValueError: a config this network cannot honour, or files that do not fit it.
    """
    config = read_config(path) if config is None else config
    source = _source(Path(path))
    kernels = dtype if param_dtype is None else param_dtype
    model = nnx.eval_shape(lambda: CLIP(config, nnx.Rngs(0), dtype=dtype, param_dtype=kernels))
    layout = "open_clip" if convert.holds(source, _OPEN_CLIP) else "transformers"
    convert.load(
        model, source, table(layout), _repeats(config), mesh=mesh, ignore=_IGNORE, split=_FUSED,
        shardings=placer(PLACES, mesh),
    )  # fmt: skip
    return model


def read_config(path: str | Path) -> Config:
    """The config of a folder, or ViT-H/14 where there is none.

    Raises:
      ValueError: a config of another network; no config, and tensors of another size.
    """
    path = Path(path)
    if ((path.parent if path.is_file() else path) / "config.json").is_file():
        return Config.from_dict(convert.read_config(path))
    source, config = _source(path), Config.vit_h_14()
    tensors = open_tensors(source)
    if _OPEN_CLIP not in tensors:
        raise ValueError(
            f"{source} has neither a config.json beside it nor the names of OpenCLIP's vision "
            "transformers"
        )
    found, wanted = _size(tensors), (config.vision.hidden_size, config.patch_size)
    if found != wanted:
        raise ValueError(
            f"{source} is of width {found[0]} and patch {found[1]}; without a config.json it has "
            f"to be ViT-H/14, of width {wanted[0]} and patch {wanted[1]}"
        )
    return config


def _size(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Width and patch of an OpenCLIP vision transformer."""
    shape = tensors[_OPEN_CLIP].shape
    return shape[0], shape[-1]


def save(model: CLIP, path: str | Path) -> None:
    """Writes the folder that transformers' CLIPModel.from_pretrained, and `load`, read."""
    repeats, values = _repeats(model.config), model.config.to_dict()
    convert.save(model, path, table(), repeats, values, filename="model.safetensors")


def _repeats(config: Config) -> dict[str, int]:
    return {"i": config.vision.num_hidden_layers, "j": config.text.num_hidden_layers}


def _source(path: Path) -> Path:
    """The file to read. Folders of CLIPs often hold the same weights in several formats."""
    if path.is_file() or not path.is_dir() or stored.found(path):
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    found = visible(path, "*.pt")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} holds {len(found)} .pt files; name the one to read: {names}")
    return found[0] if found else path
