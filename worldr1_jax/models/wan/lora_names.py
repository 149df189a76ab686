"""How files of LoRA name the layers of the Wan transformer, and what stands around the names.

    diffusion_model.blocks.3.cross_attn.k.lora_down.weight
    prefix          layer                 part of its LoRA

Names of layers are those of `dit.table`, in either layout, joined by points or by underscores.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

from worldr1_jax.files import short
from worldr1_jax.models.wan import dit as wan_dit

# Form -> file name, what comes before a layer's name, and the layout of the names. The header of
# peft's and diffusers' files carries the config too, which is where diffusers looks for alpha; peft
# looks in adapter_config.json, beside its file; ComfyUI in a key of each layer.
FORMS = {
    "peft": ("adapter_model.safetensors", "base_model.model.", "diffusers"),
    "diffusers": ("pytorch_lora_weights.safetensors", "transformer.", "diffusers"),
    "comfyui": ("comfyui_lora.safetensors", "diffusion_model.", "wan"),
}

# What may come before a layer's name, also one behind another. "" is diffusers' save_lora_adapter
# and DiffSynth-Studio.
_PREFIXES = (
    FORMS["peft"][1],
    FORMS["diffusers"][1],
    "model.diffusion_model.",
    FORMS["comfyui"][1],  # and the trainers that write for it
    "pipe.dit.",  # DiffSynth-Studio, with all of its pipeline's names
    "lora_unet__",  # VideoX-Fun
    "lora_unet_",  # kohya's trainers, such as musubi-tuner
    "lora_transformer_",
    "lycoris_",
)
# What torch.compile and DistributedDataParallel put before the name of whatever they wrap.
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|module)\.")
# The name of an adapter may stand before ".weight": "lora_A.default.weight".
_HALF = re.compile(
    r"(?P<layer>.+?)[._]lora(_linear_layer)?[._](?P<half>A|B|down|up)"
    r"(\.(?!weight$|bias$)(?P<adapter>[\w-]+))?(\.weight)?"
)
_WHOLE = re.compile(r"(?P<layer>.+?)\.(?P<part>alpha|diff|diff_b|diff_m)")
_HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_BLOCK = re.compile(r"(?<=^blocks_)\d{1,4}(?=_|$)")
# What follows a layer's name in the network itself, by the part that differs from it: diff_m is of
# a block's modulation, whose name some files have and some have not.
_PARAMETERS = {
    "diff": ("_weight", ""),
    "diff_b": ("_bias",),
    "diff_m": ("_modulation", "_scale_shift_table", ""),
}

_REFUSED = (  # keys known to be nothing that is read, and why
    (r"\.(lokr|hada|oft|glora)_|\.[ab][12]\.weight$", "belongs to LoKr, LoHa, OFT or GLoRA"),
    (r"dora_scale|lora_magnitude_vector", "belongs to DoRA"),
    (r"lora_mid", "is the third factor of a convolution's LoRA"),
    (r"set_weight$", "replaces weights"),
    (r"\.lora_B(\.\w+)?\.bias$", "is a bias that is scaled with LoRA"),
    (r"\.(scale_weight|scale_input|input_scale|weight_scale)$", "is the scale of 8-bit weights"),
    (r"^(text_encoder|lora_te)", "adapts a text encoder"),
    (r"^transformer_2\.", "adapts Wan2.2's second network"),
    (r"(k|v)_img|img_emb|add_[kqv]_proj|image_embedder", "adapts layers of image-to-video"),
    (r"vace|control_adapter|face_adapter|motion_encoder", "adapts layers of another network"),
    (r"patch_embedding\.lora", "adapts a convolution"),
)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a file.

    Attributes:
      text: the key.
      prefix: what stands before the layer's name.
      module: the layer's name in the file, as peft's patterns see it.
      leaf: path here, of the linear layer, or, of a difference, of the parameter.
      block: number of the block, or None where layers are not stacked.
      part: "A", "B", "alpha" or "diff".
      adapter: name of the adapter, or "".
    """

    text: str
    prefix: str
    module: str
    leaf: str
    block: int | None
    part: str
    adapter: str = ""


def linears(layout: str) -> dict[str, str]:
    """Name of each linear layer, with {i} for the block -> its path here."""
    rows = wan_dit.table(wan_dit.Config(), layout)
    return {
        name.removesuffix(".weight"): leaf.removesuffix(".kernel")
        for name, leaf, kind in rows
        if kind == "linear"
    }


def kinds() -> dict[str, str]:
    """Path of each parameter -> in which order of axes files keep it (convert.load)."""
    return {leaf: kind for _, leaf, kind in wan_dit.table(wan_dit.Config(), "wan")}


@functools.cache
def _flat_linears() -> dict[str, str]:
    """The layers' names with underscores alone, of both layouts."""
    return {
        name.replace(".", "_"): leaf
        for layout in ("diffusers", "wan")
        for name, leaf in linears(layout).items()
    }


@functools.cache
def _flat_parameters() -> dict[str, str]:
    return {
        name.replace(".", "_"): leaf
        for layout in ("diffusers", "wan")
        for name, leaf, _ in wan_dit.table(wan_dit.Config(), layout)
    }


def parse(file: Path, text: str) -> Key:
    """What a key stands for; raises ValueError for one that is not read, saying why."""
    for pattern, reason in _REFUSED:
        if re.search(pattern, text):
            raise ValueError(
                f"{file}: '{short(text)}' {reason}; what is read is LoRA on linear layers of the "
                "text-to-video network"
            )
    plain = _WRAPPERS.sub("", text)
    name = plain
    while (cut := next((p for p in _PREFIXES if name.startswith(p)), None)) is not None:
        name = name.removeprefix(cut)
    prefix = plain.removesuffix(name)
    match = _WHOLE.fullmatch(name) or _HALF.fullmatch(name)
    if match:
        layer, found = match["layer"], match.groupdict()
        flat = layer.replace(".", "_")
        block = _BLOCK.search(flat)
        general = flat if block is None else _BLOCK.sub("{i}", flat, count=1)
        part = found.get("part") or _HALVES[match["half"]]
        leaf = _leaf(general, part)
        if leaf is not None:
            number = None if block is None else int(block[0])
            part = "diff" if part in _PARAMETERS else part
            return Key(text, prefix, layer, leaf, number, part, found.get("adapter") or "")
    raise ValueError(
        f"{file}: '{short(text)}' is unknown: it is no part of LoRA on a linear layer of the Wan "
        "transformer"
    )


def _leaf(general: str, part: str) -> str | None:
    if part not in _PARAMETERS:
        return _flat_linears().get(general)
    names = (f"{general}{ending}" for ending in _PARAMETERS[part])
    return next((_flat_parameters()[n] for n in names if n in _flat_parameters()), None)
