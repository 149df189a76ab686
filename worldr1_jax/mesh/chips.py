"""TPU chips: published figures, for plans and default meshes, and the compiler's flags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one device (tpu7x: half a chip).

    Attributes:
      hbm: bytes; of v5e those that the compiler gives a program, 15.75 GiB. peak: bf16 FLOP/s.
      bandwidth: of HBM, bytes/s. link: bytes/s one way of one link, of which a chip has two along
      each of its axes. closes: an axis of so many chips, or of a multiple, is a ring, any other a
      line. clock: Hz, of the compiler's cycles. rows: of a matrix, that one of its matrix units
      takes in a cycle: peak / (2 width^2 clock units). per_chip: devices that are one chip and
      share its links.
    """

    hbm: float
    peak: float
    bandwidth: float
    link: float
    closes: int
    clock: float
    rows: int = 1
    per_chip: int = 1


CHIPS = {
    "v4": Chip(32e9, 275e12, 1.228e12, 45e9, 4, 1.05e9),
    "v5e": Chip(16.91e9, 197e12, 0.819e12, 45e9, 16, 1.5e9),
    "v5p": Chip(95e9, 459e12, 2.765e12, 90e9, 4, 1.75e9),
    "v6e": Chip(32e9, 918e12, 1.64e12, 90e9, 16, 1.75e9, rows=2),
    "tpu7x": Chip(96e9, 1153e12, 3.69e12, 90e9, 4, 2.2e9, rows=2, per_chip=2),
}
GENERATIONS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip


def generation(device_kind: str) -> str:
    """The chip's short name, such as "v5p". Raises ValueError for a TPU that is not known."""
    if device_kind not in GENERATIONS:
        raise ValueError(
            f"device kind '{device_kind}' is no TPU known here: {', '.join(GENERATIONS)}"
        )
    return GENERATIONS[device_kind]


@dataclasses.dataclass(frozen=True)
class Links:
    """The network of a slice: a grid of chips, each axis a ring or a line.

    Attributes:
      axes: chips along each axis that has more than one, longest first, and whether it is a ring.
      shared: devices that share a chip's links.
    """

    axes: tuple[tuple[int, bool], ...]
    shared: int = 1

    @classmethod
    def of(cls, devices: Iterable[Any]) -> Links:
        """Of TPU devices, by their coordinates."""
        devices = list(devices)
        chip = CHIPS[generation(devices[0].device_kind)]
        places = zip(*(device.coords for device in devices), strict=True)
        sizes = sorted(len(set(along)) for along in places)
        axes = tuple((n, n % chip.closes == 0) for n in reversed(sizes) if n > 1)
        return cls(axes, chip.per_chip)

    def seconds(self, kind: str, sent: int, group: int, link: float) -> float:
        """Of one collective in which each device of a group sends so many bytes, at `link` bytes/s.

        The group is taken to lie along as few axes as hold it, longest first. What limits it is the
        device at the end of a line, which has one link there, or two on a ring; and in an
        all-to-all also the middle of the longest axis, which half of everything crosses.
        """
        chips, ports, longest = max(group // self.shared, 1), 0, (1, False)
        for size, ring in self.axes:
            part = min(size, chips)
            if part > 1:
                whole = ring and part == size
                ports += 2 if whole else 1
                longest = max(longest, (part, whole))
            chips = math.ceil(chips / size)
        if kind == "collective-permute":  # to a neighbour
            ports = 1
        seconds = sent / max(ports, 1)
        if kind == "all-to-all" and group > 1:
            whole_bytes = sent * group / (group - 1)
            seconds = max(seconds, whole_bytes * longest[0] / (8 if longest[1] else 4))
        return seconds * self.shared / link
