"""LoRA of the Wan transformer in the files of the ecosystem: peft's and diffusers' are written, and
theirs and the original network's names are read.

Layers are named by `wan_dit.table`; what stands around the names is in the tables below. Files
keep A as [r, in] and B as [out, r], a pair for each block; here they are [in, r] and [r, out] of
all blocks, stacked.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.nn import lora
from worldr1_jax.nn.lora import Adapter, Adapters

# Form -> file name and what comes before a layer's name. The header of either file carries the
# config too, which is where diffusers looks for alpha; peft looks in CONFIG, beside its file.
FORMS = {
    "peft": ("adapter_model.safetensors", "base_model.model."),
    "diffusers": ("pytorch_lora_weights.safetensors", "transformer."),
}
CONFIG = "adapter_config.json"
_HEADER = "lora_adapter_metadata"

# What is read: (before a layer's name, layout of the names, what joins their parts).
_READ = (
    (FORMS["peft"][1], "diffusers", "."),
    (FORMS["peft"][1], "wan", "."),  # peft around Wan-Video's own network
    (FORMS["diffusers"][1], "diffusers", "."),
    ("", "diffusers", "."),  # diffusers' save_lora_adapter
    ("diffusion_model.", "wan", "."),  # ComfyUI and the trainers that write for it
    ("", "wan", "."),  # DiffSynth-Studio
    ("pipe.dit.", "wan", "."),  # the same, with all of its pipeline's names
    ("lora_unet_", "wan", "_"),  # kohya's trainers, such as musubi-tuner
    ("lora_unet__", "wan", "_"),  # VideoX-Fun
)
_PARTS = {  # after a layer's name
    ".lora_A.weight": "A",
    ".lora_A.default.weight": "A",
    ".lora_down.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.default.weight": "B",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}
_REFUSED = (  # keys known not to be low-rank pairs of linear layers of this network, and why
    (r"\.(lokr|hada|oft)_", "belongs to LoKr, LoHa or OFT"),
    (r"dora_scale|lora_magnitude_vector", "belongs to DoRA"),
    (r"lora_mid", "is the third factor of a convolution's LoRA"),
    (r"\.(diff|diff_b|diff_m|set_weight)$", "is a full difference of weights"),
    (r"\.lora_B\.(default\.)?bias$", "is a bias"),
    (r"^(text_encoder|lora_te)", "adapts a text encoder"),
    (r"^transformer_2\.", "adapts Wan2.2's second network"),
    (r"(k|v)_img|img_emb|add_[kqv]_proj|image_embedder", "adapts layers of image-to-video"),
    (r"patch_embedding", "adapts a convolution"),
)
# Fields of peft's LoraConfig beside those that `_Settings` reads: those without a bearing on what a
# loaded network computes, and those that have none with these values only. Other initial values
# than these, such as PiSSA's, change the base network as well.
_IDLE = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "lora_dropout", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva"),
}
_FLOATS = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)


def save(source: nnx.Module | Adapters, folder: str | Path, form: str = "peft") -> None:
    """Writes adapters as float32 so that peft or diffusers loads them without renaming.

    "peft" gives adapter_model.safetensors with adapter_config.json, for
    PeftModel.from_pretrained and for transformer.load_lora_adapter(prefix="base_model.model");
    "diffusers" gives pytorch_lora_weights.safetensors, for WanPipeline.load_lora_weights.

    Args:
      source: a network with LoRA, or its adapters (lora.adapters, lora.from_state).
      folder: where to write; made if it is missing.
      form: "peft" or "diffusers".

    Raises:
      ValueError: an unknown form, no adapters, or one of a layer that the Wan transformer lacks.
    """
    if form not in FORMS:
        raise ValueError(f"the form of LoRA is '{form}'; it is one of {', '.join(FORMS)}")
    found = lora.adapters(source) if isinstance(source, nnx.Module) else source
    if not found:
        raise ValueError("there is no LoRA to save: the network has no adapters")
    filename, prefix = FORMS[form]
    names = {leaf: name for name, leaf in _layers("diffusers").items()}
    tensors = {}
    for leaf, adapter in found.items():
        if leaf not in names:
            raise ValueError(f"'{leaf}' is no linear layer of the Wan transformer")
        for module, a, b in _blocks(names[leaf], adapter):
            tensors[f"{prefix}{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{prefix}{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
    settings = _describe({names[leaf]: adapter for leaf, adapter in found.items()})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({f"{prefix}{field}": value for field, value in settings.items()})
    save_file(tensors, folder / filename, metadata={"format": "pt", _HEADER: header})
    if form == "peft":
        config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, **settings}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(path: str | Path, config: wan_dit.Config) -> dict[str, Adapter]:
    """Reads adapters for a network of this config, whoever trained them.

    A and B come back in float32 with the factor that they were trained with. Blocks of a stacked
    layer that the file does not adapt get A = B = 0: they answer exactly as without LoRA, and no
    gradient moves them from there. Where the blocks of a layer differ in alpha, their factors are
    folded into B. Without alpha, a file in ComfyUI's or diffusers' form has the factor 1, as they
    take it.

    Args:
      path: a folder of peft's or diffusers', or one .safetensors file, in any form of `_READ`.
      config: shape of the network.

    Returns:
      {path of the linear layer: Adapter}, for lora.attach.

    Raises:
      ValueError: a missing, ambiguous or truncated file, LoRA for a network of another size, half
        of a pair, ranks that differ within a stacked layer, or anything that a pair on a linear
        layer cannot honour; the sentence names the key.
    """
    network = nnx.eval_shape(lambda: wan_dit.WanDiT(config, nnx.Rngs(0)))
    return _read(Path(path), network)


def into(model: nnx.Module, path: str | Path) -> nnx.Module:
    """Attaches the adapters of a file to a Wan transformer, in place, and returns it.

    `lora.merge` then folds them in, if that is what is wanted. Arguments and errors as for `load`;
    a layer that has LoRA already is an error too.
    """
    return lora.attach(model, _read(Path(path), model))


# ------------------------------------------------------------------------------------- writing


def _layers(layout: str) -> dict[str, str]:
    """Name of each linear layer, with {i} for the block -> its path here."""
    rows = wan_dit.table(wan_dit.Config(), layout)
    return {
        name.removesuffix(".weight"): leaf.removesuffix(".kernel")
        for name, leaf, kind in rows
        if kind == "linear"
    }


def _blocks(name: str, adapter: Adapter) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, A [i r] and B [r o] of each block, or of the one layer that is not stacked."""
    a, b = (np.asarray(half, np.float32) for half in adapter[:2])
    if "{i}" not in name:
        yield name, a, b
        return
    for i in range(len(a)):
        yield name.format(i=i), a[i], b[i]


