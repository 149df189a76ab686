"""How the asked camera path enters the noise."""

from __future__ import annotations

import dataclasses

from worldr1_jax.camera import trajectory
from worldr1_jax.fields import in_range, one_of

MAGNITUDES = {"released": trajectory.Magnitudes(), "nano": trajectory.Magnitudes.nano()}


@dataclasses.dataclass(frozen=True)
class Camera:
    """How the asked camera path enters the noise; see `camera.noise_warp`.

    Attributes:
      mode: "initial" mixes warped noise into the starting latents, "step" adds a low-passed delta
        after the first steps, "none" leaves the path to the prompt alone.
      strength: in [0, 1].
      degradation: in [0, 1], fresh noise blended into the warped noise.
      flow_scale: resolution of the warp over that of the latents.
      magnitudes: how far a command goes: "released" (scenes 1000 units deep) or "nano".
    """

    mode: str = "initial"
    strength: float = 0.35
    degradation: float = 0.35
    flow_scale: int = 16
    magnitudes: str = "released"

    def __post_init__(self) -> None:
        one_of(self, mode=("initial", "step", "none"), magnitudes=tuple(MAGNITUDES))
        in_range(self, strength=(0, 1), degradation=(0, 1), flow_scale=(1, 64))

    @property
    def units(self) -> trajectory.Magnitudes:
        """What `magnitudes` names."""
        return MAGNITUDES[self.magnitudes]
