"""Publishers' files to nnx modules and back: one table of names per network serves both directions.

A table row is `(publisher's key, path of the leaf, kind)`. `{i}` in the key stands for a repeated
block. When the path has the same placeholder, each repeat is its own leaf (an `nnx.List`); when it
has not, the repeats are the leading axis of one stacked leaf, as scanned layers keep them.

Loading is strict: an unknown key, an unfilled leaf, a key matched twice, a wrong shape or a dtype
that is not a float of 16 bits or more raises ValueError naming it, before any leaf is filled.
Tensors are then read from the mapped files shard by shard: beside what its devices hold, a host
holds one device's part of one leaf. A number that is not finite, in the file or in the leaf's
dtype, is refused as it is met: one would reach every output.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors import SafetensorError
from safetensors.numpy import save_file

from worldr1_jax import files
from worldr1_jax.mesh.placement import leaf_path
from worldr1_jax.weights import orbax as stored
from worldr1_jax.weights.safetensors import Rows, Tensor, open_tensors

Table = Sequence[tuple[str, str, str]]
Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]

# kind -> axes of the publisher's tensor in our order. Torch keeps weights [out, in, *kernel]; we
# keep [*kernel, in, out].
AXES: dict[str, tuple[int, ...] | None] = {
    "copy": None,
    "linear": (1, 0),
    "conv1d": (2, 1, 0),
    "conv2d": (2, 3, 1, 0),
    "conv3d": (2, 3, 4, 1, 0),
    "conv_transpose2d": (2, 3, 0, 1),
}


# Dtypes that may be cast to a leaf's. fp8 files are not among them: their values mean nothing
# without the scales that their makers keep elsewhere.
FLOATS = ("F64", "F32", "F16", "BF16")


class Source(NamedTuple):
    """A tensor that fills a leaf, or one layer of a stacked leaf (then `layer` is its number)."""

    layer: int | None
    tensor: Tensor | Rows
    axes: tuple[int, ...] | None


def read_config(path: str | Path) -> dict[str, Any]:
    """The publisher's config.json as a dict, of a folder or beside a file. Raises ValueError when
    it is missing or is no JSON object."""
    path = Path(path)
    path = (path.parent if os.path.isfile(path) else path) / "config.json"
    if not os.path.lexists(path):
        raise ValueError(
            f"{path} is missing: weights are read from a folder with config.json and .safetensors"
        )
    return files.read_json(path)


def config_of(cls: Any, path: str | Path) -> Any:
    """`cls.from_dict` of the config.json at `path`, whose errors then name the folder as well."""
    values = read_config(path)
    try:
        return cls.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def holds(path: str | Path, key: str) -> bool:
    """Whether the files have a tensor of this name: how layouts are told apart. A folder that
    launch/convert_weights.py wrote has no publisher's names."""
    return not stored.found(path) and key in open_tensors(path)


def load(
    model: nnx.Module,
    path: str | Path,
    table: Table,
    repeats: Mapping[str, int] | None = None,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Shardings | None = None,
    ignore: Sequence[str] = (),
    split: Mapping[str, Sequence[str]] | None = None,
    skip_leaves: type[nnx.Variable] | None = nnx.LoRAParam,
) -> nnx.Module:
    """Fills `model` (arrays or ShapeDtypeStructs) in place from files and returns it.

    Args:
      model: the module; every `nnx.Param` leaf has to be filled, except those of the type
        `skip_leaves`.
      path: what `weight_files.open_tensors` reads, or a folder that launch/convert_weights.py
        wrote, which needs no table.
      table: rows of (publisher's key, leaf path, kind).
      repeats: how many values each placeholder takes, e.g. {"i": 30}.
      dtype: dtype of the filled leaves; None keeps each leaf's own.
      mesh: with `shardings` None, leaves are replicated over it; None leaves them on the default
        device.
      shardings: (leaf path, shape) -> sharding, for weights that are sharded as they stream in.
      ignore: regular expressions of publisher's keys that are deliberately not loaded.
      split: regular expressions of publisher's keys whose tensors hold several of ours below each
        other, in equal parts -> the parts' names; the table calls them "key.name".

    Raises:
      ValueError: a missing, truncated or unreadable file, an unknown or doubled key, an unfilled
        leaf, a wrong shape or dtype, or a number that is not finite. The model is then as it was.
    """
    found = leaves(model, skip_leaves)
    targets = {}
    for name, variable in found.items():
        value = variable.get_raw_value()
        sharding = shardings(name, tuple(value.shape)) if shardings else None
        if sharding is None and mesh is not None:
            sharding = NamedSharding(mesh, PartitionSpec())
        targets[name] = jax.ShapeDtypeStruct(value.shape, dtype or value.dtype, sharding=sharding)
    if stored.found(path):
        values = stored.restore(path, targets)
    else:
        tensors = _parts(Path(path), open_tensors(path), split or {})
        sources = _match(Path(path), tensors, table, repeats or {}, ignore, targets)
        values = {name: _fill(sources[name], target) for name, target in targets.items()}
    for name, variable in found.items():
        variable.set_raw_value(values[name])
    return model


