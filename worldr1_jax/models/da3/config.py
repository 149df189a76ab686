"""Shapes of Depth Anything 3: the published sizes, the one that ships with this package, and
config.json.

Facts from ByteDance-Seed/Depth-Anything-3 (0.1.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from worldr1_jax.files import short
from worldr1_jax.models.da3.backbone import VIT_SIZES, BackboneConfig
from worldr1_jax.models.da3.gaussians import GaussianConfig
from worldr1_jax.models.da3.heads import HeadConfig
from worldr1_jax.weights import fields

# Published name -> size of the backbone, its taps, first layer of the alternation, channels of the
# heads and of their pyramid.
SIZES: dict[str, tuple[str, tuple[int, ...], int, int, tuple[int, ...]]] = {
    "da3-small": ("vits", (5, 7, 9, 11), 4, 64, (48, 96, 192, 384)),
    "da3-base": ("vitb", (5, 7, 9, 11), 4, 128, (96, 192, 384, 768)),
    "da3-large": ("vitl", (11, 15, 19, 23), 8, 256, (256, 512, 1024, 1024)),
    "da3-giant": ("vitg", (19, 27, 33, 39), 13, 256, (256, 512, 1024, 1024)),
    "da3nested-giant-large": ("vitg", (19, 27, 33, 39), 13, 256, (256, 512, 1024, 1024)),
}
_LIMITS = {
    "out_layers": (0, 1000),
    "alt_start": (-1, 1000),
    "qknorm_start": (-1, 1000),
    "rope_start": (-1, 1000),
    "depth": (1, 1000),
    "patch_size": (1, 256),
    "mlp_ratio": (0.1, 64.0),
    "sh_degree": (0, 2),
    "gaussian_scale_min": (0.0, 1e6),
    "gaussian_scale_max": (0.0, 1e6),
}
_OWN_FIELDS = ("model_name", "ref_view_strategy", "process_res", "frame_chunk")
_SIZE_FIELDS = ("embed_dim", "depth", "num_heads", "ffn")


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole network; fields are grouped as the publisher's (net, head, gs_head, gs_adapter)."""

    model_name: str = "da3-giant"
    net: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    gs_head: HeadConfig | None = dataclasses.field(
        default_factory=lambda: HeadConfig(output_dim=38)
    )  # None: no Gaussians
    gs_adapter: GaussianConfig = dataclasses.field(default_factory=GaussianConfig)
    ref_view_strategy: str = "saddle_balanced"
    process_res: int = 504  # longest side of the image that the network is given, pixels
    frame_chunk: int = (
        8  # frames that go through a head at once, per video; bounds memory, not results
    )

    def __post_init__(self) -> None:
        want = self.gs_adapter.raw_dim + 1
        if self.gs_head is not None and self.gs_head.output_dim != want:
            raise ValueError(
                f"gs_head.output_dim is {self.gs_head.output_dim}; gs_adapter needs {want}"
            )
        for name, head in (("head", self.head), ("gs_head", self.gs_head)):
            if head is not None and self.net.patch_size % head.down_ratio:
                raise ValueError(
                    f"{name}.down_ratio {head.down_ratio} has to divide "
                    f"patch_size {self.net.patch_size}"
                )

    @classmethod
    def published(cls, name: str) -> Config:
        """A published model by its name, one of SIZES; of the nested one, the giant in it.

        Raises:
          ValueError: another name.
        """
        if not isinstance(name, str) or name not in SIZES:
            raise ValueError(
                f"model_name is {short(repr(name))}: the models with cameras are {', '.join(SIZES)}"
            )
        size, taps, start, features, channels = SIZES[name]
        sizes: dict[str, Any] = dict(zip(_SIZE_FIELDS, VIT_SIZES[size], strict=True))
        starts: dict[str, Any] = dict.fromkeys(("alt_start", "qknorm_start", "rope_start"), start)
        head = HeadConfig(features=features, out_channels=channels)
        return cls(
            model_name=name,
            net=BackboneConfig(name=size, out_layers=taps, **sizes, **starts),
            head=head,
            gs_head=dataclasses.replace(head, output_dim=38) if size == "vitg" else None,
        )

    @classmethod
    def small(cls) -> Config:
        """34 million parameters; depth and cameras."""
        return cls.published("da3-small")

    @classmethod
    def base(cls) -> Config:
        """135 million parameters; depth and cameras."""
        return cls.published("da3-base")

    @classmethod
    def large(cls) -> Config:
        """411 million parameters; depth and cameras."""
        return cls.published("da3-large")

    @classmethod
    def giant(cls) -> Config:
        """GIANT and GIANT-1.1, which differ in their weights alone: the only published size with
        Gaussians (1.36 billion parameters)."""
        return cls.published("da3-giant")

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
        """Reads config.json: {"model_name", "config": {"net", "head", "gs_head", "gs_adapter"}}, a
        nested model's {"config": {"anyview", "metric"}}, or a published name alone.

        Raises:
          ValueError: a part or field that is missing or that this network does not have, or an
            unknown name.
        """
        parts = fields.mapping(values.get("config", values), "config")
        parts = fields.mapping(parts.get("anyview", parts), "anyview")
        if "net" not in parts and "model_name" in values:
            return cls.published(values["model_name"])
        for part in ("net", "head", *(("gs_adapter",) if parts.get("gs_head") else ())):
            if part not in parts:
                raise ValueError(f"config.json lacks '{part}': it is no DA3 model with cameras")
        net = _fields(parts["net"], "net", BackboneConfig)
        if net.get("name", "vitg") in VIT_SIZES:
            size = VIT_SIZES[net.get("name", "vitg")]
            net = {**dict(zip(_SIZE_FIELDS, size, strict=True)), **net}
        adapter = dict(fields.mapping(parts.get("gs_adapter") or {}, "gs_adapter"))
        if adapter.pop("pred_color", False):
            raise ValueError(
                "gs_adapter.pred_color is true; only spherical harmonics (false) are built"
            )
        extra = fields.checked(cls, {k: values[k] for k in _OWN_FIELDS if k in values})
        head, gs_head = (
            HeadConfig(**_fields(parts[name], name, HeadConfig, ("dim_in",)))
            if parts.get(name)
            else None
            for name in ("head", "gs_head")
        )
        if head is None:
            raise ValueError("config.json has an empty 'head': the depth is read from it")
        return cls(
            net=BackboneConfig(**net),
            head=head,
            gs_head=gs_head,
            gs_adapter=GaussianConfig(**_fields(adapter, "gs_adapter", GaussianConfig)),
            **extra,
        )

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        names = ("net", "head", *(("gs_head", "gs_adapter") if self.gs_head else ()))
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in names}
        return {"config": parts, **{k: getattr(self, k) for k in _OWN_FIELDS}}


