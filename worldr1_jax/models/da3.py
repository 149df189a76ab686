"""Depth Anything 3 in Flax: a video to depth, confidence, cameras and 3D Gaussians.

    network = da3.load(folder)
    reconstruction = network(video)    # [B F H W 3] in [0, 1], sides multiples of the patch size

Built: backbone, camera decoder, depth branch of DualDPT, GSDPT and the Gaussian adapter. Not built,
because no reward reads them: the camera encoder, the ray branch, and the metric and sky heads;
their keys are skipped by name. Facts from ByteDance-Seed/Depth-Anything-3 (0.1.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.models import convert
from worldr1_jax.models.attention import Implementation
from worldr1_jax.models.da3_backbone import VIT_SIZES, Backbone, BackboneConfig
from worldr1_jax.models.da3_gaussians import (
    GaussianConfig,
    decode_cameras,
    gaussians_from,
    move,
    relative_to_first,
    rigid_inverse,
)
from worldr1_jax.models.da3_heads import DPT, CameraDecoder, HeadConfig
from worldr1_jax.types import Gaussians, Reconstruction

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILENAME = "model.safetensors"
# Publisher's keys of the parts that are not built.
IGNORE = (
    r"model\.cam_enc\..*",
    r"model\.head\.scratch\.refinenet\d_aux\..*",
    r"model\.head\.scratch\.output_conv\d_aux\..*",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole network; fields are grouped as the publisher's (net, head, gs_head, gs_adapter)."""

    model_name: str = "da3-giant"
    net: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    gs_head: HeadConfig = dataclasses.field(default_factory=lambda: HeadConfig(output_dim=38))
    gs_adapter: GaussianConfig = dataclasses.field(default_factory=GaussianConfig)
    ref_view_strategy: str = "saddle_balanced"
    process_res: int = 504  # longest side of the image that the network is given, pixels
    frame_chunk: int = (
        8  # frames that go through a head at once, per video; bounds memory, not results
    )

    def __post_init__(self) -> None:
        want = self.gs_adapter.raw_dim + 1
        if self.gs_head.output_dim != want:
            raise ValueError(
                f"gs_head.output_dim is {self.gs_head.output_dim}; gs_adapter needs {want}"
            )
        for name, head in (("head", self.head), ("gs_head", self.gs_head)):
            if self.net.patch_size % head.down_ratio:
                raise ValueError(
                    f"{name}.down_ratio {head.down_ratio} has to divide "
                    f"patch_size {self.net.patch_size}"
                )

    @classmethod
    def giant(cls) -> Config:
        """The published giant model, the only one with Gaussians (1.36 billion parameters)."""
        return cls()

    @classmethod
    def nano(cls) -> Config:
        """For 64x64 videos of about 9 frames on a CPU; trained in this project, not published."""
        gaussian = GaussianConfig(sh_degree=0, unit_rays=False, slipped_quaternions=False)
        channels = (32, 32, 48, 64)
        return cls(
            model_name="da3-nano",
            net=BackboneConfig(
                name="nano",
                out_layers=(1, 3, 4, 5),
                alt_start=1,
                qknorm_start=1,
                rope_start=1,
                patch_size=8,
                img_size=64,
                embed_dim=128,
                depth=6,
                num_heads=4,
                ffn="mlp",
            ),
            head=HeadConfig(features=32, out_channels=channels, down_ratio=2),
            gs_head=HeadConfig(
                output_dim=gaussian.raw_dim + 1, features=32, out_channels=channels, down_ratio=2
            ),
            gs_adapter=gaussian,
            ref_view_strategy="first",
            process_res=64,
            frame_chunk=32,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Reads config.json: {"model_name", "config": {"net", "head", "gs_head", "gs_adapter"}}.

        Raises:
          ValueError: a part or field that is missing or that this network does not have.
        """
        parts = values.get("config", values)
        for part in ("net", "head", "gs_head", "gs_adapter"):
            if part not in parts:
                raise ValueError(
                    f"config.json lacks '{part}': a DA3 model with Gaussians (da3-giant) is needed"
                )
        net = _fields(parts["net"], "net", BackboneConfig)
        if net.get("name", "vitg") in VIT_SIZES:
            size = dict(
                zip(
                    ("embed_dim", "depth", "num_heads", "ffn"),
                    VIT_SIZES[net.get("name", "vitg")],
                    strict=True,
                )
            )
            net = {**size, **net}
        adapter = dict(parts["gs_adapter"])
        if adapter.pop("pred_color", False):
            raise ValueError(
                "gs_adapter.pred_color is true; only spherical harmonics (false) are built"
            )
        extra = {
            k: values[k]
            for k in ("model_name", "ref_view_strategy", "process_res", "frame_chunk")
            if k in values
        }
        return cls(
            net=BackboneConfig(**net),
            head=HeadConfig(**_fields(parts["head"], "head", HeadConfig, ("dim_in",))),
            gs_head=HeadConfig(**_fields(parts["gs_head"], "gs_head", HeadConfig, ("dim_in",))),
            gs_adapter=GaussianConfig(**_fields(adapter, "gs_adapter", GaussianConfig)),
            **extra,
        )

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        parts = {
            name: dataclasses.asdict(getattr(self, name))
            for name in ("net", "head", "gs_head", "gs_adapter")
        }
        extra = {
            k: getattr(self, k)
            for k in ("model_name", "ref_view_strategy", "process_res", "frame_chunk")
        }
        return {"config": parts, **extra}


def _fields(
    values: Mapping[str, Any], part: str, cls: type, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(cls)}
    kept = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in values.items()
        if k not in ("__object__", *skip)
    }
    for name in kept:
        if name not in known:
            raise ValueError(
                f"config.json has the field '{part}.{name}', which this network does not know"
            )
    return kept


@flax.struct.dataclass
class Raw:
    """Everything the heads give, before any geometry. h w: a head's size, (H, W) / down_ratio."""

    depth: Float[
        Array, "B F h w"
    ]  # > 0, along the optical axis; the scale is the network's own, one per video
    confidence: Float[Array, "B F h w"]  # >= 1
    translation: Float[
        Array, "B F 3"
    ]  # camera position, same units as depth, axes of the reference view
    quaternion: Float[Array, "B F 4"]  # xyzw, camera to world, not normalised
    fov: Float[Array, "B F 2"]  # vertical, horizontal, radians, >= 0
    gaussians: Float[Array, "B F h w P"]  # see da3_gaussians.gaussians_from
    opacity: Float[Array, "B F h w"]  # in [0, 1]


class DA3(nnx.Module):
    """Depth Anything 3. Depth, camera positions and Gaussians share one unknown scale per video."""

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        *,
        dtype: Any = jnp.float32,
        attention: Implementation = "xla",
    ):
        """Fresh weights.

        Args:
          dtype: of the backbone's products; heads, norms, softmax, RoPE and residuals stay float32.
          attention: an implementation of `models.attention`; at real sizes one that does not hold
            the scores.
        """
        self.config, self.attention = config, attention
        dim = config.net.feature_dim
        self.backbone = Backbone(config.net, dtype=dtype, rngs=rngs)
        self.cam_dec = CameraDecoder(dim, rngs=rngs)
        self.head = DPT(config.head, dim, norm=True, image_merger=False, rngs=rngs)
        bias = config.gs_adapter.initial_bias()
        self.gs_head = DPT(
            config.gs_head, dim, norm=False, image_merger=True, output_bias=bias, rngs=rngs
        )

    def __call__(self, video: Float[Array, "B F H W 3"]) -> Reconstruction:
        """Reconstruction of videos in [0, 1] whose sides are multiples of the patch size.

        The first camera is the identity. Lengths are in the network's own units: comparable within
        a video, not between two. Intrinsics are in pixels of `video`.
        """
        size = (video.shape[2], video.shape[3])
        raw = self.forward(video)
        own, intrinsics = decode_cameras(raw.translation, raw.quaternion, raw.fov, size)
        # Placed in the network's own axes and then moved: with slipped_quaternions the two do not
        # commute.
        gaussians = move(self.gaussians_from(raw, own, intrinsics), rigid_inverse(own[:, 0]))
        depth, confidence = (
            jax.image.resize(x, (*x.shape[:2], *size), "linear", antialias=False)
            for x in (raw.depth, raw.confidence)
        )
        return Reconstruction(
            depth=depth,
            confidence=confidence,
            camtoworld=relative_to_first(own),
            intrinsics=intrinsics,
            gaussians=gaussians,
        )

    def forward(self, video: Float[Array, "B F H W 3"]) -> Raw:
        """Outputs of all heads for videos in [0, 1], for training and for parity.

        Raises:
          ValueError: a shape that is not [B F H W 3], or sides that are no multiples of the patch
            size.
        """
        if video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"video has the shape {list(video.shape)}; it has to be [B F H W 3]")
        images = (video.astype(jnp.float32) - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)
        taps = self.backbone(
            images, strategy=self.config.ref_view_strategy, implementation=self.attention
        )
        translation, quaternion, fov = self.cam_dec(taps[-1][1])
        depth, gaussians = self._dense([tap[0] for tap in taps], images)
        return Raw(
            depth=jnp.exp(depth[..., 0]),
            confidence=jnp.exp(depth[..., 1]) + 1,
            translation=translation,
            quaternion=quaternion,
            fov=fov,
            gaussians=gaussians[..., :-1],
            opacity=jax.nn.sigmoid(gaussians[..., -1]),
        )

    def cameras(
        self, raw: Raw, size: tuple[int, int]
    ) -> tuple[Float[Array, "B F 4 4"], Float[Array, "B F 3 3"]]:
        """camtoworld, first camera at the identity, and intrinsics in pixels of an (H, W) image."""
        camtoworld, intrinsics = decode_cameras(raw.translation, raw.quaternion, raw.fov, size)
        return relative_to_first(camtoworld), intrinsics

    def gaussians_from(
        self,
        raw: Raw,
        camtoworld: Float[Array, "B F 4 4"],
        intrinsics: Float[Array, "B F 3 3"],
        depth: Float[Array, "B F H W"] | None = None,
    ) -> Gaussians:
        """Gaussians placed with the given cameras and depth; None is the network's own depth."""
        ratio = self.config.gs_head.down_ratio
        size = (raw.gaussians.shape[2] * ratio, raw.gaussians.shape[3] * ratio)
        depth = raw.depth if depth is None else depth
        return gaussians_from(
            self.config.gs_adapter, raw.gaussians, raw.opacity, depth, camtoworld, intrinsics, size
        )

    def _dense(self, taps: list[Array], images: Array) -> tuple[Array, Array]:
        """Both DPT heads, `frame_chunk` frames of every video at a time."""
        frames, height, width = images.shape[1:4]
        size, patch = (height, width), self.config.net.patch_size

        def heads(arrays: tuple[list[Array], Array]) -> tuple[Array, Array]:
            """[N ...] frames -> the two maps [N h w C]."""
            tokens, pixels = arrays
            return self.head(tokens, size, patch), self.gs_head(tokens, size, patch, pixels)

        if frames <= self.config.frame_chunk:
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (taps, images))
            return jax.tree.map(lambda x: x.reshape(-1, frames, *x.shape[1:]), heads(flat))
        by_frame = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (taps, images))
        outs = jax.lax.map(heads, by_frame, batch_size=self.config.frame_chunk)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outs)


