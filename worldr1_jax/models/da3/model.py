"""Depth Anything 3 in Flax: a video to depth, confidence, cameras and 3D Gaussians.

    network = da3.load(folder)
    reconstruction = network(video)    # [B F H W 3] in [0, 1], sides multiples of the patch size

Built: backbone, camera decoder, depth branch of DualDPT, GSDPT and the Gaussian adapter. Not built,
because no reward reads them: the camera encoder, the ray branch, the ray poses, and the metric and
sky heads; their keys are skipped by name, and of a nested model the metric branch. Of the published
sizes only the giant has Gaussians. Facts from ByteDance-Seed/Depth-Anything-3 (0.1.1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from worldr1_jax.geometry import relative_to_first, rigid_inverse
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import current
from worldr1_jax.mesh.placement import COLUMN, ROW, SMALL, Rules, placer
from worldr1_jax.models.da3.backbone import Backbone, pad_frames
from worldr1_jax.models.da3.config import Config
from worldr1_jax.models.da3.gaussians import decode_cameras, gaussians_from, move
from worldr1_jax.models.da3.heads import DPT, CameraDecoder
from worldr1_jax.nn.attention import Implementation, for_mesh
from worldr1_jax.types import Gaussians, Reconstruction
from worldr1_jax.weights import convert

# Where the leaves live (mesh/placement.py).
PLACES: Rules = (
    (r"backbone\.blocks\.\d+\.attn\.qkv\.kernel", COLUMN),
    (r"backbone\.blocks\.\d+\.attn\.proj\.kernel", ROW),
    (r"backbone\.blocks\.\d+\.mlp\.(fc1|w12)\.kernel", COLUMN),
    (r"backbone\.blocks\.\d+\.mlp\.(fc2|w3)\.kernel", ROW),
    (r"backbone\.patch_embed\.kernel", ()),
    (r"(cam_dec|head|gs_head)\..*kernel", ()),
    (SMALL, ()),
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILENAME = "model.safetensors"
# Publisher's keys of the parts that are not built.
IGNORE = (
    r"model\.(da3\.)?cam_enc\..*",
    r"model\.(da3\.)?head\.scratch\.refinenet\d_aux\..*",
    r"model\.(da3\.)?head\.scratch\.output_conv\d_aux\..*",
    r"model\.da3_metric\..*",
)


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
    # See da3_gaussians.gaussians_from; None without a Gaussian head.
    gaussians: Float[Array, "B F h w P"] | None
    opacity: Float[Array, "B F h w"] | None  # in [0, 1]


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
          attention: an implementation of `nn.attention`; at real sizes one that does not hold
            the scores.
        """
        self.config, self.attention = config, attention
        dim = config.net.feature_dim
        self.backbone = Backbone(config.net, dtype=dtype, rngs=rngs)
        self.cam_dec = CameraDecoder(dim, rngs=rngs)
        self.head = DPT(config.head, dim, norm=True, image_merger=False, rngs=rngs)
        bias = config.gs_adapter.initial_bias()
        self.gs_head = (
            DPT(config.gs_head, dim, norm=False, image_merger=True, output_bias=bias, rngs=rngs)
            if config.gs_head
            else None
        )

    def __call__(
        self, video: Float[Array, "B F H W 3"], *, gaussians: bool = True
    ) -> Reconstruction:
        """Reconstruction of videos in [0, 1] whose sides are multiples of the patch size.

        The first camera is the identity. Lengths are in the network's own units: comparable within
        a video, not between two. Intrinsics are in pixels of `video`. Without `gaussians` their
        head, half of the work behind the backbone, is not run.
        """
        frames, size = video.shape[1], (video.shape[2], video.shape[3])
        raw = self._padded(video, gaussians)
        own, intrinsics = decode_cameras(raw.translation, raw.quaternion, raw.fov, size)
        moved = None
        if raw.gaussians is not None:
            # Placed in the network's own axes and then moved: with slipped_quaternions the two do
            # not commute.
            placed = self.gaussians_from(raw, own, intrinsics)
            moved = move(_first_frames(placed, frames, own), rigid_inverse(own[:, 0]))
        depth, confidence = (
            jax.image.resize(x, (*x.shape[:2], *size), "linear", antialias=False)
            for x in (raw.depth[:, :frames], raw.confidence[:, :frames])
        )
        return Reconstruction(
            depth=depth,
            confidence=confidence,
            camtoworld=relative_to_first(own)[:, :frames],
            intrinsics=intrinsics[:, :frames],
            gaussians=moved,
        )

    def forward(self, video: Float[Array, "B F H W 3"]) -> Raw:
        """Outputs of all heads for videos in [0, 1], for training and for parity.

        Raises:
          ValueError: a shape that is not [B F H W 3], or sides that are no multiples of the patch
            size.
        """
        return jax.tree.map(lambda x: x[:, : video.shape[1]], self._padded(video))

    def _padded(self, video: Float[Array, "B F H W 3"], with_gaussians: bool = True) -> Raw:
        """`forward`, with the frames that the mesh adds (da3_backbone.padded_frames)."""
        if video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"video has the shape {list(video.shape)}; it has to be [B F H W 3]")
        images = (video.astype(jnp.float32) - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)
        taps = self.backbone(
            images, strategy=self.config.ref_view_strategy, implementation=self.attention
        )
        translation, quaternion, fov = self.cam_dec(taps[-1][1])
        images = pad_frames(images, taps[0][0].shape[1])
        depth, gaussians = self._dense([tap[0] for tap in taps], images, with_gaussians)
        raw, opacity = None, None
        if gaussians is not None:
            raw, opacity = gaussians[..., :-1], jax.nn.sigmoid(gaussians[..., -1])
        return Raw(
            depth=jnp.exp(depth[..., 0]),
            confidence=jnp.exp(depth[..., 1]) + 1,
            translation=translation,
            quaternion=quaternion,
            fov=fov,
            gaussians=raw,
            opacity=opacity,
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
        """Gaussians placed with the given cameras and depth; None is the network's own depth.

        Raises:
          ValueError: a network without Gaussian head.
        """
        if self.config.gs_head is None or raw.gaussians is None or raw.opacity is None:
            raise ValueError(
                f"{self.config.model_name} has no Gaussian head: of the published models da3-giant "
                "has one"
            )
        ratio = self.config.gs_head.down_ratio
        size = (raw.gaussians.shape[2] * ratio, raw.gaussians.shape[3] * ratio)
        depth = raw.depth if depth is None else depth
        return gaussians_from(
            self.config.gs_adapter, raw.gaussians, raw.opacity, depth, camtoworld, intrinsics, size
        )

    def _dense(
        self, taps: list[Array], images: Array, with_gaussians: bool
    ) -> tuple[Array, Array | None]:
        """The DPT heads, `frame_chunk` frames of every video at a time, each device its own."""
        graph, state = nnx.split((self.head, self.gs_head if with_gaussians else None))
        size, patch = (images.shape[2], images.shape[3]), self.config.net.patch_size

        def own(state: Any, arrays: tuple[list[Array], Array]) -> tuple[Array, Array | None]:
            head, gs_head = nnx.merge(graph, state)

            def heads(arrays: tuple[list[Array], Array]) -> tuple[Array, Array | None]:
                """[N ...] frames -> the two maps [N h w C]."""
                tokens, pixels = arrays
                gaussians = gs_head(tokens, size, patch, pixels) if gs_head is not None else None
                return head(tokens, size, patch), gaussians

            frames = arrays[1].shape[1]
            if frames <= self.config.frame_chunk:
                flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
                return jax.tree.map(lambda x: x.reshape(-1, frames, *x.shape[1:]), heads(flat))
            by_frame = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), arrays)
            outs = jax.lax.map(heads, by_frame, batch_size=self.config.frame_chunk)
            return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outs)

        mesh = current()
        if mesh is None or mesh.size == 1:
            return own(state, (taps, images))
        # XLA would gather frames for the loop over them.
        spec = sharding.spec_for(images.shape[:2], ("videos", "frames"), mesh)
        return jax.shard_map(
            own, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False
        )(state, (taps, images))  # fmt: skip


