"""The mesh, and one ordered table of rules per network: which axis of a leaf lies on which axis of
the mesh.

Mesh axes: data (prompt groups), fsdp (weights), context (tokens of one video), tensor (heads).
Model code says what an axis is by the name of its leaf; only these tables say where it lives. The
first rule that matches a leaf's path counts; a leaf that no rule matches, or a rule that no leaf
uses, is an error, so that a renamed layer cannot become replicated unnoticed.

Why these places: kernels are split over fsdp on their input axis and over tensor on the axis of
heads or of hidden units, so that a column-parallel product is followed by a row-parallel one and
tensor needs one reduction a block. Norms, biases and modulation tables are small and replicated.
LoRA factors follow the kernel that they are added to.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from worldr1_jax.models.convert import leaf_path

AXES = ("data", "fsdp", "context", "tensor")
BATCH = PartitionSpec(
    ("data", "fsdp")
)  # samples: devices that share weights still hold their own videos

Rules = Sequence[tuple[str, tuple[str | None, ...]]]

_COLUMN, _ROW = ("fsdp", "tensor"), ("tensor", "fsdp")
_SMALL = r"(.*\.)?(bias|scale|gamma|ls[12]|scale_shift_table|embedding|pos_embed|\w+_token)"

RULES: dict[str, Rules] = {
    "wan_dit": (
        (r"blocks\.attn[12]\.to_[qkv]\.kernel", (None, *_COLUMN)),
        (r"blocks\.attn[12]\.to_out\.kernel", (None, *_ROW)),
        (r"blocks\.ffn\.linear_1\.kernel", (None, *_COLUMN)),
        (r"blocks\.ffn\.linear_2\.kernel", (None, *_ROW)),
        (r"(text_embedder|time_embedder)\.linear_[12]\.kernel", ("fsdp", None)),
        (r"time_proj\.kernel", ("fsdp", None)),
        (r"proj_out\.kernel", ("fsdp", None)),
        (r"patch_embedding\.kernel", ()),
        (_SMALL, ()),
    ),
    "lora": (
        (r"blocks\.attn[12]\.to_[qkv]\.lora_a", (None, "fsdp", None)),
        (r"blocks\.attn[12]\.to_[qkv]\.lora_b", (None, None, "tensor")),
        (r"blocks\.attn[12]\.to_out\.lora_a", (None, "tensor", None)),
        (r"blocks\.attn[12]\.to_out\.lora_b", (None, None, "fsdp")),
    ),
    "umt5": (
        (r"blocks\.([qkv]|wi_[01])\.kernel", (None, *_COLUMN)),
        (r"blocks\.(o|wo)\.kernel", (None, *_ROW)),
        (r"token_embedding\.embedding", ("fsdp", None)),
        (_SMALL, ()),
    ),
    "wan_vae": ((r".*", ()),),  # 0.5 GB at full size: replicated, its work is split over samples
    "da3": (
        (r"backbone\.blocks\.\d+\.attn\.qkv\.kernel", _COLUMN),
        (r"backbone\.blocks\.\d+\.attn\.proj\.kernel", _ROW),
        (r"backbone\.blocks\.\d+\.mlp\.(fc1|w12)\.kernel", _COLUMN),
        (r"backbone\.blocks\.\d+\.mlp\.(fc2|w3)\.kernel", _ROW),
        (r"backbone\.patch_embed\.kernel", ()),
        (r"(cam_dec|head|gs_head)\..*kernel", ()),
        (_SMALL, ()),
    ),
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the four axes from sizes such as {"data": -1, "fsdp": 2}; one -1 takes what is
    left.

    Raises:
      ValueError: an unknown axis, more than one -1, or sizes whose product is not the number of
        devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise ValueError(f"mesh has the axis '{unknown[0]}'; its axes are {', '.join(AXES)}")
    shape = [int(sizes.get(name, 1)) for name in AXES]
    free = [i for i, size in enumerate(shape) if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(
            f"mesh {dict(sizes)} is wrong: sizes are positive, and at most one is -1 (what is left)"
        )
    if free:
        shape[free[0]] = max(len(devices) // math.prod(s for s in shape if s != -1), 1)
    if math.prod(shape) != len(devices):
        text = ", ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        raise ValueError(
            f"mesh of {text} needs {math.prod(shape)} devices, but there are {len(devices)}"
        )
    return jax.make_mesh(tuple(shape), AXES, devices=devices, axis_types=(AxisType.Auto,) * 4)


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch of videos."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spec_of(
    path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh
) -> tuple[int, PartitionSpec]:
    """Index of the rule that matches and the placement it gives to a leaf of this shape.

    An axis whose length the mesh axis does not divide stays whole: nano's 12 output channels must
    not stop a mesh that fits everything else.
    """
    for index, (pattern, axes) in enumerate(rules):
        if re.fullmatch(pattern, path):
            sizes = [mesh.shape[a] if a else 1 for a in axes]
            fits = [a if n % s == 0 else None for a, n, s in zip(axes, shape, sizes, strict=False)]
            return index, PartitionSpec(*fits)
    raise ValueError(f"no sharding rule matches the leaf '{path}'")


def shardings_of(state: Any, name: str, mesh: Mesh) -> Any:
    """NamedShardings for every leaf of an nnx state, by the table `name`.

    Raises:
      ValueError: a leaf without a rule, or a rule without a leaf.
    """
    rules, used = RULES[name], set()
    flat = []
    for path, leaf in nnx.to_flat_state(state):
        index, spec = spec_of(leaf_path(path), leaf.get_raw_value().shape, rules, mesh)
        used.add(index)
        flat.append((path, leaf.replace(NamedSharding(mesh, spec))))
    unused = [rules[i][0] for i in range(len(rules)) if i not in used]
    if unused:
        raise ValueError(f"the sharding rule '{unused[0]}' of {name} matches no leaf")
    return nnx.from_flat_state(flat)


def placer(name: str, mesh: Mesh | None) -> Callable[[str, tuple[int, ...]], NamedSharding | None]:
    """Leaf path and shape -> its sharding, for weights that are placed as they stream in."""
    if mesh is None:
        return lambda path, shape: None
    return lambda path, shape: NamedSharding(mesh, spec_of(path, shape, RULES[name], mesh)[1])


def place(module: nnx.Module, name: str, mesh: Mesh) -> nnx.Module:
    """Moves a module's parameters to their shards, in place; LoRA leaves follow the table
    `lora`."""
    for kind, table in ((nnx.LoRAParam, "lora"), (nnx.Not(nnx.LoRAParam), name)):
        state = nnx.state(module, nnx.All(nnx.Param, kind))
        if jax.tree.leaves(state):
            nnx.update(module, jax.device_put(state, shardings_of(state, table, mesh)))
    return module


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The leading axis is the batch of videos."""
    return NamedSharding(mesh, BATCH)


def on(mesh: Mesh) -> contextlib.AbstractContextManager:
    """`jax.set_mesh(mesh)`, unless the mesh is set already: a second time is refused while a
    function is traced."""
    if jax.sharding.get_abstract_mesh() == mesh.abstract_mesh:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def each_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays with a leading batch, run by every device on its own samples.

    For work that needs no other device's data but that the compiler would not split by itself, such
    as a loop over samples. Call it under `jax.set_mesh`.
    """
    return jax.shard_map(function, in_specs=BATCH, out_specs=BATCH, check_vma=False)


def to_global(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from a host array that every process holds whole."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array on every host."""
    if jax.process_count() == 1:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
