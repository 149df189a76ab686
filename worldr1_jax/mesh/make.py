"""The mesh: four axes over the devices, and sizes that suit them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from worldr1_jax.fields import in_range

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the four axes; the fields are `mesh` of the config.

    One -1 takes what is left. Data 0: all four as they suit the devices and the model
    (`default_sizes`).
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        in_range(
            self, data=(-1, 10**6), fsdp=(-1, 10**6), context=(-1, 10**6), tensor=(-1, 10**6)
        )  # fmt: skip
        for name in AXES[1:]:
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is 0: it has to be 1 or more, or -1 for what is left")
        free = [name for name in AXES if getattr(self, name) == -1]
        if len(free) > 1:
            raise ValueError(f"{free[1]} is -1, and so is {free[0]}: at most one is what is left")


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


def ours(mesh: Any) -> bool:
    """Whether a mesh has the four axes, so that tables and stages can place on it. On another, such
    as a user's own, weights are whole and the compiler splits the work."""
    return set(AXES) <= set(mesh.axis_names)


def current() -> Any:
    """The abstract mesh that is set, if it is one of ours; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if ours(mesh) else None


def default_sizes(
    devices: Sequence[Any], videos: int, heads: int, least_context: int = 1
) -> dict[str, int]:
    """Mesh sizes that suit a number of devices, for so many `videos` at a time and a DiT of
    `heads`.

    A device takes whole videos where there are enough of them, for then tokens need no exchange;
    else the fewest devices that fill the machine share one (context), at least `least_context`,
    as what the backward pass keeps of a video may not fit into one. Weights are split over all
    devices of a slice (fsdp), because a layer's gather takes less time than one video's work in it;
    of a number of devices that is no power of two, over its largest such factor.
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
            # Widths are powers of two, times 5 for 14B: of 3 devices each would hold all of them.
            fsdp = per_slice & -per_slice
            data = slices * (per_slice // fsdp)
            return {"data": data, "fsdp": fsdp, "context": context, "tensor": 1}
    raise ValueError(
        f"{videos} videos, which is groups x group_size over train.minibatches and "
        f"train.microbatches, do not divide over {count} devices: choose these so that they do"
    )
