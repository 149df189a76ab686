"""Publishers' files to nnx modules and back: one table of names per network serves both directions.

A table row is `(publisher's key, path of the leaf, kind)`. `{i}` in the key stands for a repeated
block. When the path has the same placeholder, each repeat is its own leaf (an `nnx.List`); when it
has not, the repeats are the leading axis of one stacked leaf, as scanned layers keep them.

Loading is strict: an unknown key, an unfilled leaf, a key matched twice or a wrong shape raises
ValueError naming it. Tensors are read from the mapped file one at a time, so that host memory holds
one leaf, not one model.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Table = Sequence[tuple[str, str, str]]
INDEX_SUFFIX = ".safetensors.index.json"

# kind -> axes of the publisher's tensor in our order. Torch keeps weights [out, in, *kernel]; we
# keep [*kernel, in, out].
_AXES: dict[str, tuple[int, ...] | None] = {
    "copy": None,
    "linear": (1, 0),
    "conv1d": (2, 1, 0),
    "conv2d": (2, 3, 1, 0),
    "conv3d": (2, 3, 4, 1, 0),
    "conv_transpose2d": (2, 3, 0, 1),
}


def read_config(folder: str | Path) -> dict[str, Any]:
    """The publisher's config.json as a dict. Raises ValueError when it is missing or is not
    JSON."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: weights are read from a folder with config.json and .safetensors"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def load(
    model: nnx.Module,
    path: str | Path,
    table: Table,
    repeats: Mapping[str, int] | None = None,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] | None = None,
    ignore: Sequence[str] = (),
    skip_leaves: type[nnx.Variable] | None = nnx.LoRAParam,
) -> nnx.Module:
    """Fills `model` (arrays or ShapeDtypeStructs) in place from safetensors and returns it.

    Args:
      model: the module; every `nnx.Param` leaf has to be filled, except those of the type
        `skip_leaves`.
      path: a folder (one .safetensors file, or shards with an index) or one .safetensors file.
      table: rows of (publisher's key, leaf path, kind).
      repeats: how many values each placeholder takes, e.g. {"i": 30}.
      dtype: dtype of the filled leaves; None keeps each leaf's own.
      mesh: with `shardings` None, leaves are replicated over it; None leaves them on the default
        device.
      shardings: (leaf path, shape) -> sharding, for weights that are sharded as they stream in.
      ignore: regular expressions of publisher's keys that are deliberately not loaded.

    Raises:
      ValueError: a missing, truncated or unreadable file, an unknown or doubled key, an unfilled
        leaf, a wrong shape.
    """
    leaves = _leaves(model, skip_leaves)
    wanted = dict(_expand(table, repeats or {}))
    keys = _open_keys(Path(path))
    unknown = [k for k in keys if k not in wanted and not any(re.fullmatch(p, k) for p in ignore)]
    if unknown:
        raise ValueError(f"{path} has {len(unknown)} unknown keys, such as '{unknown[0]}'")
    groups: dict[str, list[tuple[int | None, str, str]]] = {}
    for key, (leaf, index, kind) in wanted.items():
        groups.setdefault(leaf, []).append((index, key, kind))
    for name in groups:
        if name not in leaves:
            raise ValueError(f"the table names the leaf '{name}', which the network does not have")
    for name, variable in leaves.items():
        if name not in groups:
            raise ValueError(f"no key of {path} fills the leaf '{name}'")
        value = _read_leaf(name, variable, groups[name], keys, Path(path))
        target = dtype or variable.get_raw_value().dtype
        sharding = shardings(name, value.shape) if shardings else None
        if sharding is None and mesh is not None:
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        host = value.astype(target)
        variable.set_raw_value(jax.device_put(host, sharding))
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = _leaves(model, nnx.LoRAParam)
    tensors = {}
    for key, (leaf, index, kind) in _expand(table, repeats or {}):
        value = np.asarray(leaves[leaf].get_raw_value())
        value = value if index is None else value[index]
        axes = _AXES[kind]
        value = value if axes is None else np.transpose(value, np.argsort(axes))
        tensors[key] = np.ascontiguousarray(value.astype(dtype) if dtype else value)
    save_file(tensors, folder / filename, metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(
            json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        )


def leaf_path(path: Sequence[Any]) -> str:
    """('blocks', 0, 'kernel') -> 'blocks.0.kernel'."""
    return ".".join(str(part) for part in path)


def _leaves(model: nnx.Module, skip: type[nnx.Variable] | None) -> dict[str, nnx.Variable]:
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
        if kind not in _AXES:
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


def _open_keys(path: Path) -> dict[str, Any]:
    """Every key of the file or of the folder's shards -> the open file that holds it."""
    keys: dict[str, Any] = {}
    for file in _files(path):
        try:
            handle = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read as safetensors (truncated or not such a file): {error}"
            ) from error
        for key in list(handle.keys()):
            if key in keys:
                raise ValueError(f"the key '{key}' is in more than one file of {path}")
            keys[key] = handle
    return keys


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give a folder or a .safetensors file")
    indexes = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) > 1:
        raise ValueError(
            f"{path} has more than one weight index: {', '.join(i.name for i in indexes)}"
        )
    if indexes:
        names = sorted(set(json.loads(indexes[0].read_text())["weight_map"].values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{path} lacks the shard {missing[0]}, which {indexes[0].name} names")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no .safetensors file")
    if len(files) > 1:
        raise ValueError(
            f"{path} holds {len(files)} .safetensors files but no index; name the one to read"
        )
    return files


def _read_leaf(
    name: str,
    variable: nnx.Variable,
    rows: list[tuple[int | None, str, str]],
    keys: Mapping[str, Any],
    path: Path,
) -> np.ndarray:
    shape = tuple(variable.get_raw_value().shape)
    out = None
    for index, key, kind in rows:
        if key not in keys:
            raise ValueError(f"{path} lacks the key '{key}', which fills the leaf '{name}'")
        value = keys[key].get_tensor(key)
        axes = _AXES[kind]
        value = (
            value
            if axes is None
            else np.transpose(value, axes)
            if value.ndim == len(axes)
            else value
        )
        want = shape if index is None else shape[1:]
        if value.shape != want:
            raise ValueError(
                f"{path}: '{key}' has shape {list(value.shape)}, the leaf '{name}' {list(want)}"
            )
        if value.dtype not in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16):
            raise ValueError(
                f"{path}: '{key}' is stored as {value.dtype}, not as a float of 16 bits or more"
            )
        if index is None:
            return value
        out = np.empty(shape, value.dtype) if out is None else out
        out[index] = value
    filled = sorted(index for index, _, _ in rows if index is not None)
    if out is None or filled != list(range(shape[0])):
        raise ValueError(f"{path} fills layers {filled} of the leaf '{name}', which has {shape[0]}")
    return out
