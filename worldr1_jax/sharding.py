"""The mesh, and one ordered table of rules per network: which axis of a leaf lies on which axis of
the mesh.

Mesh axes: data (prompt groups), fsdp (weights), context (tokens of one video), tensor (heads).
Model code says what an axis is by the name of its leaf; only these tables say where it lives. The
first rule that matches a leaf's path counts; a leaf that no rule matches, or a rule that no leaf
uses, is an error, so that a renamed layer cannot become replicated unnoticed.

Why these places: kernels are split over fsdp on their input axis and over tensor on the axis of
heads or of hidden units, so that a column-parallel product is followed by a row-parallel one and
tensor needs one reduction a block. Norms, biases and modulation tables are small and replicated.
LoRA factors follow the kernel that they are added to, but their long sides are split over all axes,
or half of them, with their moments and average, would be whole on every device. Weights are split
over context as well as fsdp: devices that share the tokens of a video need not hold the same
weights twice.

Activations: model code names what an axis is (`constrain`), and ACTIVATIONS says where it lives.
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
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from worldr1_jax.models.convert import leaf_path

AXES = ("data", "fsdp", "context", "tensor")
HOST = "pinned_host"  # jax's name of the memory of hosts that devices read directly
BATCH = PartitionSpec(
    ("data", "fsdp")
)  # samples: devices that share weights still hold their own videos

Axis = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, tuple[Axis, ...]]]

# What an axis of an activation is -> where it lives.
ACTIVATIONS: dict[str, Axis] = {
    "videos": ("data", "fsdp"),
    "tokens": "context",
    "frames": "context",  # where a video's frames go apart: a device has whole ones
    "sequences": ("data", "fsdp", "context"),  # frames of all videos, on one axis
    "heads": "tensor",
    "hidden": "tensor",  # of the MLP, between its column-parallel and its row-parallel product
    "features": None,  # of the residual stream
    "text": None,  # tokens of the prompt
    "words": "context",  # the same, while embeddings wait for their use
    "columns": ("context", "tensor"),  # of latents that are decoded, or wait
}

_SPLIT = ("fsdp", "context")
_COLUMN, _ROW = (_SPLIT, "tensor"), ("tensor", _SPLIT)
_SMALL = r"(.*\.)?(bias|scale|gamma|ls[12]|scale_shift_table|embedding|pos_embed|\w+_token)"

RULES: dict[str, Rules] = {
    "wan_dit": (
        (r"blocks\.attn[12]\.to_[qkv]\.kernel", (None, *_COLUMN)),
        (r"blocks\.attn[12]\.to_out\.kernel", (None, *_ROW)),
        (r"blocks\.ffn\.linear_1\.kernel", (None, *_COLUMN)),
        (r"blocks\.ffn\.linear_2\.kernel", (None, *_ROW)),
        (r"(text_embedder|time_embedder)\.linear_[12]\.kernel", (_SPLIT, None)),
        (r"time_proj\.kernel", (_SPLIT, None)),
        (r"proj_out\.kernel", (_SPLIT, None)),
        (r"patch_embedding\.kernel", ()),
        (_SMALL, ()),
    ),
    "lora": (
        (r"blocks\.attn[12]\.to_[qkv]\.lora_a", (None, _SPLIT, None)),
        (r"blocks\.attn[12]\.to_[qkv]\.lora_b", (None, None, ("tensor", *_SPLIT))),
        (r"blocks\.attn[12]\.to_out\.lora_a", (None, ("tensor", *_SPLIT), None)),
        (r"blocks\.attn[12]\.to_out\.lora_b", (None, None, _SPLIT)),
    ),
    "umt5": (
        (r"blocks\.([qkv]|wi_[01])\.kernel", (None, *_COLUMN)),
        (r"blocks\.(o|wo)\.kernel", (None, *_ROW)),
        (r"token_embedding\.embedding", (_SPLIT, None)),
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
    return _arrange(tuple(shape), devices)


def _arrange(shape: tuple[int, ...], devices: list[Any]) -> Mesh:
    """Slices, which a slow network joins, lie along data only: there one gradient crosses a step.

    Raises:
      ValueError: slices that do not divide data, or that differ in size.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    count = len(slices)
    if count == 1:
        return Mesh(_torus(shape, devices), AXES, axis_types=(AxisType.Auto,) * 4)
    if shape[0] % count or len({len(group) for group in slices.values()}) > 1:
        raise ValueError(
            f"mesh has data {shape[0]} on {count} slices of {sorted(map(len, slices.values()))} "
            "devices: data has to be a multiple of the number of equal slices"
        )
    inner = (shape[0] // count, *shape[1:])
    parts = [_torus(inner, slices[i]) for i in sorted(slices)]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * 4)