def _describe(found: Adapters) -> dict[str, Any]:
    """Fields of peft's LoraConfig for adapters by the names of their layers in files.

    Rank and alpha are those of most layers; patterns give the others'. Names are cut to what comes
    after the block, which peft matches at the end of a layer's full name.
    """
    short = {name.removeprefix("blocks.{i}."): adapter for name, adapter in found.items()}
    ranks = {name: int(adapter.a.shape[-1]) for name, adapter in short.items()}
    alphas = {name: _alpha(adapter) for name, adapter in short.items()}
    rank, alpha = (Counter(d.values()).most_common(1)[0][0] for d in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
        "target_modules": sorted(short),
    }


def _alpha(adapter: Adapter) -> float:
    """scale x rank, as a whole number where one gives the same scale."""
    rank = adapter.a.shape[-1]
    whole = round(adapter.scale * rank)
    return whole if whole / rank == adapter.scale else adapter.scale * rank


# ------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class _Key:
    """One key of a file: its layer's name there and path here, block (None: not stacked), part."""

    text: str
    prefix: str
    module: str
    leaf: str
    block: int | None
    part: str


@dataclasses.dataclass
class _Pair:
    """The parts of one layer's LoRA, by the key that has them."""

    A: _Key | None = None
    B: _Key | None = None
    alpha: _Key | None = None


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a LoraConfig says of alpha; `source` is where it stands."""

    source: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    root: bool  # rank-stabilised: alpha / sqrt(rank)

    @classmethod
    def of(cls, source: str, values: Mapping[str, Any]) -> _Settings:
        """Raises ValueError for a field that is missing, or that pairs of A and B cannot honour."""
        known = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
        for field, value in values.items():
            if field in known or field in _IDLE or value in _ONLY.get(field, ()):
                continue
            if value or field in _ONLY:  # what is null, false or empty is not in use
                raise ValueError(
                    f"{source} has '{field}' = {json.dumps(value)}, which pairs of A and B "
                    "cannot honour"
                )
        for field in ("r", "lora_alpha"):
            if not isinstance(values.get(field), int | float):
                raise ValueError(f"{source} lacks the number '{field}', which gives the scale")
        patterns = [dict(values.get(f"{field}_pattern") or {}) for field in ("rank", "alpha")]
        root = bool(values.get("use_rslora"))
        return cls(source, values["r"], values["lora_alpha"], patterns[0], patterns[1], root)

    def scale(self, key: _Key, rank: int) -> float:
        """Factor of the pair whose A is `key`, as peft takes it."""
        said = self._pattern(self.rank_pattern, key.module, self.rank)
        if said != rank:
            raise ValueError(f"'{key.text}' has rank {rank}, but {self.source} says {said}")
        alpha = self._pattern(self.alpha_pattern, key.module, self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.root else rank)

    def _pattern(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        for pattern, value in patterns.items():  # the first that matches the end of the name
            try:
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    return value
            except re.error as error:
                raise ValueError(
                    f"{self.source} has the pattern '{pattern}', which is no regular expression"
                ) from error
        return default


def _read(path: Path, network: nnx.Module) -> dict[str, Adapter]:
    """Adapters of a file for the linear layers of `network`; errors as for `load`."""
    file = _file(path)
    try:
        handle = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors (truncated or not such a file): {error}"
        ) from error
    keys = [_parse(file, key) for key in sorted(handle.keys())]
    if not keys:
        raise ValueError(f"{file} holds no LoRA: it has no keys")
    prefixes = sorted({key.prefix for key in keys})
    if len(prefixes) > 1:
        first, second = (next(k.text for k in keys if k.prefix == p) for p in prefixes[:2])
        raise ValueError(f"{file} mixes two ways of naming: '{first}' and '{second}'")
    layers: dict[str, dict[int | None, _Pair]] = {}
    for key in keys:
        pair = layers.setdefault(key.leaf, {}).setdefault(key.block, _Pair())
        other = getattr(pair, key.part)
        if other is not None:
            raise ValueError(f"{file} has the same weights twice: '{other.text}' and '{key.text}'")
        setattr(pair, key.part, key)
    reader = _Reader(file, handle, _settings(file, handle.metadata() or {}, prefixes[0]))
    kernels = {name: layer.kernel.shape for name, layer in lora.linears(network).items()}
    return {leaf: reader.layer(kernels[leaf], pairs) for leaf, pairs in layers.items()}


def _file(path: Path) -> Path:
    """The one .safetensors file that `path` stands for."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give a folder or a .safetensors file of LoRA")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no .safetensors file; other kinds of files are not read")
    if len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} .safetensors files; name the one to read")
    return files[0]