def _fields(values: Any, part: str, cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    kept = {
        name: value
        for name, value in fields.mapping(values, part).items()
        if name not in ("__object__", *skip)
    }
    for name in kept:
        if name not in fields.names(cls):
            raise ValueError(
                f"config.json has the field '{part}.{short(name)}', which this network does not "
                "know"
            )
    return fields.checked(cls, kept, _LIMITS, f"{part}.")


def flops(config: Config, frames: int, size: tuple[int, int]) -> float:
    """FLOPs of the products of one video of `frames` frames of `size` (H, W) pixels."""
    net, (height, width) = config.net, size
    patches = height // net.patch_size * (width // net.patch_size)
    tokens, dim = 1 + patches, net.embed_dim
    feed = (3 if net.ffn == "swiglu" else 2) * dim * net.hidden_dim
    linear = 2 * tokens * net.depth * (4 * dim * dim + feed) + 2 * patches * 3 * dim * (
        net.patch_size**2
    )
    across = sum(0 <= net.alt_start <= i and i % 2 == 1 for i in range(net.depth))
    seen = tokens * (net.depth - across) + frames * tokens * across
    heads = [config.head, *([config.gs_head] if config.gs_head else [])]
    dense = sum(_head_flops(head, net, patches, height * width) for head in heads)
    merger = _merger_flops(config.gs_head, height * width) if config.gs_head else 0.0
    camera = 2 * (2 * net.feature_dim**2 + 9 * net.feature_dim)
    return float(frames * (linear + 4 * tokens * seen * dim + dense + merger + camera))


def _head_flops(head: HeadConfig, net: BackboneConfig, patches: int, pixels: int) -> float:
    """Of one frame; resampling, which is a small part, is not counted."""
    f, out = head.features, pixels // head.down_ratio**2
    levels = [16 * patches, 4 * patches, patches, -(-patches // 4)]
    c = head.out_channels
    products = sum(patches * net.feature_dim * n for n in c)
    products += 16 * patches * c[0] ** 2 + 4 * patches * c[1] ** 2 + levels[3] * 9 * c[3] ** 2
    products += sum(n * 9 * f * channels for n, channels in zip(levels, c, strict=True))
    units = (2, 2, 2, 1)  # of two convolutions at each level
    products += sum(n * (u * 2 * 9 + 1) * f * f for n, u in zip(levels, units, strict=True))
    fine = 64 * patches if head.down_ratio == 1 else out
    products += fine * 9 * f * (f // 2)
    products += out * head.head_features * (9 * (f // 2) + head.output_dim)
    return 2.0 * products


def _merger_flops(head: HeadConfig, pixels: int) -> float:
    f, out = head.features, pixels // head.down_ratio**2
    return 2.0 * 9 * out * (3 * f // 8 + f * f // 32 + f * f // 8)
