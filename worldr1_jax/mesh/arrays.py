"""Arrays on a mesh: from hosts and to them, resting in their memory, and work that stays on each
device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from worldr1_jax.mesh.make import current, ours

HOST = "pinned_host"  # jax's name of the memory of hosts that devices read directly
BATCH = PartitionSpec(
    ("data", "fsdp")
)  # samples: devices that share weights still hold their own videos


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
    """The leading axis is the batch of videos; whole on a mesh of other axes than ours."""
    return NamedSharding(mesh, BATCH if ours(mesh) else PartitionSpec())


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
    as a loop over samples. Call it under `jax.set_mesh`; without a mesh of ours, and where a device
    has its own samples already, it is the function itself.
    """

    def call(*arguments: Any) -> Any:
        mesh = current()
        if mesh is None or AxisType.Manual in mesh.axis_types:
            return function(*arguments)
        places = (PartitionSpec(),) * whole + (BATCH,) * (len(arguments) - whole)
        return jax.shard_map(function, in_specs=places, out_specs=BATCH, check_vma=False)(
            *arguments
        )

    return call


def everywhere(array: Any, mesh: Mesh) -> Any:
    """The array on every device of the mesh; as it is when these are only described (plan/)."""
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


def shapes(tree: Any) -> Any:
    """Shapes of a tree of arrays or shapes as they lie on the devices, also of what rests on the
    hosts."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        place = leaf.sharding
        if getattr(place, "memory_kind", None) == HOST:
            place = place.with_memory_kind("device")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(shape, tree)


def bytes_on_device(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes on each device, without the padding of its layout there;
    0 of what rests on the hosts."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if getattr(leaf.sharding, "memory_kind", None) != HOST
    )