@functools.cache
def _names() -> dict[str, tuple[str, str]]:
    """Every name of a layer that is read, with {i} for the block -> (prefix, path here)."""
    return {
        prefix + name.replace(".", joint): (prefix, leaf)
        for prefix, layout, joint in _READ
        for name, leaf in _layers(layout).items()
    }


def _parse(file: Path, key: str) -> _Key:
    """What a key stands for; raises ValueError for one that is not part of a pair, saying why."""
    for pattern, reason in _REFUSED:
        if re.search(pattern, key):
            raise ValueError(
                f"{file}: '{key}' {reason}; what is read is LoRA on linear layers of the "
                "text-to-video network"
            )
    for suffix, part in _PARTS.items():
        name = key.removesuffix(suffix)
        block = re.search(r"(?<=blocks[._])\d+", name)
        general = name if block is None else f"{name[: block.start()]}{{i}}{name[block.end() :]}"
        if name != key and general in _names():
            prefix, leaf = _names()[general]
            index = None if block is None else int(block[0])
            return _Key(key, prefix, name.removeprefix(prefix), leaf, index, part)
    raise ValueError(
        f"{file}: '{key}' is unknown: it is no part of LoRA on a linear layer of the Wan "
        "transformer"
    )


def _settings(file: Path, header: Mapping[str, str], prefix: str) -> _Settings | None:
    """The LoraConfig beside the file or in its header; None where there is none to be had."""
    config = file.with_name(CONFIG)
    if prefix == FORMS["peft"][1] and config.is_file():
        return _Settings.of(str(config), _json(config.read_text(), str(config)))
    if _HEADER in header:
        source = f"the header of {file}"
        values = _json(header[_HEADER], source)
        if not any(field.startswith(prefix) for field in values):
            prefix = FORMS["diffusers"][1]  # diffusers names the fields so whatever the keys are
        fields = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        return _Settings.of(source, fields)
    if prefix == FORMS["peft"][1]:
        raise ValueError(f"{file} has no {CONFIG} beside it, which says how to scale its LoRA")
    return None