def _first_frames(gaussians: Gaussians, frames: int, cameras: Array) -> Gaussians:
    """Those of the real frames, spread over the devices of a video."""
    count = gaussians.means.shape[1] // cameras.shape[1] * frames

    def cut(x: Array) -> Array:
        return sharding.constrain(x[:, :count], "videos", "tokens", *(None,) * (x.ndim - 2))

    return jax.tree.map(cut, gaussians)


def table(config: Config, net: str = "model") -> list[tuple[str, str, str]]:
    """Publisher's keys to leaves, for `convert`; complete for the parts that are built. `net` is
    where the network lies in the files: "model.da3" in those of a nested model."""
    root = f"{net}.backbone.pretrained."
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
        rows += _layer(f"{net}.cam_dec.{name}", f"cam_dec.{leaf}", "linear")
    return (
        rows
        + _norm(f"{net}.head.norm", "head.norm")
        + _dpt_rows(net, "head", False)
        + (_dpt_rows(net, "gs_head", True) if config.gs_head else [])
    )


def _layer(key: str, leaf: str, kind: str) -> list[tuple[str, str, str]]:
    return [(f"{key}.weight", f"{leaf}.kernel", kind), (f"{key}.bias", f"{leaf}.bias", "copy")]


def _norm(key: str, leaf: str) -> list[tuple[str, str, str]]:
    return [(f"{key}.weight", f"{leaf}.scale", "copy"), (f"{key}.bias", f"{leaf}.bias", "copy")]


def _dpt_rows(net: str, name: str, merger: bool) -> list[tuple[str, str, str]]:
    key, leaf = f"{net}.{name}.", f"{name}."
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
    attention: Implementation | None = None,
) -> DA3:
    """The network in a publisher's folder (config.json, model.safetensors), read strictly.

    Leaves lie on the mesh by PLACES; without `attention` it is what suits the mesh
    (attention.for_mesh).

    Raises:
      ValueError: files, fields, keys or shapes that do not fit, named.
    """
    config = convert.config_of(Config, path)
    kernel = attention or for_mesh(mesh, config.net.num_heads, dtype)
    model = nnx.eval_shape(lambda: DA3(config, nnx.Rngs(0), dtype=dtype, attention=kernel))
    net = "model.da3" if convert.holds(path, "model.da3.backbone.pretrained.cls_token") else "model"
    convert.load(model, path, table(config, net), shardings=placer(PLACES, mesh), ignore=IGNORE)
    return model


def save(model: DA3, path: str | Path) -> None:
    """Writes config.json and model.safetensors with the publisher's names."""
    convert.save(model, path, table(model.config), config=model.config.to_dict(), filename=FILENAME)