def save(
    model: nnx.Module,
    folder: str | Path,
    table: Table,
    repeats: Mapping[str, int] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    filename: str = "diffusion_pytorch_model.safetensors",
    dtype: Any = None,
) -> None:
    """Writes config.json and one safetensors file with the publisher's names, shapes and axis
    order."""
    folder = files.make_folder(folder)
    found = leaves(model)
    tensors = {}
    for key, (leaf, index, kind) in _expand(table, repeats or {}):
        value = np.asarray(found[leaf].get_raw_value())
        value = value if index is None else value[index]
        axes = AXES[kind]
        value = value if axes is None else np.transpose(value, np.argsort(axes))
        # not ascontiguousarray, which gives scalars an axis
        tensors[key] = np.asarray(value.astype(dtype) if dtype else value, order="C")
    write_tensors(tensors, folder / filename, {"format": "pt"})
    if config is not None:
        _write_config(folder, config)


def write_tensors(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file; ValueError, naming it, where that cannot be."""
    try:
        with files.named(path, "written"):
            save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be written: {files.short(str(error))}") from error


def store(model: nnx.Module, folder: str | Path, config: Mapping[str, Any]) -> None:
    """Writes config.json and an Orbax folder that `load` restores onto any mesh (see stored.py);
    adapters are not written. Every process of a mesh has to call it."""
    found = leaves(model)
    stored.save(folder, {name: leaf.get_raw_value() for name, leaf in found.items()})
    if jax.process_index() == 0:
        _write_config(Path(folder), config)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(dict(config), indent=2, sort_keys=True)
    files.write_atomically(folder / "config.json", f"{text}\n".encode())


def check_finite(model: nnx.Module, what: str) -> None:
    """Raises ValueError, beginning with `what`, for a parameter that holds a number that is not
    finite, such as the sum of a kernel and adapters that its dtype does not hold."""
    stored.check_finite(what, {name: leaf.get_raw_value() for name, leaf in leaves(model).items()})


def leaves(
    model: nnx.Module, skip: type[nnx.Variable] | None = nnx.LoRAParam
) -> dict[str, nnx.Variable]:
    """The parameters of a network by path, but those of the type `skip`."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    graph = {leaf_path(path): variable for path, variable in flat}
    live = {
        leaf_path(path): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)
    }
    return {name: live[name] for name in graph if not (skip and isinstance(live[name], skip))}


def _expand(
    table: Table, repeats: Mapping[str, int]
) -> Iterator[tuple[str, tuple[str, int | None, str]]]:
    """Every (key, (leaf, index in the stacked leaf or None, kind)) that the table stands for, each
    key once."""
    seen = set()
    for pattern, path, kind in table:
        if kind not in AXES:
            raise ValueError(f"unknown kind '{kind}' in the table row of '{pattern}'")
        names = re.findall(r"\{(\w+)\}", pattern)
        stacked = [n for n in names if f"{{{n}}}" not in path]
        if len(stacked) > 1:
            raise ValueError(f"the table row of '{pattern}' stacks more than one placeholder")
        for values in itertools.product(*(range(repeats[n]) for n in names)):
            numbers = dict(zip(names, values, strict=True))
            key = pattern.format(**numbers)
            if key in seen:
                raise ValueError(f"the table matches the key '{key}' twice")
            seen.add(key)
            index = numbers[stacked[0]] if stacked else None
            yield key, (path.format(**numbers), index, kind)


def _parts(
    path: Path, tensors: Mapping[str, Tensor], split: Mapping[str, Sequence[str]]
) -> dict[str, Tensor | Rows]:
    """The tensors, those that hold several of ours in their parts."""
    found: dict[str, Tensor | Rows] = {}
    for key, tensor in tensors.items():
        names = next((names for p, names in split.items() if re.fullmatch(p, key)), None)
        if names is None:
            found[key] = tensor
            continue
        rows, rest = divmod(tensor.shape[0] if tensor.shape else 0, len(names))
        if rest or not rows:
            raise ValueError(
                f"{path}: '{key}' has shape {list(tensor.shape)}; its first axis has to hold "
                f"{len(names)} equal parts"
            )
        for part, name in enumerate(names):
            found[f"{key}.{name}"] = Rows(tensor, f"{key}.{name}", part * rows, rows)
    return found


