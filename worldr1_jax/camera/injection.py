"""How the asked camera path enters the noise."""

from __future__ import annotations

import dataclasses

from worldr1_jax.camera import trajectory

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
      magnitudes: how far a command goes.
    """

    mode: str = "initial"
    strength: float = 0.35
    degradation: float = 0.35
    flow_scale: int = 16
    magnitudes: trajectory.Magnitudes = dataclasses.field(default_factory=trajectory.Magnitudes)

    def __post_init__(self):
        if self.mode not in ("initial", "step", "none"):
            raise ValueError(f"sample.camera is '{self.mode}': it is initial, step or none")
        for name in ("strength", "degradation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"sample.camera_{name} is {getattr(self, name)}: it has to be in [0, 1]"
                )
