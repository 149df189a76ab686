"""LoRA of the Wan transformer in the files of the ecosystem: peft's, diffusers' and ComfyUI's are
written, and theirs, kohya's and others' are read (lora_names.py).

Files keep A as [r, in] and B as [out, r], a pair for each block; here they are [in, r] and [r, out]
of all blocks, stacked.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldr1_jax import files
from worldr1_jax.fields import is_number
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan.lora_names import FORMS, Key, kinds, linears, parse
from worldr1_jax.nn import lora
from worldr1_jax.nn.lora import Adapter, Adapters
from worldr1_jax.weights import convert
from worldr1_jax.weights.safetensors import Tensor, only_file, open_safetensors, open_tensors

CONFIG = "adapter_config.json"
_HEADER = "lora_adapter_metadata"

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
# Patterns of layers' names that are read: any other regular expression could take for ever.
_PATTERN = re.compile(r"\^?([\w-]|\\?\.(?!\*)|\\d\+|\[0-9\]\+|\.\*(?!.*\.\*))+\$?")
_MOST_PATTERNS = 2000
_MOST = sys.float_info.max  # which a whole number of a JSON file may exceed
_FP8 = ("F8_E4M3", "F8_E5M2")
_WHOLES = ("I8", "I16", "I32", "I64", "U8")  # dtypes of an alpha beside floats

# Of a parameter: what is added to it, or to some blocks of it, in our order of axes.
Differences = Mapping[str, Mapping[int | None, np.ndarray]]


class Lora(NamedTuple):
    """What a file holds: pairs, and differences of whole weights, which can only be folded in."""

    adapters: dict[str, Adapter]
    differences: dict[str, dict[int | None, np.ndarray]]


def save(source: nnx.Module | Adapters, folder: str | Path, form: str = "peft") -> None:
    """Writes adapters as float32 so that peft, diffusers or ComfyUI loads them without renaming.

    "peft" gives adapter_model.safetensors with adapter_config.json, for
    PeftModel.from_pretrained and for transformer.load_lora_adapter(prefix="base_model.model");
    "diffusers" gives pytorch_lora_weights.safetensors, for WanPipeline.load_lora_weights, with
    the factor alpha / rank in B;
    "comfyui" gives comfyui_lora.safetensors, for its models/loras.

    Args:
      source: a network with LoRA, or its adapters (lora.adapters, lora.from_state).
      folder: where to write; made if it is missing.
      form: one of FORMS.

    Raises:
      ValueError: an unknown form, no adapters, one of a layer that the Wan transformer lacks, or a
        folder that cannot be written to.
    """
    if form not in FORMS:
        raise ValueError(f"the form of LoRA is '{form}'; it is one of {', '.join(FORMS)}")
    found = lora.adapters(source) if isinstance(source, nnx.Module) else source
    if not found:
        raise ValueError("there is no LoRA to save: the network has no adapters")
    if form == "diffusers":  # readers that pass over the header, older ones too, take the factor 1
        found = {
            leaf: Adapter(a, np.asarray(b) * np.float32(scale), 1.0)
            for leaf, (a, b, scale) in found.items()
        }
    filename, prefix, layout = FORMS[form]
    names = {leaf: name for name, leaf in linears(layout).items()}
    tensors = {}
    for leaf, adapter in found.items():
        if leaf not in names:
            raise ValueError(f"'{leaf}' is no linear layer of the Wan transformer")
        for module, a, b in _blocks(names[leaf], adapter):
            tensors[f"{prefix}{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{prefix}{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
            if form == "comfyui":
                tensors[f"{prefix}{module}.alpha"] = np.array(_alpha(adapter), np.float32)
    folder = files.make_folder(folder)
    metadata = {"format": "pt"}
    if form != "comfyui":
        settings = _describe({names[leaf]: adapter for leaf, adapter in found.items()})
        fields = {f"{prefix}{field}": value for field, value in settings.items()}
        metadata[_HEADER] = json.dumps(fields)
    convert.write_tensors(tensors, folder / filename, metadata)
    if form == "peft":
        config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, **settings}
        text = json.dumps(config, indent=2, sort_keys=True)
        files.write_atomically(folder / CONFIG, f"{text}\n".encode())


def read(path: str | Path, config: wan_dit.Config) -> Lora:
    """Reads a file for a network of this config, whoever trained it.

    A and B come back in float32 with the factor that they were trained with. Blocks of a stacked
    layer that the file does not adapt get A = B = 0: they answer exactly as without LoRA, and no
    gradient moves them from there. Where the blocks of a layer differ in rank, the smaller ones are
    filled up with zeros, and where they differ in alpha, their factors are folded into B. Without
    alpha, a file in ComfyUI's or diffusers' form has the factor 1, as they take it. Floats of eight
    bits are taken as they are: a file with scales beside them is refused.

    Args:
      path: a folder of peft's or diffusers', or one .safetensors file.
      config: shape of the network.

    Raises:
      ValueError: a missing, ambiguous or truncated file, LoRA for a network of another size, half
        of a pair, numbers that are not finite, or anything that a pair on a linear layer cannot
        honour; the sentence names the key.
    """
    network = nnx.eval_shape(lambda: wan_dit.WanDiT(config, nnx.Rngs(0)))
    return _read(Path(path), network)


def load(path: str | Path, config: wan_dit.Config) -> dict[str, Adapter]:
    """The adapters of a file, {path of the linear layer: Adapter}, for lora.attach.

    Raises:
      ValueError: as `read`, and for a file with differences of whole weights.
    """
    found = read(path, config)
    if found.differences:
        raise ValueError(
            f"{path} changes '{min(found.differences)}' itself, not by LoRA: fold it into the "
            "weights by launch/convert_weights.py --adapters"
        )
    return found.adapters


def into(model: nnx.Module, path: str | Path) -> nnx.Module:
    """Attaches the adapters of a file to a Wan transformer and adds its differences, in place, and
    returns it.

    `lora.merge` then folds the adapters in, if that is what is wanted. Arguments and errors as for
    `read`; a layer that has LoRA already is an error too.
    """
    found = _read(Path(path), model)
    return lora.attach(add(model, found.differences), found.adapters)


def add(model: nnx.Module, differences: Differences) -> nnx.Module:
    """Adds differences to the parameters, in place, in float32 and rounded once, and returns
    `model`."""
    for leaf, blocks in differences.items():
        parameter = convert.leaves(model)[leaf]
        value = parameter.get_raw_value()
        for block, difference in blocks.items():
            place = ... if block is None else block
            summed = value[place].astype(jnp.float32) + difference
            value = value.at[place].set(summed.astype(value.dtype))
        parameter.set_raw_value(value)
    return model


# ------------------------------------------------------------------------------------- writing


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


@dataclasses.dataclass
class _Pair:
    """The parts of one layer's LoRA, by the key that has them."""

    A: Key | None = None
    B: Key | None = None
    alpha: Key | None = None


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a LoraConfig says of alpha; `source` is where it stands."""

    source: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]
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
                    f"{source} has '{files.short(field)}' = {files.short(json.dumps(value))}, "
                    "which pairs of A and B cannot honour"
                )
        for field in ("r", "lora_alpha"):
            if not is_number(values.get(field), -_MOST, _MOST):
                raise ValueError(f"{source} lacks the number '{field}', which gives the scale")
        ranks, alphas = (_patterns(source, values, f"{name}_pattern") for name in ("rank", "alpha"))
        root = values.get("use_rslora") or False
        if root is not True and root is not False:
            raise ValueError(
                f"{source} has 'use_rslora' = {files.short(json.dumps(root))}, not true or false"
            )
        return cls(source, values["r"], values["lora_alpha"], ranks, alphas, root)

    def scale(self, key: Key, rank: int) -> float:
        """Factor of the pair whose A is `key`, as peft takes it."""
        said = self._pattern(self.rank_pattern, key.module, self.rank)
        if said != rank:
            raise ValueError(f"'{key.text}' has rank {rank}, but {self.source} says {said}")
        alpha = self._pattern(self.alpha_pattern, key.module, self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.root else rank)

    def _pattern(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        for pattern, value in patterns.items():  # the first that matches the end of the name
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return default


def _patterns(source: str, values: Mapping[str, Any], field: str) -> dict[str, float]:
    """Patterns of layers' names -> numbers, all of which can be matched in little time."""
    patterns = values.get(field) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
        raise ValueError(
            f"{source} has no patterns of layers' names, {_MOST_PATTERNS} at most, in '{field}'"
        )
    for pattern, value in patterns.items():
        if len(pattern) > 200 or not _PATTERN.fullmatch(pattern):
            raise ValueError(
                f"{source} has the pattern '{files.short(pattern)}' in '{field}'; what is read are "
                "names with '.', '\\d+' and one '.*'"
            )
        if not is_number(value, -_MOST, _MOST):
            raise ValueError(f"{source} has no number for '{files.short(pattern)}' in '{field}'")
    return patterns