def _match(
    path: Path,
    tensors: Mapping[str, Tensor | Rows],
    table: Table,
    repeats: Mapping[str, int],
    ignore: Sequence[str],
    targets: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, list[Source]]:
    """What fills each leaf. Everything that can be wrong is found here, from names and headers."""
    for count in repeats.values():
        if count > len(tensors):
            raise ValueError(
                f"{path} has {len(tensors)} tensors, too few for the {count} blocks of its config"
            )
    wanted = dict(_expand(table, repeats))
    for leaf, _, _ in wanted.values():
        if leaf not in targets:
            raise ValueError(f"the table names the leaf '{leaf}', which the network does not have")
    # Dtypes and shapes first: with files of another precision or size, they say more than names.
    for key in wanted:
        if key in tensors:
            _check_dtype(path, tensors[key])
    for key, (leaf, index, kind) in wanted.items():
        if key in tensors:
            shape = targets[leaf].shape
            _check_shape(path, tensors[key], leaf, shape if index is None else shape[1:], kind)
    unknown = [
        key for key in tensors
        if key not in wanted and not any(re.fullmatch(pattern, key) for pattern in ignore)
    ]  # fmt: skip
    if unknown:
        example = files.short(unknown[0])
        raise ValueError(f"{path} has {len(unknown)} unknown keys, such as '{example}'")
    sources: dict[str, list[Source]] = {}
    for key, (leaf, index, kind) in wanted.items():
        if key not in tensors:
            raise ValueError(f"{path} lacks the key '{key}', which fills the leaf '{leaf}'")
        sources.setdefault(leaf, []).append(Source(index, tensors[key], AXES[kind]))
    for leaf, target in targets.items():
        if leaf not in sources:
            raise ValueError(f"no key of {path} fills the leaf '{leaf}'")
        layers = [source.layer for source in sources[leaf]]
        if layers not in ([None], list(range(target.shape[0] if target.shape else 0))):
            raise ValueError(f"{path} fills layers {layers} of '{leaf}', {list(target.shape)}")
    return sources


def _check_dtype(path: Path, tensor: Tensor | Rows) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{path}: '{tensor.key}' is stored as {dtype_name(tensor)}, not as a float of 16 bits "
            "or more: give the release in bf16, fp16 or fp32"
        )


def dtype_name(tensor: Tensor | Rows) -> str:
    """A dtype as messages name it."""
    names = {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8"}
    return names.get(tensor.dtype, tensor.dtype)


def _check_shape(
    path: Path, tensor: Tensor | Rows, leaf: str, shape: tuple[int, ...], kind: str
) -> None:
    axes = AXES[kind]
    if axes is not None and len(axes) == len(shape):
        shape = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
    if tensor.shape != shape:
        raise ValueError(
            f"{path}: '{tensor.key}' has shape {list(tensor.shape)}, but the config asks for "
            f"{list(shape)} (leaf '{leaf}')"
        )


def _fill(sources: Sequence[Source], target: jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf, read part by part: each part goes to its devices before the next one is read."""
    shape, sharding = target.shape, target.sharding
    if sharding is None:
        return jax.device_put(_read(sources, tuple(slice(0, n) for n in shape), target.dtype))
    parts: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        parts.setdefault(ranges, []).append(device)
    arrays = []
    for ranges, devices in parts.items():
        host = _read(sources, tuple(slice(*r) for r in ranges), target.dtype)
        for device in devices:
            place = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            arrays.append(jax.device_put(host, place))
        jax.block_until_ready(arrays)  # so that `host` can go before the next part is read
        del host
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read(sources: Sequence[Source], index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """One part of a leaf on the host, in its own memory, cast to `dtype`."""
    out = np.empty([s.stop - s.start for s in index], dtype)
    stacked = sources[0].layer is not None
    for source in sources[index[0]] if stacked else sources:
        part = index[1:] if stacked else index
        place = out if source.layer is None else out[source.layer - index[0].start, ...]
        if source.axes is None:
            with np.errstate(over="ignore"):
                place[...] = source.tensor.read(part)
        else:
            theirs = tuple(part[source.axes.index(axis)] for axis in range(len(part)))
            # Cast first: a transposed copy that casts as well takes three times as long.
            with np.errstate(over="ignore"):  # checked below
                value = source.tensor.read(theirs).astype(dtype, copy=False)
            place[...] = np.transpose(value, source.axes)
        if not is_finite(place):
            raise ValueError(
                f"{source.tensor.path}: '{source.tensor.key}' holds numbers that are not finite "
                f"as {place.dtype.name}: the file is damaged, or was trained until it broke"
            )
    return out


def is_finite(values: np.ndarray) -> bool:
    """Whether there is no NaN or infinity; piece by piece, so that no array of answers is made."""
    flat, size = values.reshape(-1), 2**18
    pieces = (flat[first : first + size] for first in range(0, flat.size, size))
    if values.dtype == jnp.bfloat16:  # numpy's own test would convert one number after the other
        return not any(((piece.view(np.uint16) & 0x7F80) == 0x7F80).any() for piece in pieces)
    return all(np.isfinite(piece).all() for piece in pieces)
