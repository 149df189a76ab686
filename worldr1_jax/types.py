"""Typed records that cross stages, and the one legend of dimension letters.

    B  videos, all samples of a batch          F  frames                 C  channels
    K  videos per prompt                       H W  pixels               D  features
    T  denoising steps                         V  views                  L  layers
    W  window steps                            N  tokens or Gaussians    f h w  sizes of latents

Videos are `[B F H W 3]` float32 in [0, 1]; latents are channels last. Poses are `camtoworld
[F 4 4]` with OpenCV axes (x right, y down, z forward) and the first camera at the identity.
Intrinsics `[3 3]` are in pixels of the image that they are used with, pixel centres at +0.5.
Quaternions are wxyz.
"""

from __future__ import annotations

import flax.struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


@flax.struct.dataclass
class Gaussians:
    """3D Gaussians in world axes; every field may carry the same leading batch axes."""

    means: Float[Array, "*batch N 3"]  # world units
    quaternions: Float[Array, "*batch N 4"]  # unit, wxyz, Gaussian axes to world axes
    scales: Float[Array, "*batch N 3"]  # standard deviations along the Gaussian's axes, world units
    opacities: Float[Array, "*batch N"]  # in [0, 1]
    sh: Float[Array, "*batch N K 3"]  # spherical harmonics in world axes, K = (degree + 1)^2


@flax.struct.dataclass
class Reconstruction:
    """What the 3D network recovers from a video. World units are the network's own: one scale per
    video."""

    depth: Float[Array, "B F H W"]  # along the optical axis, > 0
    confidence: Float[Array, "B F H W"]  # >= 1, larger is surer
    camtoworld: Float[Array, "B F 4 4"]  # OpenCV axes, the first camera at the identity
    intrinsics: Float[Array, "B F 3 3"]  # pixels of the processed image
    # Leading axis [B], N = F x Gaussians per frame; None from a network without Gaussian head.
    gaussians: Gaussians | None
    # Frames whose Gaussians these are, evenly spaced, both ends among them; None: all.
    gaussian_frames: int | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class Trajectory:
    """What a rollout keeps: the final latents, and only the stochastic window of the path to
    them."""

    latents: Float[Array, "B f h w C"]  # x at sigma = 0
    window_latents: Float[Array, "W+1 B f h w C"]  # before each window step, and after the last one
    log_prob_old: Float[Array, "W B"]  # mean over latent dimensions, natural log, float32
    # index into the schedule of the first window step, of all samples or of each
    window_start: Int[Array, ""] | Int[Array, " B"]
    keys: PRNGKeyArray  # [B], that the steps' noise was drawn with


@flax.struct.dataclass
class Scores:
    """Rewards of a batch: every part, their weighted sum, and which samples may be learnt from."""

    parts: dict[str, Float[Array, " B"]]
    total: Float[Array, " B"]
    valid: Bool[Array, " B"]
    counted: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())  # names of parts
