"""Weights as launch/convert_weights.py writes them: an Orbax folder of named leaves, which any mesh
restores.

  config.json    the publisher's fields, in diffusers' or transformers' form
  leaves/        Orbax: one array a leaf, in our axis order
  leaves.json    {leaf: [shape, dtype]} and the size of every file below leaves/

leaves.json is written last and in one piece: a folder without it holds no weights. Reading needs no
table of publishers' names, and each host reads only what its devices hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from worldr1_jax.files import write_atomically

LEAVES, INDEX = "leaves", "leaves.json"


def found(path: str | Path) -> bool:
    """Whether this is such a folder."""
    return (Path(path) / INDEX).is_file()


def save(path: str | Path, leaves: Mapping[str, jax.Array]) -> None:
    """Writes the leaves, in the dtypes that they have; every process of a mesh has to call it.

    Raises:
      ValueError: the folder holds weights already.
    """
    path = Path(path).absolute()
    if (path / LEAVES).exists():
        raise ValueError(f"{path} holds weights already: remove it, or write to another folder")
    with ocp.StandardCheckpointer() as writer:
        writer.save(path / LEAVES, dict(leaves))
    if jax.process_index() == 0:
        index = {
            "leaves": {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in leaves.items()},
            "files": _sizes(path),
        }
        write_atomically(path / INDEX, json.dumps(index).encode())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(path))


def restore(path: str | Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Leaves by name, each onto the sharding of its target (None: the default device) and cast to
    its dtype.

    Raises:
      ValueError: leaves or shapes that are not those of `targets`, or a missing or truncated file.
    """
    path = Path(path).absolute()
    try:
        index = json.loads((path / INDEX).read_text())
        there, files = index["leaves"], index["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / INDEX} is damaged: convert the weights again") from error
    for name in sorted(there.keys() ^ targets.keys()):
        where = "no leaf of the network" if name in there else "not in the folder"
        raise ValueError(f"{path}: the leaf '{name}' is {where}; convert the weights again")
    for name, target in targets.items():
        if tuple(there[name][0]) != target.shape:
            raise ValueError(
                f"{path}: '{name}' has shape {there[name][0]}, but the config asks for "
                f"{list(target.shape)}"
            )
    sizes = _sizes(path)
    for file in sorted(files):
        if sizes.get(file) != files[file]:
            state = f"{sizes[file]} bytes long" if file in sizes else "missing"
            raise ValueError(
                f"{path / LEAVES / file} is {state}, not {files[file]} bytes as it was written: "
                "convert the weights again"
            )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        # as it was written: Orbax would cast on the host, one leaf in float32 beside the other
        name: jax.ShapeDtypeStruct(
            target.shape, jnp.dtype(there[name][1]), sharding=target.sharding or here
        )
        for name, target in targets.items()
    }
    with ocp.StandardCheckpointer() as reader:
        values = reader.restore(path / LEAVES, wanted)
    return {name: _cast(values.pop(name), target.dtype) for name, target in targets.items()}


def _cast(value: jax.Array, dtype: np.dtype) -> jax.Array:
    return value if value.dtype == dtype else jax.jit(lambda x: x.astype(dtype))(value)


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of every file below leaves/, by name."""
    folder = path / LEAVES
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