def _torus(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Devices in the mesh's shape, neighbours of the chips' network beside each other; a logical
    axis may be part of a physical one, as 2 of 8."""
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def default_sizes(
    devices: Sequence[Any], videos: int, heads: int, least_context: int = 1
) -> dict[str, int]:
    """Mesh sizes that suit a number of devices, for `videos` of an update and a DiT of `heads`.

    A device takes whole videos where there are enough of them, for then tokens need no exchange;
    else the fewest devices that fill the machine share one (context), at least `least_context`,
    as what the backward pass keeps of a video may not fit into one. Weights are split over all
    devices of a slice (fsdp), because a layer's gather takes less time than one video's work in it.
    On a CPU host, where devices share their memory, weights are whole and only videos are split.

    Raises:
      ValueError: no number of devices for each video fits.
    """
    count = len(devices)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if devices[0].platform == "cpu":
        data = max(n for n in range(1, count + 1) if videos % n == 0 and count % n == 0)
        return {"data": data, "fsdp": 1, "context": count // data, "tensor": 1}
    for context in range(least_context, count // slices + 1):
        per_slice = count // slices // context
        if count % (slices * context) == 0 and videos % (slices * per_slice) == 0:
            if heads % context:
                continue
            return {"data": slices, "fsdp": per_slice, "context": context, "tensor": 1}
    raise ValueError(
        f"{videos} videos do not divide over {count} devices: choose groups so that they do"
    )


class _Any:
    """A mesh of one device, to check names by when there is none."""

    shape = dict.fromkeys(AXES, 1)


_ANY = _Any()


def batch_parts(mesh: Mesh, of: str = "videos") -> int:
    """Into how many parts the mesh splits a batch of videos, or of sequences."""
    return math.prod(mesh.shape[name] for name in ACTIVATIONS[of] or ())


def turns(mesh: Mesh, count: int, at_once: int) -> int:
    """How often each device takes `at_once` of its samples (0: all) until `count` are done.

    Raises:
      ValueError: a number that does not divide a device's samples.
    """
    mine = count // batch_parts(mesh)
    if not at_once or mine <= at_once:
        return 1
    if mine % at_once:
        raise ValueError(
            f"videos_at_once is {at_once}; it has to divide the {mine} videos of a device"
        )
    return mine // at_once


def spec_of(
    path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh
) -> tuple[int, PartitionSpec]:
    """Index of the rule that matches and the placement it gives to a leaf of this shape.

    An axis whose length the mesh axis does not divide stays whole: nano's 12 output channels must
    not stop a mesh that fits everything else.
    """
    for index, (pattern, axes) in enumerate(rules):
        if re.fullmatch(pattern, path):
            fits = [_fitting(a, n, mesh) for a, n in zip(axes, shape, strict=False)]
            return index, PartitionSpec(*fits)
    raise ValueError(f"no sharding rule matches the leaf '{path}'")


def _fitting(axis: Axis, length: int, mesh: Any) -> Axis:
    """The longest prefix of the mesh axes whose size divides the length, or None."""
    if axis is None or isinstance(axis, str):
        return axis if length % mesh.shape.get(axis, 1) == 0 else None
    names = tuple(name for name in axis if mesh.shape[name] > 1)
    while names and length % math.prod(mesh.shape[name] for name in names):
        names = names[:-1]
    return names[0] if len(names) == 1 else names or None


def spec_for(shape: tuple[int, ...], axes: Sequence[str | None], mesh: Any) -> PartitionSpec:
    """Placement of an activation by what its axes are (keys of ACTIVATIONS, or None: whole).

    Raises:
      ValueError: a name that ACTIVATIONS lacks, or not one name an axis.
    """
    unknown = [name for name in axes if name is not None and name not in ACTIVATIONS]
    if unknown or len(axes) != len(shape):
        raise ValueError(
            f"axes {list(axes)} do not describe {list(shape)}: one of {', '.join(ACTIVATIONS)} "
            "for each"
        )
    places = [ACTIVATIONS[name] if name else None for name in axes]
    return PartitionSpec(*(_fitting(a, n, mesh) for a, n in zip(places, shape, strict=True)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, placed by what its axes are (see `spec_for`); unchanged without a mesh of ours, or where
    a device already works on its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = spec_for(x.shape, axes, _ANY if mesh.empty else mesh)
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


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
    return _updated(module, name, mesh, jax.device_put)


def describe(module: nnx.Module, name: str, mesh: Mesh) -> nnx.Module:
    """As `place`, for a module whose leaves have a shape and a dtype but no values
    (nnx.eval_shape)."""

    def described(state: Any, places: Any) -> Any:
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
        )

    return _updated(module, name, mesh, described)


def _updated(
    module: nnx.Module, name: str, mesh: Mesh, placed: Callable[[Any, Any], Any]
) -> nnx.Module:
    for kind, table in ((nnx.LoRAParam, "lora"), (nnx.Not(nnx.LoRAParam), name)):
        state = nnx.state(module, nnx.All(nnx.Param, kind))
        if jax.tree.leaves(state):
            nnx.update(module, placed(state, shardings_of(state, table, mesh)))
    return module


def rest(module: nnx.Module) -> nnx.Module:
    """Moves a module's parameters, but for adapters, to its devices' hosts, in place and in pinned
    memory, where they wait until `awake` brings them back for a stage.

    Raises:
      ValueError: the devices have no such memory.
    """
    state = nnx.state(module, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    device = min(jax.tree.leaves(state)[0].devices(), key=lambda device: device.id)
    if HOST not in (memory.kind for memory in device.addressable_memories()):
        raise ValueError(f"idle_on_host has to be (): {device.device_kind} has no {HOST} memory")
    to_host = jax.tree.map(lambda x: x.sharding.with_memory_kind(HOST), state)
    nnx.update(module, jax.device_put(state, to_host))
    return module


def awake(state: Any) -> Any:
    """The state on its devices: copies of the leaves that rest on the hosts, the others as they
    are. The copies are gone when the caller lets go of them."""

    def wake(x: Any) -> Any:
        if getattr(x.sharding, "memory_kind", None) != HOST:
            return x
        return jax.device_put(x, x.sharding.with_memory_kind("device"))

    return jax.tree.map(wake, state)


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


def each_device(function: Callable[..., Any], whole: int = 0) -> Callable[..., Any]:
    """`function` of arrays with a leading batch, run by every device on its own samples; its first
    `whole` arguments are the same for all, such as weights.

    For work that needs no other device's data but that the compiler would not split by itself, such
    as a loop over samples. Call it under `jax.set_mesh`.
    """

    def call(*arguments: Any) -> Any:
        places = (PartitionSpec(),) * whole + (BATCH,) * (len(arguments) - whole)
        return jax.shard_map(function, in_specs=places, out_specs=BATCH, check_vma=False)(
            *arguments
        )

    return call


def everywhere(array: Any, mesh: Mesh) -> Any:
    """The array on every device of the mesh; as it is when these are only described (plan.py)."""
    described = mesh.devices.flat[0].client.runtime_type.startswith("compile_only")
    return array if described else jax.device_put(array, replicated(mesh))


def to_global(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from a host array that every process holds whole."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def keys_to_global(keys: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same for typed PRNG keys, which jax does not place over several processes itself."""
    with jax.ensure_compile_time_eval():  # also where a caller is being traced, to be counted
        data = to_global(np.asarray(jax.random.key_data(keys)), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array on every host."""
    if jax.process_count() == 1:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
