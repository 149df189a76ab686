"""Fewer Gaussians: those of some frames, where all frames together are more than a view needs.

A network that predicts a Gaussian for each pixel of each frame covers a surface as often as frames
see it: 81 frames of 294x504 are 12 million Gaussians, and every view sorts and projects them all.
The rule: keep all the Gaussians of `keep` frames, evenly spaced, the first and the last among
them. Depth, cameras and the frames that are compared stay those of all frames.

It is not free, and it is not only a loss: a frame whose own Gaussians are gone is drawn from its
neighbours', which is what consistency means, and the score is stricter for it. On 81 frames of a
ray-cast scene at 48x80 with 1% of noise in depth, two views between the frames kept
(`tests/measure/splat.py full --size 48 80`): the Gaussians of 21 frames draw within 35.0 and
35.3 dB of what all 81 draw, those of 6 within 29.2 and 29.6; the PSNR to the frame itself rises,
from 23.0 to 24.5 and 26.6 dB, for there is less noise to average. Other scenes can differ; off by
default (`rewards.gaussian_frames`).
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array

from worldr1_jax.rewards.reconstruct import frame_indices
from worldr1_jax.types import Reconstruction


def by_frames(reconstruction: Reconstruction, keep: int | None) -> Reconstruction:
    """The reconstruction with the Gaussians of at most `keep` frames; None keeps all.

    Gaussians have to come frame by frame, equally many a frame, as Depth Anything 3 gives them.

    Raises:
      ValueError: a `keep` below 1, or Gaussians that the frames do not divide.
    """
    gaussians = reconstruction.gaussians
    if keep is None or gaussians is None:
        return reconstruction
    frames, count = reconstruction.depth.shape[1], gaussians.means.shape[1]
    if keep < 1:
        raise ValueError(f"gaussian_frames is {keep}: it has to be 1 or more")
    if count % frames:
        raise ValueError(f"{count} Gaussians of {frames} frames: want equally many a frame")
    chosen = frame_indices(frames, min(keep, frames))

    def kept(leaf: Array) -> Array:
        framed = leaf.reshape(leaf.shape[0], frames, count // frames, *leaf.shape[2:])
        return framed[:, chosen].reshape(leaf.shape[0], -1, *leaf.shape[2:])

    return dataclasses.replace(reconstruction, gaussians=jax.tree.map(kept, gaussians))