def _read(path: Path, network: nnx.Module) -> Lora:
    """Adapters and differences of a file for `network`; errors as for `read`."""
    file = only_file(path) if os.path.isdir(path) else path
    header = open_safetensors(file).metadata() or {}
    tensors = open_tensors(file)
    keys = [parse(file, key) for key in sorted(tensors)]
    if not keys:
        raise ValueError(f"{file} holds no LoRA: it has no keys")
    _check_one(file, keys, "prefix", "mixes two ways of naming")
    _check_one(file, [key for key in keys if key.part in "AB"], "adapter", "holds two adapters")
    reader = _Reader(file, tensors, _settings(file, header, keys[0].prefix))
    layers: dict[str, dict[int | None, _Pair]] = {}
    differences: dict[str, dict[int | None, np.ndarray]] = {}
    parameters = {
        name: leaf.get_raw_value().shape for name, leaf in convert.leaves(network).items()
    }
    for key in keys:
        if key.part == "diff":
            blocks = differences.setdefault(key.leaf, {})
            _check_new(file, key, "weights", key.block in blocks)
            blocks[key.block] = reader.difference(key, parameters)
        else:
            pair = layers.setdefault(key.leaf, {}).setdefault(key.block, _Pair())
            _check_new(file, key, "weights", getattr(pair, key.part) is not None)
            setattr(pair, key.part, key)
    kernels = {name: layer.kernel.shape for name, layer in lora.linears(network).items()}
    adapters = {leaf: reader.layer(kernels[leaf], pairs) for leaf, pairs in sorted(layers.items())}
    return Lora(adapters, differences)


