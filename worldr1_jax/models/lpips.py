"""LPIPS v0.1 with AlexNet: how different two images look, as a learned distance of deep features.

    distance = lpips.load(folder)
    distance(a, b)    # [N H W 3] in [0, 1], twice -> [N], 0 = same

The folder holds one model.safetensors with both halves under their makers' names: the trunk is
torchvision's AlexNet (features.*; classifier.* may be there and is not read), the heads are those
of the lpips package (lin0.model.1.weight to lin4.model.1.weight). Both are published as torch
files. Where torch and lpips are installed, this writes the folder from them:

    python -m worldr1_jax.models.lpips_files --trunk=alexnet-owt-7be5be79.pth --folder=weights/lpips

Facts from richzhang/PerceptualSimilarity (lpips 0.1.4) and torchvision's AlexNet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax import geometry
from worldr1_jax.mesh.placement import Rules
from worldr1_jax.nn.convolution import convolve
from worldr1_jax.weights import convert

FILENAME = "model.safetensors"
IGNORE = (r"classifier\..*",)
# Mean and spread of ImageNet's colours for images in [-1, 1], as lpips 0.1 has them.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# Number in torchvision's Sequential, kernel, stride, padding, channels in and out.
CONVOLUTIONS = (
    (0, 11, 4, 2, 3, 64),
    (3, 5, 1, 2, 64, 192),
    (6, 3, 1, 1, 192, 384),
    (8, 3, 1, 1, 384, 256),
    (10, 3, 1, 1, 256, 256),
)
POOLED = (1, 2)  # convolutions behind a max pooling
SMALLEST = 31  # px: below it nothing is left after the poolings
EPS = 1e-10  # added to the length of a feature, as published


# Where the leaves live (mesh/placement.py): 10 MB are whole on each device.
PLACES: Rules = ((r".*", ()),)


class LPIPS(nnx.Module):
    """The trunk's five feature maps, and a non-negative weight for each of their channels."""

    def __init__(self, rngs: nnx.Rngs):
        self.trunk = nnx.List(
            [
                nnx.Conv(
                    inputs, outputs, (kernel, kernel), strides=(stride, stride), padding=padding,
                    precision=jax.lax.Precision.HIGHEST,  # TPUs: see convolution.py
                    rngs=rngs, conv_general_dilated=convolve,
                )
                for _, kernel, stride, padding, inputs, outputs in CONVOLUTIONS
            ]
        )  # fmt: skip
        self.heads = nnx.List(
            [nnx.Param(jnp.zeros((1, 1, row[-1], 1))) for row in CONVOLUTIONS]
        )  # fmt: skip

    def __call__(
        self, a: Float[Array, "N H W 3"], b: Float[Array, "N H W 3"]
    ) -> Float[Array, " N"]:
        """Distance of each pair of images in [0, 1]; at least 0, usually below 1.

        Raises:
          ValueError: shapes that differ or are no images, or a side below 31 px.
        """
        if a.ndim != 4 or a.shape[-1] != 3 or a.shape != b.shape:
            raise ValueError(f"images are {a.shape} and {b.shape}: want two equal [N H W 3]")
        if min(a.shape[1:3]) < SMALLEST:
            raise ValueError(f"images are {a.shape[1:3]} px; LPIPS needs {SMALLEST} px a side")
        maps = self.features(jnp.concatenate([a, b]))
        total = jnp.zeros(a.shape[0])
        for head, both in zip(self.heads, maps, strict=True):
            length = geometry.length(both)[..., None]
            one, other = jnp.split(both / (length + EPS), 2)
            total += jnp.mean(jnp.sum((one - other) ** 2 * head[...][0, 0, :, 0], -1), (1, 2))
        return total

    def features(self, images: Float[Array, "N H W 3"]) -> list[Float[Array, "N h w C"]]:
        """The trunk's maps after each ReLU."""
        x = (2.0 * images.astype(jnp.float32) - 1.0 - jnp.array(SHIFT)) / jnp.array(SCALE)
        maps = []
        for number, layer in enumerate(self.trunk):
            if number in POOLED:
                x = nnx.max_pool(x, (3, 3), strides=(2, 2))
            x = jax.nn.relu(layer(x))
            maps.append(x)
        return maps


def table() -> list[tuple[str, str, str]]:
    """Publishers' keys to leaves, for `convert`."""
    rows = []
    for index, (number, *_) in enumerate(CONVOLUTIONS):
        rows += [
            (f"features.{number}.weight", f"trunk.{index}.kernel", "conv2d"),
            (f"features.{number}.bias", f"trunk.{index}.bias", "copy"),
            (f"lin{index}.model.1.weight", f"heads.{index}", "conv2d"),
        ]
    return rows


def load(path: str | Path, *, mesh: jax.sharding.Mesh | None = None, dtype: Any = None) -> LPIPS:
    """The network in a folder or file as described above, read strictly.

    Raises:
      ValueError: a missing file, an unknown or missing key, or a wrong shape, named.
    """
    model = nnx.eval_shape(lambda: LPIPS(nnx.Rngs(0)))
    convert.load(model, path, table(), mesh=mesh, dtype=dtype, ignore=IGNORE)
    return model


def save(model: LPIPS, path: str | Path) -> None:
    """Writes model.safetensors with the publishers' names."""
    convert.save(model, path, table(), filename=FILENAME)
