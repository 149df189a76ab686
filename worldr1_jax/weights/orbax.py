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
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from worldr1_jax import files
from worldr1_jax.mesh import arrays

LEAVES, INDEX = "leaves", "leaves.json"


def found(path: str | Path) -> bool:
    """Whether this is such a folder."""
    return os.path.isfile(Path(path) / INDEX)


def save(path: str | Path, leaves: Mapping[str, jax.Array]) -> None:
    """Writes the leaves, in the dtypes that they have; every process of a mesh has to call it.

    Raises:
      ValueError: the folder holds weights already, or cannot be written to.
    """
    path = files.local(path).absolute()
    if os.path.lexists(path / LEAVES):
        raise ValueError(f"{path} holds weights already: remove it, or write to another folder")
    with files.stored(path), ocp.StandardCheckpointer() as writer:
        writer.save(path / LEAVES, dict(leaves))
    if jax.process_index() == 0:
        index = {
            "leaves": {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in leaves.items()},
            "files": _sizes(path),
        }
        files.write_atomically(path / INDEX, json.dumps(index).encode())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(path))


def restore(path: str | Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Leaves by name, each onto the sharding of its target (None: the default device) and cast to
    its dtype.

    Raises:
      ValueError: leaves or shapes that are not those of `targets`, a missing or truncated file, or
        numbers that are not finite.
    """
    path = Path(path).absolute()
    there, written = _index(path)
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
    for file in sorted(written):
        if sizes.get(file) != written[file]:
            state = f"{sizes[file]} bytes long" if file in sizes else "missing"
            raise ValueError(
                f"{path / LEAVES / file} is {state}, not {written[file]} bytes as it was written: "
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
    cast = {name: _cast(values.pop(name), target.dtype) for name, target in targets.items()}
    check_finite(path, cast)
    return cast


def check_finite(what: str | Path, leaves: Mapping[str, jax.Array]) -> None:
    """Raises ValueError, beginning with `what`, for a leaf with a number that is not finite."""
    for name, sound in _are_finite(dict(leaves)).items():
        if not arrays.to_host(sound):
            raise ValueError(f"{what}: '{name}' holds numbers that are not finite")


@jax.jit
def _are_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(leaf).all() for name, leaf in leaves.items()}


def _index(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Shape and dtype of each leaf, and the size of each file."""
    index = files.read_json(path / INDEX)
    try:
        there, written = index["leaves"], index["files"]
        for shape, dtype in there.values():
            jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        if not all(isinstance(size, int) for size in written.values()):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / INDEX} is damaged: convert the weights again") from error
    return there, written


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