def _check_one(file: Path, keys: list[Key], field: str, wrong: str) -> None:
    firsts = {getattr(key, field): files.short(key.text) for key in reversed(keys)}
    if len(firsts) > 1:
        first, second, *_ = sorted(firsts.values())
        raise ValueError(f"{file} {wrong}: '{first}' and '{second}'")


def _check_new(file: Path, key: Key, what: str, there: bool) -> None:
    if there:
        raise ValueError(f"{file} has the same {what} twice: once in '{files.short(key.text)}'")


def _settings(file: Path, header: Mapping[str, str], prefix: str) -> _Settings | None:
    """The LoraConfig beside the file or in its header; None where there is none to be had."""
    config = file.with_name(CONFIG)
    peft, diffusers = FORMS["peft"][1], FORMS["diffusers"][1]
    if prefix.startswith(peft) and os.path.lexists(config):
        return _Settings.of(str(config), files.read_json(config, files.MIB))
    if _HEADER in header:
        source = f"the header of {file}"
        values = files.parse_json(header[_HEADER], source)
        if not any(field.startswith(prefix) for field in values):
            prefix = diffusers  # diffusers names the fields so whatever the keys are
        fields = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        return _Settings.of(source, fields)
    if prefix == peft:
        raise ValueError(f"{file} has no {CONFIG} beside it, which says how to scale its LoRA")
    return None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """An open file, and what its LoraConfig says, if it has one."""

    file: Path
    tensors: Mapping[str, Tensor]
    settings: _Settings | None

    def layer(self, kernel: tuple[int, ...], pairs: Mapping[int | None, _Pair]) -> Adapter:
        """The adapter of one layer, its blocks stacked as those of `kernel` [*stack i o] are."""
        *stack, fan_in, fan_out = kernel
        found = {}
        for block, pair in pairs.items():
            key = next(key for key in (pair.A, pair.B, pair.alpha) if key)
            self._check_block(key, stack)
            found[block] = self._pair(pair, fan_in, fan_out)
        if not stack:
            return found[None]
        rank = max(adapter.a.shape[-1] for adapter in found.values())
        scales = {adapter.scale for adapter in found.values()}
        a = np.zeros((*stack, fan_in, rank), np.float32)
        b = np.zeros((*stack, rank, fan_out), np.float32)
        for block, adapter in found.items():
            own = adapter.a.shape[-1]
            a[block, :, :own] = adapter.a
            b[block, :own] = adapter.b * (adapter.scale if len(scales) > 1 else 1.0)
        return Adapter(a, b, scales.pop() if len(scales) == 1 else 1.0)

    def difference(self, key: Key, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        """What is added to a parameter, or to one block of it, in our order of axes."""
        if key.leaf not in shapes:
            raise ValueError(f"{self.file}: '{key.text}' is of a layer that this network lacks")
        shape = shapes[key.leaf]
        if key.block is not None:
            self._check_block(key, shape[:1])
            shape = shape[1:]
        value, axes = self._tensor(key), convert.AXES[kinds()[key.leaf]]
        if axes is not None and value.ndim == len(axes):
            value = np.transpose(value, axes)
        if value.shape != shape:
            raise ValueError(self._misfit(key, value, f"{list(shape)} (axes in our order)"))
        return value

    def _check_block(self, key: Key, stack: tuple[int, ...] | list[int]) -> None:
        if key.block is not None and key.block >= stack[0]:
            raise ValueError(
                f"{self.file}: '{key.text}' is of block {key.block}; this network has {stack[0]} "
                "blocks"
            )

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
            scale = self.settings.scale(pair.A, len(a)) if self.settings else 1.0
            return self._scaled(pair.A, a, b, scale)
        if self.settings is not None:
            raise ValueError(
                f"{self.file} says the scale twice: in '{pair.alpha.text}' and in "
                f"{self.settings.source}"
            )
        alpha = self._tensor(pair.alpha)
        if alpha.size != 1:
            raise ValueError(self._misfit(pair.alpha, alpha, "[], one number"))
        return self._scaled(pair.alpha, a, b, float(alpha.reshape(())) / len(a))

    def _scaled(self, key: Key, a: np.ndarray, b: np.ndarray, scale: float) -> Adapter:
        if not abs(scale) * max(1.0, float(np.abs(b).max())) <= float(np.finfo(np.float32).max):
            raise ValueError(f"{self.file}: '{key.text}' is scaled by {scale}, beyond float32")
        return Adapter(a.T, b.T, scale)

    def _tensor(self, key: Key) -> np.ndarray:
        """The values of a key in float32, which holds those of 8 and 16 bits exactly."""
        tensor = self.tensors[key.text]
        if tensor.dtype not in (*convert.FLOATS, *_FP8, *(_WHOLES if key.part == "alpha" else ())):
            raise ValueError(
                f"{self.file}: '{key.text}' is stored as {convert.dtype_name(tensor)}, not as a "
                "float"
            )
        with np.errstate(over="ignore"):  # checked below
            value = tensor.read(tuple(slice(0, n) for n in tensor.shape)).astype(np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"{self.file}: '{key.text}' holds values that are not finite")
        return value

    def _misfit(self, key: Key, value: np.ndarray, wanted: str) -> str:
        return (
            f"{self.file}: '{key.text}' has shape {list(value.shape)}, where this network needs "
            f"{wanted}; was it trained for another size of model?"
        )