def _json(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} is not a JSON object")
    return values


@dataclasses.dataclass(frozen=True)
class _Reader:
    """An open file, and what its LoraConfig says, if it has one."""

    file: Path
    handle: Any
    settings: _Settings | None

    def layer(self, kernel: tuple[int, ...], pairs: Mapping[int | None, _Pair]) -> Adapter:
        """The adapter of one layer, its blocks stacked as those of `kernel` [*stack i o] are."""
        *stack, fan_in, fan_out = kernel
        found = {}
        for block, pair in pairs.items():
            if block is not None and block >= stack[0]:
                text = next(key.text for key in (pair.A, pair.B, pair.alpha) if key)
                raise ValueError(
                    f"{self.file}: '{text}' is of block {block}; this network has {stack[0]} blocks"
                )
            found[block] = self._pair(pair, fan_in, fan_out)
        if not stack:
            return found[None]
        rank = next(iter(found.values())).a.shape[-1]
        for block, adapter in found.items():
            if adapter.a.shape[-1] != rank:
                key = pairs[block].A
                raise ValueError(
                    f"{self.file}: '{key.text if key else block}' has rank {adapter.a.shape[-1]} "
                    f"and another block {rank}; blocks lie in one stack, which needs one rank"
                )
        scales = {adapter.scale for adapter in found.values()}
        a = np.zeros((*stack, fan_in, rank), np.float32)
        b = np.zeros((*stack, rank, fan_out), np.float32)
        for block, adapter in found.items():
            a[block], b[block] = adapter.a, adapter.b
            if len(scales) > 1:
                b[block] *= adapter.scale
        return Adapter(a, b, scales.pop() if len(scales) == 1 else 1.0)

    def _pair(self, pair: _Pair, fan_in: int, fan_out: int) -> Adapter:
        """A [i r], B [r o] and their factor."""
        if pair.A is None or pair.B is None:
            text = next(key.text for key in (pair.A, pair.B, pair.alpha) if key)
            lack = "A (down)" if pair.A is None else "B (up)"
            raise ValueError(f"{self.file} has '{text}', but not {lack} of the same layer")
        a, b = self._tensor(pair.A), self._tensor(pair.B)
        if a.ndim != 2 or a.shape[1] != fan_in or not a.size:
            raise ValueError(self._misfit(pair.A, a, f"[r, {fan_in}]"))
        if b.shape != (fan_out, len(a)):
            raise ValueError(self._misfit(pair.B, b, f"[{fan_out}, {len(a)}]"))
        if pair.alpha is None:
            return Adapter(a.T, b.T, self.settings.scale(pair.A, len(a)) if self.settings else 1.0)
        if self.settings is not None:
            raise ValueError(
                f"{self.file} says the scale twice: in '{pair.alpha.text}' and in "
                f"{self.settings.source}"
            )
        alpha = self._tensor(pair.alpha)
        if alpha.size != 1:
            raise ValueError(self._misfit(pair.alpha, alpha, "[], one number"))
        return Adapter(a.T, b.T, float(alpha.reshape(())) / len(a))

    def _tensor(self, key: _Key) -> np.ndarray:
        """The values of a key in float32, which holds those of 16 bits exactly."""
        value = self.handle.get_tensor(key.text)
        whole = key.part == "alpha" and np.issubdtype(value.dtype, np.integer)
        if not whole and value.dtype not in _FLOATS:
            raise ValueError(
                f"{self.file}: '{key.text}' is stored as {value.dtype}, not as a float of 16 bits "
                "or more"
            )
        value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"{self.file}: '{key.text}' holds values that are not finite")
        return value

    def _misfit(self, key: _Key, value: np.ndarray, wanted: str) -> str:
        return (
            f"{self.file}: '{key.text}' has shape {list(value.shape)}, where this network needs "
            f"{wanted}; was it trained for another size of model?"
        )
