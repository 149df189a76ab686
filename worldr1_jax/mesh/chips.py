"""TPU chips: published figures, for plans and default meshes, and the compiler's flags."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one device (tpu7x: half a chip).

    Attributes:
      hbm: bytes; of v5e those that the compiler gives a program, 15.75 GiB. peak: bf16 FLOP/s.
      bandwidth: of HBM, bytes/s. link: bytes/s one way of one link. axes: of the torus; each has
      two links. clock: Hz, of the compiler's cycles. per_chip: devices that are one chip.
    """

    hbm: float
    peak: float
    bandwidth: float
    link: float
    axes: int
    clock: float
    per_chip: int = 1


CHIPS = {
    "v4": Chip(32e9, 275e12, 1.228e12, 45e9, 3, 1.05e9),
    "v5e": Chip(16.91e9, 197e12, 0.819e12, 45e9, 2, 1.5e9),
    "v5p": Chip(95e9, 459e12, 2.765e12, 90e9, 3, 1.75e9),
    "v6e": Chip(32e9, 918e12, 1.64e12, 90e9, 2, 1.75e9),
    "tpu7x": Chip(96e9, 1153e12, 3.69e12, 90e9, 3, 2.2e9, per_chip=2),
}
GENERATIONS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip
# Share of the peak that the attention kernel is taken to reach. An assumption, not a measurement:
# heads of 128 fill half of the 256-wide matrix units of v6e and tpu7x in one of two products.
EFFICIENCY = {"v4": 0.7, "v5e": 0.7, "v5p": 0.7, "v6e": 0.6, "tpu7x": 0.6}


def generation(device_kind: str) -> str:
    """The chip's short name, such as "v5p". Raises ValueError for a TPU that is not known."""
    if device_kind not in GENERATIONS:
        raise ValueError(
            f"device kind '{device_kind}' is no TPU known here: {', '.join(GENERATIONS)}"
        )
    return GENERATIONS[device_kind]