def table(config: Config) -> list[tuple[str, str, str]]:
    """Publisher's keys to leaves, for `convert`; complete for the parts that are built."""
    root = "model.backbone.pretrained."
    rows = [
        (root + "cls_token", "backbone.cls_token", "copy"),
        (root + "pos_embed", "backbone.pos_embed", "copy"),
        *_layer(root + "patch_embed.proj", "backbone.patch_embed", "conv2d"),
        *_norm(root + "norm", "backbone.norm"),
    ]
    if config.net.alt_start >= 0:
        rows.append((root + "camera_token", "backbone.camera_token", "copy"))
    ffn = ("w12", "w3") if config.net.ffn == "swiglu" else ("fc1", "fc2")
    for i in range(config.net.depth):
        key, leaf = f"{root}blocks.{i}.", f"backbone.blocks.{i}."
        for norm in ("norm1", "norm2"):
            rows += _norm(key + norm, leaf + norm)
        for layer in ("attn.qkv", "attn.proj", *(f"mlp.{name}" for name in ffn)):
            rows += _layer(key + layer, leaf + layer, "linear")
        rows += [(key + f"{name}.gamma", leaf + name, "copy") for name in ("ls1", "ls2")]
        if 0 <= config.net.qknorm_start <= i:
            rows += [
                row
                for n in ("q_norm", "k_norm")
                for row in _norm(f"{key}attn.{n}", f"{leaf}attn.{n}")
            ]
    camera = {
        "backbone.0": "fc1",
        "backbone.2": "fc2",
        "fc_t": "translation",
        "fc_qvec": "quaternion",
        "fc_fov.0": "fov",
    }
    for name, leaf in camera.items():
        rows += _layer(f"model.cam_dec.{name}", f"cam_dec.{leaf}", "linear")
    return (
        rows
        + _norm("model.head.norm", "head.norm")
        + _dpt_rows("head", False)
        + _dpt_rows("gs_head", True)
    )


