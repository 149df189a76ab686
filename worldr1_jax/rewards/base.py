"""What a reward is, and the table of those that there are.

A new reward is one file and one line: a frozen dataclass below, and its row in REWARDS.

    @dataclasses.dataclass(frozen=True)
    class Brightness(Reward):
        least: float = 0.2  # its fields are its section of the config

        def score(self, networks, evidence, asked):
            mean = evidence.videos.mean((1, 2, 3, 4))
            return {"brightness": jnp.minimum(mean / self.least, 1.0)}
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.types import Reconstruction
from worldr1_jax.weights import needed
from worldr1_jax.weights.needed import Needed

# Name in the config -> where it is defined. Nothing registers itself by being imported.
REWARDS = {
    "recon": "worldr1_jax.rewards.recon:Recon",
    "trajectory": "worldr1_jax.rewards.trajectory:Trajectory",
    "meta_view": "worldr1_jax.rewards.meta_view:MetaView",
    "judge": "worldr1_jax.rewards.judge:Judge",
    "mvcs": "worldr1_jax.rewards.consistency:Mvcs",
    "palette": "worldr1_jax.nano.palette:Palette",
    "hps": "worldr1_jax.rewards.preference:Hps",
    "pickscore": "worldr1_jax.rewards.preference:PickScore",
}

Networks = dict[str, nnx.Module]
Parts = dict[str, Float[Array, " B"]]

# What a reward may need of the 3D network: cameras (and depth), or Gaussians too, which cost a
# second dense head.
CAMERAS, GAUSSIANS = "cameras", "gaussians"
SLACK = 0.01  # of pictures beyond [0, 1], as rounding and resampling leave it


@flax.struct.dataclass
class Evidence:
    """What a reward may look at.

    Attributes:
      videos: in [0, 1].
      asked: camtoworld of the path that each prompt asks for, an instant a frame.
      reconstruction: of every `frame_stride`-th frame; None where no reward needs one.
      texture: of the frames that were reconstructed (`likeness.texture`); None with it.
      frame_stride: see above.
      renderer: method of `splat.render` that suits the device.
    """

    videos: Float[Array, "B F H W 3"]
    asked: Float[Array, "B F 4 4"]
    reconstruction: Reconstruction | None = None
    texture: Float[Array, "B V"] | None = None
    frame_stride: int = flax.struct.field(pytree_node=False, default=1)
    renderer: str = flax.struct.field(pytree_node=False, default="tiled")

    @property
    def seen(self) -> Float[Array, "B V H W 3"]:
        """The frames that were reconstructed."""
        return self.videos[:, :: self.frame_stride]

    @property
    def path(self) -> Float[Array, "B V 4 4"]:
        """The path asked for at their instants."""
        return self.asked[:, :: self.frame_stride]

    def found(self) -> Reconstruction:
        """The reconstruction, for rewards that need one."""
        if self.reconstruction is None:
            raise ValueError("this reward needs a reconstruction: say so in its `needs`")
        return self.reconstruction


class Reward:
    """The contract; a subclass is a frozen dataclass, and says in `__post_init__` what its fields
    may be.

    `score` is pure: it may be jitted, differentiated and batched, and places nothing on a mesh that
    is not set. The other methods run on the host.
    """

    needs: ClassVar[str] = ""  # CAMERAS or GAUSSIANS; "": no reconstruction

    def networks(self, mesh: jax.sharding.Mesh, dtype: Any) -> Networks:
        """What it evaluates, loaded onto the mesh; `dtype` of the products of large ones.

        Raises:
          ValueError: files that are missing or do not fit, in one sentence.
        """
        return {}

    def described(self, mesh: jax.sharding.Mesh, dtype: Any) -> Networks:
        """The same at their published sizes, as shapes that lie on the mesh; for plans."""
        return {}

    def needed(self) -> tuple[Needed, ...]:
        """Files of weights that it reads."""
        return ()

    def check(self) -> None:
        """Raises ValueError for files that are missing or wrong, without reading weights."""
        needed.check(self.needed())

    def ask(self, prompts: Sequence[str]) -> Any:
        """What it wants to know of the prompts: a tree of host arrays [B ...]."""
        return ()

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        """Numbers of each video, [B] float32; NaN where one could not be measured.

        The entry of the reward's name in REWARDS is what counts; the others are reported.

        Args:
          networks: those of `networks`, by name.
          evidence: the videos, and what was found in them.
          asked: what `ask` gave of their prompts.
        """
        raise NotImplementedError


def find(name: str) -> type[Reward]:
    """The reward of a name. Raises ValueError for a name that REWARDS lacks."""
    if name not in REWARDS:
        raise ValueError(f"rewards.weights names '{name}': it knows {', '.join(REWARDS)}")
    module, _, attribute = REWARDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_range(name: str, pictures: Any) -> None:
    """Raises ValueError for pictures or videos, called `name`, that are no floats, or in 0..255 or
    -1..1. Inside a program nobody can ask for their values; those that are not finite are masked
    later."""
    if not jnp.issubdtype(pictures.dtype, jnp.floating):
        raise ValueError(f"{name} are {pictures.dtype}: they have to be floats in [0, 1]")
    if isinstance(pictures, jax.core.Tracer):
        return
    low, high = map(float, _ends(pictures))  # replicated: no host has to ask another
    if low < -SLACK or high > 1 + SLACK:
        raise ValueError(
            f"{name} have values from {low:.3g} to {high:.3g}: they have to be in [0, 1]"
        )


@jax.jit
def _ends(pictures: Array) -> tuple[Array, Array]:
    """Least and largest value of those that are finite; inf and -inf without any."""
    known = jnp.isfinite(pictures)
    low = jnp.min(pictures, where=known, initial=jnp.inf)
    return low, jnp.max(pictures, where=known, initial=-jnp.inf)
