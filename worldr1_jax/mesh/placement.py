"""Where leaves and activations live: the engine of the networks' tables.

A network's file has a table PLACES: rows of (regular expression of a leaf's path, a mesh axis for
each of the leaf's axes). Model code says what an axis is by the name of its leaf; only these tables
say where it lives. The first row that matches a leaf counts; a leaf that no row matches, or a row
that no leaf uses, is an error, so that a renamed layer cannot become replicated unnoticed.

Mesh axes: data (prompt groups), fsdp (weights), context (tokens of one video), tensor (heads).

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

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from worldr1_jax.mesh.make import AXES, current

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

# Words of the networks' tables: a column-parallel kernel, a row-parallel one, and leaves that are
# small on every network.
SPLIT = ("fsdp", "context")
COLUMN, ROW = (SPLIT, "tensor"), ("tensor", SPLIT)
SMALL = r"(.*\.)?(bias|scale|gamma|ls[12]|scale_shift_table|embedding|pos_embed|\w+_token)"

# Leaves that a table is for.
WEIGHTS = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
ADAPTERS = nnx.LoRAParam


class _Any:
    """A mesh of one device, to check names by when there is none."""

    shape = dict.fromkeys(AXES, 1)


_ANY = _Any()


def batch_parts(mesh: Mesh, of: str = "videos") -> int:
    """Into how many parts the mesh splits a batch of videos, or of sequences."""
    return math.prod(mesh.shape.get(name, 1) for name in ACTIVATIONS[of] or ())


def turns(mesh: Mesh, count: int, at_once: int) -> int:
    """How often each device takes `at_once` of its samples (0: all) until `count` are done.

    Raises:
      ValueError: a number that does not divide a device's samples.
    """
    mine = count // batch_parts(mesh)
    if not at_once or mine <= at_once:
        return 1
    if at_once < 0 or mine % at_once:
        raise ValueError(
            f"sample.videos_at_once is {at_once}: it has to divide the {mine} videos of a device"
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
        there = axis in mesh.shape and length % mesh.shape[axis] == 0
        return axis if there else None
    names = tuple(name for name in axis if mesh.shape.get(name, 1) > 1)
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
    mesh = current()
    spec = spec_for(x.shape, axes, mesh or _ANY)
    if mesh is None or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def shardings_of(state: Any, rules: Rules, mesh: Mesh) -> Any:
    """NamedShardings for every leaf of an nnx state, by a network's table.

    Raises:
      ValueError: a leaf without a rule, or a rule without a leaf.
    """
    used, flat = set(), []
    for path, leaf in nnx.to_flat_state(state):
        index, spec = spec_of(leaf_path(path), leaf.get_raw_value().shape, rules, mesh)
        used.add(index)
        flat.append((path, leaf.replace(NamedSharding(mesh, spec))))
    unused = [rules[i][0] for i in range(len(rules)) if i not in used]
    if unused:
        raise ValueError(f"the sharding rule '{unused[0]}' matches no leaf")
    return nnx.from_flat_state(flat)


def placer(
    rules: Rules, mesh: Mesh | None
) -> Callable[[str, tuple[int, ...]], NamedSharding | None]:
    """Leaf path and shape -> its sharding, for weights that are placed as they stream in."""
    if mesh is None:
        return lambda path, shape: None
    return lambda path, shape: NamedSharding(mesh, spec_of(path, shape, rules, mesh)[1])


def place(module: nnx.Module, rules: Rules, mesh: Mesh, leaves: Any = WEIGHTS) -> nnx.Module:
    """Moves these leaves of a module to their shards, in place."""
    state = nnx.state(module, leaves)
    nnx.update(module, jax.device_put(state, shardings_of(state, rules, mesh)))
    return module


def describe(module: nnx.Module, rules: Rules, mesh: Mesh, leaves: Any = WEIGHTS) -> nnx.Module:
    """As `place`, for leaves that have a shape and a dtype but no values (nnx.eval_shape)."""
    state = nnx.state(module, leaves)
    places = shardings_of(state, rules, mesh)
    described = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, places
    )
    nnx.update(module, described)
    return module


def beside(tree: Any, like: Any, otherwise: Any) -> Any:
    """Places for a tree whose parts are trees like another, such as an optimizer's moments: each
    leaf lies where the leaf of `like` does whose path ends its own, and `otherwise` where none
    does."""
    places = {
        jax.tree_util.keystr(path): (leaf.shape, leaf.sharding)
        for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]
    }

    def place(path: Any, leaf: Any) -> Any:
        whole = jax.tree_util.keystr(path)
        fitting = [name for name in places if whole.endswith(name)]
        shape, found = places[max(fitting, key=len)] if fitting else ((), otherwise)
        return found if shape == leaf.shape else otherwise

    return jax.tree_util.tree_map_with_path(place, tree)


def leaf_path(path: Sequence[Any]) -> str:
    """('blocks', 0, 'kernel') -> 'blocks.0.kernel'."""
    return ".".join(str(part) for part in path)