def _layer(key: str, leaf: str, kind: str) -> list[tuple[str, str, str]]:
    return [(f"{key}.weight", f"{leaf}.kernel", kind), (f"{key}.bias", f"{leaf}.bias", "copy")]


def _norm(key: str, leaf: str) -> list[tuple[str, str, str]]:
    return [(f"{key}.weight", f"{leaf}.scale", "copy"), (f"{key}.bias", f"{leaf}.bias", "copy")]


def _dpt_rows(name: str, merger: bool) -> list[tuple[str, str, str]]:
    key, leaf = f"model.{name}.", f"{name}."
    rows = []
    for i in range(4):
        rows += _layer(f"{key}projects.{i}", f"{leaf}projects.{i}", "conv2d")
        rows.append((f"{key}scratch.layer{i + 1}_rn.weight", f"{leaf}levels.{i}.kernel", "conv2d"))
        fusion = (f"{key}scratch.refinenet{i + 1}.", f"{leaf}fusions.{i}.")
        for unit, ours in (("resConfUnit1", "unit1"), ("resConfUnit2", "unit2")):
            if i < 3 or ours == "unit2":
                for conv in ("conv1", "conv2"):
                    rows += _layer(
                        f"{fusion[0]}{unit}.{conv}", f"{fusion[1]}{ours}.{conv}", "conv2d"
                    )
        rows += _layer(f"{fusion[0]}out_conv", f"{fusion[1]}out_conv", "conv2d")
    rows += _layer(f"{key}resize_layers.0", f"{leaf}up4", "conv_transpose2d")
    rows += _layer(f"{key}resize_layers.1", f"{leaf}up2", "conv_transpose2d")
    rows += _layer(f"{key}resize_layers.3", f"{leaf}down2", "conv2d")
    rows += _layer(f"{key}scratch.output_conv1", f"{leaf}neck", "conv2d")
    rows += _layer(f"{key}scratch.output_conv2.0", f"{leaf}out1", "conv2d")
    rows += _layer(f"{key}scratch.output_conv2.2", f"{leaf}out2", "conv2d")
    if merger:
        for i in range(3):
            rows += _layer(f"{key}images_merger.{2 * i}", f"{leaf}merger.{i}", "conv2d")
    return rows


def load(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] | None = None,
    attention: Implementation = "xla",
) -> DA3:
    """The network in a publisher's folder (config.json, model.safetensors), read strictly.

    `shardings` maps a leaf's path and shape to where it lives, as in `convert.load`.

    Raises:
      ValueError: files, fields, keys or shapes that do not fit, named.
    """
    config = Config.from_dict(convert.read_config(path))
    model = nnx.eval_shape(lambda: DA3(config, nnx.Rngs(0), dtype=dtype, attention=attention))
    convert.load(model, path, table(config), mesh=mesh, shardings=shardings, ignore=IGNORE)
    return model


def save(model: DA3, path: str | Path) -> None:
    """Writes config.json and model.safetensors with the publisher's names."""
    convert.save(model, path, table(model.config), config=model.config.to_dict(), filename=FILENAME)
