"""The Wan2.1 video VAE: video [B F H W 3] in [0, 1] <-> latents [B f h w C], f = 1 + (F - 1) / 4.

Whole videos by default, differentiable; `chunked=True` gives the same result with activations that
do not grow with the number of frames. Names of modules are those of diffusers' AutoencoderKLWan;
its files and the one of Wan-Video's own release are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from worldr1_jax.files import short
from worldr1_jax.mesh import placement
from worldr1_jax.mesh.placement import Rules, placer
from worldr1_jax.models.wan.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    DType,
    MidBlock,
    ResidualBlock,
    RMSNorm,
    Stream,
    UpBlock,
    apply,
    patchify,
    unpatchify,
)
from worldr1_jax.weights import convert, fields

# Where the leaves live (mesh/placement.py): 0.5 GB at full size are whole on each device, and the
# work is split over samples.
PLACES: Rules = ((r".*", ()),)

# Per-channel statistics of Wan2.1's latents, as published in its config.json.
_WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_LIMITS = {
    "dim_mult": (1, 64),
    "num_res_blocks": (1, 16),
    "z_dim": (1, 1024),
    "attn_scales": (0.0, 1.0),
    "dropout": (0.0, 1.0),
    "latents_std": (1e-6, 1e6),
}

Chunk = Callable[[Array, Stream], Array]  # frames, and the frames before them -> what they give


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture, in the publisher's field names.

    Attributes:
      base_dim: channels of the first encoder level.
      decoder_base_dim: channels of the last decoder level; None means base_dim.
      z_dim: latent channels.
      dim_mult: channels of each level, in units of base_dim; each level but the last halves
        height and width.
      num_res_blocks: residual blocks of an encoder level; a decoder level has one more.
      attn_scales: scales (1, 0.5, 0.25, ...) at which encoder levels have attention.
      temperal_downsample: for each level but the last, whether it also halves the frames (the
        publisher's spelling).
      dropout: kept for the files; the network runs as in inference, where dropout does nothing.
      latents_mean, latents_std: per latent channel, for the normalised latents.
      is_residual: the Wan2.2 variant; only False is supported.
      in_channels, out_channels: 3, or 3 * patch_size^2 with patches.
      patch_size: pixels of a square patch folded into channels before the encoder; None or 1 for
        none.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = _WAN_MEAN
    latents_std: tuple[float, ...] = _WAN_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None

    def __post_init__(self) -> None:
        if self.is_residual:
            raise ValueError(
                "is_residual is true (the Wan2.2 VAE), which is not supported: give a Wan2.1 VAE"
            )
        levels = len(self.dim_mult)
        if not 1 <= levels <= 8:
            raise ValueError(f"dim_mult has {levels} levels; it has to have 1 to 8")
        if len(self.temperal_downsample) != levels - 1:
            raise ValueError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries, "
                f"but {levels} levels need {levels - 1}"
            )
        channels = 3 * (self.patch_size or 1) ** 2
        if (self.in_channels, self.out_channels) != (channels, channels):
            raise ValueError(
                f"in_channels {self.in_channels} and out_channels {self.out_channels} "
                f"must both be {channels} with patch_size {self.patch_size}"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values, but z_dim is {self.z_dim}"
                )

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent pixel, along height and along width."""
        return 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.temperal_downsample)

    @classmethod
    def wan2_1(cls) -> Config:
        """Wan2.1's VAE: 127M parameters, 8x8x4 compression."""
        return cls()

    @classmethod
    def nano(cls) -> Config:
        """A small VAE of the same compression, 8x8x4: 1.9M parameters.

        Its latents_mean and latents_std are 0 and 1 until training has measured them.
        """
        return cls(
            base_dim=16,
            dim_mult=(1, 2, 4),
            num_res_blocks=1,
            temperal_downsample=(True, True),
            latents_mean=(0.0,) * 16,
            latents_std=(1.0,) * 16,
            in_channels=12,
            out_channels=12,
            patch_size=2,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """From the publisher's config.json. Raises ValueError for an unknown field."""
        # The scale factors only steer the publisher's tiling; ours follow from the levels.
        ignored = {"scale_factor_temporal", "scale_factor_spatial"}
        known: dict[str, Any] = {
            name: value
            for name, value in values.items()
            if not name.startswith("_") and name not in ignored
        }
        unknown = sorted(set(known) - set(fields.names(cls)))
        if unknown:
            raise ValueError(
                f"config.json has the field '{short(unknown[0])}', which the Wan2.1 VAE does not "
                "know"
            )
        return cls(**fields.checked(cls, known, _LIMITS))

    def to_dict(self) -> dict[str, Any]:
        """The publisher's config.json."""
        values = {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }
        scales = {
            "scale_factor_temporal": self.temporal_compression,
            "scale_factor_spatial": self.spatial_compression,
        }
        return {"_class_name": "AutoencoderKLWan", **values, **scales}


class Encoder(nnx.Module):
    """Patched video -> moments before `quant_conv`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: DType):
        widths = [config.base_dim * m for m in config.dim_mult]
        kernel = (3, 3, 3)
        channels = config.base_dim
        self.conv_in = CausalConv3d(config.in_channels, channels, kernel, rngs=rngs, dtype=dtype)
        blocks: list[nnx.Module] = []
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(channels, width, rngs=rngs, dtype=dtype))
                channels = width
                if 0.5**level in config.attn_scales:
                    blocks.append(AttentionBlock(width, rngs=rngs, dtype=dtype))
            if level < len(widths) - 1:
                temporal = config.temperal_downsample[level]
                blocks.append(Downsample(width, temporal=temporal, rngs=rngs, dtype=dtype))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(channels, rngs=rngs, dtype=dtype)
        self.norm_out = RMSNorm(channels, rngs=rngs)
        self.conv_out = CausalConv3d(channels, 2 * config.z_dim, kernel, rngs=rngs, dtype=dtype)

    def layers(self) -> list[nnx.Module]:
        """The layers between conv_in and norm_out, in the order in which they run."""
        return [*self.down_blocks, *self.mid_block.layers()]


class Decoder(nnx.Module):
    """Latents after `post_quant_conv` -> patched video in about [-1, 1]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: DType):
        base = config.decoder_base_dim or config.base_dim
        widths = [base * m for m in reversed(config.dim_mult)]
        temporal = [*reversed(config.temperal_downsample), None]
        kernel = (3, 3, 3)
        self.conv_in = CausalConv3d(config.z_dim, widths[0], kernel, rngs=rngs, dtype=dtype)
        self.mid_block = MidBlock(widths[0], rngs=rngs, dtype=dtype)
        # Upsampling halves the channels, whatever the next level's width is.
        inputs = [widths[0], *(width // 2 for width in widths[:-1])]
        count = config.num_res_blocks + 1
        self.up_blocks = nnx.List(
            [
                UpBlock(i, w, count, temporal=t, rngs=rngs, dtype=dtype)
                for i, w, t in zip(inputs, widths, temporal, strict=True)
            ]
        )
        self.norm_out = RMSNorm(widths[-1], rngs=rngs)
        self.conv_out = CausalConv3d(
            widths[-1], config.out_channels, kernel, rngs=rngs, dtype=dtype
        )

    def layers(self) -> list[nnx.Module]:
        """The layers between conv_in and norm_out, in the order in which they run."""
        return [
            *self.mid_block.layers(),
            *(layer for block in self.up_blocks for layer in block.layers()),
        ]


class WanVAE(nnx.Module):
    """The Wan2.1 VAE.

    Args:
      config: architecture.
      rngs: key for the weights.
      dtype: dtype of the convolutions; norms, softmax, inputs and outputs stay float32.
      remat: recompute each residual block's inside in the backward pass instead of keeping it.
    """

    def __init__(
        self, config: Config, rngs: nnx.Rngs, *, dtype: DType = jnp.float32, remat: bool = False
    ):
        self.config = config
        self.dtype = dtype
        self.remat = remat
        pointwise = (1, 1, 1)
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.quant_conv = CausalConv3d(
            2 * config.z_dim, 2 * config.z_dim, pointwise, rngs=rngs, dtype=dtype
        )
        self.post_quant_conv = CausalConv3d(
            config.z_dim, config.z_dim, pointwise, rngs=rngs, dtype=dtype
        )
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)

    def encode(
        self, video: Float[Array, "B F H W 3"], *, chunked: bool = False
    ) -> Float[Array, "B f h w C"]:
        """The mode of the posterior, normalised by the config's mean and std; the denoiser's space.

        Args:
          video: values in [0, 1]; F = 1 + 4k, H and W multiples of 8 (in general, of the config's
            compression).
          chunked: run by chunks of frames, with memory that does not grow with F; same result.

        Raises:
          ValueError: F, H or W does not fit the compression.
        """
        mean, _ = self.encode_moments(video, chunked=chunked)
        shift, scale = self._statistics()
        return (mean - shift) / scale

    def encode_moments(
        self, video: Float[Array, "B F H W 3"], *, chunked: bool = False
    ) -> tuple[Float[Array, "B f h w C"], Float[Array, "B f h w C"]]:
        """Mean and log-variance (clipped to [-30, 20]), not normalised; arguments as `encode`."""
        self._check_video(video)
        step = self.config.temporal_compression
        moments = self._run(self._encode_chunk, video, step, 1, chunked)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(
        self, latents: Float[Array, "B f h w C"], *, chunked: bool = False
    ) -> Float[Array, "B F H W 3"]:
        """Normalised latents -> video clipped to [0, 1]; F = 1 + 4 (f - 1), H = 8h, W = 8w."""
        self._check_latents(latents)

        def chunk(x: Array, stream: Stream) -> Array:
            return jnp.clip(self._decode_chunk(x, stream), 0.0, 1.0)

        return self._run(chunk, latents, 1, self.config.temporal_compression, chunked)

    def decode_raw(
        self, latents: Float[Array, "B f h w C"], *, chunked: bool = False
    ) -> Float[Array, "B F H W 3"]:
        """`decode` without the clip, which would stop gradients.

        Raises:
          ValueError: the latents have not the rank or the channels of this VAE.
        """
        self._check_latents(latents)
        return self._run(self._decode_chunk, latents, 1, self.config.temporal_compression, chunked)

    def _check_latents(self, latents: Array) -> None:
        if latents.ndim != 5 or latents.shape[-1] != self.config.z_dim or latents.shape[1] < 1:
            raise ValueError(
                f"latents have shape {list(latents.shape)}, "
                f"but this VAE takes [B f h w {self.config.z_dim}]"
            )

    def _check_video(self, video: Array) -> None:
        step, size = self.config.temporal_compression, self.config.spatial_compression
        if video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"video has shape {list(video.shape)}, but the VAE takes [B F H W 3]")
        _, frames, height, width, _ = video.shape
        if frames < 1 or (frames - 1) % step:
            raise ValueError(f"video has {frames} frames, but the VAE takes 1 + {step}k of them")
        if height < size or width < size or height % size or width % size:
            raise ValueError(
                f"video is {height}x{width} pixels, but the VAE takes multiples of {size}"
            )

    def _statistics(self) -> tuple[Array, Array]:
        return jnp.array(self.config.latents_mean, jnp.float32), jnp.array(
            self.config.latents_std, jnp.float32
        )

    def _encode_chunk(self, video: Array, stream: Stream) -> Array:
        x = patchify(2.0 * video.astype(jnp.float32) - 1.0, self.config.patch_size or 1)
        x = self.quant_conv(self._trunk(self.encoder, x, stream), stream)
        return x.astype(jnp.float32)

    def _decode_chunk(self, latents: Array, stream: Stream) -> Array:
        shift, scale = self._statistics()
        x = latents.astype(jnp.float32) * scale + shift
        x = self._trunk(self.decoder, self.post_quant_conv(x, stream), stream)
        return 0.5 * unpatchify(x.astype(jnp.float32), self.config.patch_size or 1) + 0.5

    def _trunk(self, network: Encoder | Decoder, x: Array, stream: Stream) -> Array:
        x = network.conv_in(x, stream)
        for layer in network.layers():
            x = apply(layer, x, stream, remat=self.remat)
        return network.conv_out(jax.nn.silu(network.norm_out(x)), stream)

    def _run(self, chunk: Chunk, x: Array, taken: int, given: int, chunked: bool) -> Array:
        """Runs `chunk` on all frames, or on the first one and then, in a scan, on `taken` frames at
        a time, which give `given` frames.

        The scan reads its frames from x and writes what it gives to their place in the result, so
        that nothing but these two grows with the number of frames.
        """
        stream = Stream()
        if not chunked or x.shape[1] == 1:
            return chunk(x, stream)
        first = chunk(x[:, :1], stream)
        count = (x.shape[1] - 1) // taken
        batch, start, *rest = first.shape
        out = jnp.zeros((batch, start + count * given, *rest), first.dtype)
        out = lax.dynamic_update_slice_in_dim(out, first, 0, axis=1)

        def body(carry: tuple[list[Array], Array], i: Array) -> tuple[tuple, None]:
            stream = Stream(carry[0])
            part = lax.dynamic_slice_in_dim(x, 1 + i * taken, taken, axis=1)
            place = start + i * given
            y = chunk(part, stream)
            return (
                stream.caches,
                lax.dynamic_update_slice_in_dim(carry[1], y, place, axis=1),
            ), None

        return lax.scan(body, (stream.caches, out), jnp.arange(count))[0][1]


# Layers within a residual block: our name -> the one of Wan-Video's own release.
_ORIGINAL_LAYERS = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def table(config: Config, layout: str = "diffusers") -> convert.Table:
    """Rows for convert.load and convert.save; layout is "diffusers" or "wan" (Wan-Video's own).

    Modules bear diffusers' names, so that the table follows from the leaves; what differs is said
    here.
    """
    shapes = nnx.state(nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0))), nnx.Param)
    kinds = {5: "conv3d", 4: "conv2d"}
    rows = []
    for path, leaf in nnx.to_flat_state(shapes):
        *modules, name = (str(part) for part in path)
        if modules[-1] == "resample":
            # A Sequential of padding or upsampling, and the convolution.
            modules.append("1")
        if layout == "wan":
            modules = _original(modules, config.num_res_blocks)
        kind = kinds[len(leaf.get_raw_value().shape)] if name == "kernel" else "copy"
        key = ".".join([*modules, "weight" if name == "kernel" else name])
        rows.append((key, placement.leaf_path(path), kind))
    return tuple(rows)


def _original(modules: list[str], blocks: int) -> list[str]:
    """A module's path in Wan-Video's own release, whose decoder numbers its levels in one list of
    `blocks` + 1 residual blocks and the upsampling each."""
    level_length = blocks + 2
    layer: list[str] = []
    match modules:
        case ["quant_conv"]:
            place = ["conv1"]
        case ["post_quant_conv"]:
            place = ["conv2"]
        case [half, "conv_in"]:
            place = [half, "conv1"]
        case [half, "norm_out"]:
            place = [half, "head", "0"]
        case [half, "conv_out"]:
            place = [half, "head", "2"]
        case [half, "mid_block", "attentions", "0", *layer]:
            place = [half, "middle", "1"]
        case [half, "mid_block", "resnets", number, *layer]:
            place = [half, "middle", str(2 * int(number))]
        case [half, "down_blocks", number, *layer]:
            place = [half, "downsamples", number]
        case [half, "up_blocks", level, "resnets", number, *layer]:
            place = [half, "upsamples", str(int(level) * level_length + int(number))]
        case [half, "up_blocks", level, "upsamplers", "0", *layer]:
            place = [half, "upsamples", str((int(level) + 1) * level_length - 1)]
        case _:
            raise ValueError(f"the VAE's module {'.'.join(modules)} has no name in Wan's release")
    return [*place, *(_ORIGINAL_LAYERS.get(part, part) for part in layer)]


def load(
    path: str | Path,
    *,
    dtype: DType = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    remat: bool = False,
) -> WanVAE:
    """Reads diffusers' folder (config.json + safetensors), or the file of Wan-Video's own release.

    Args:
      path: the folder, e.g. Wan2.1-T2V-1.3B-Diffusers/vae; or one file, e.g.
        Wan2.1-T2V-1.3B/Wan2.1_VAE.pth, which is taken for Wan2.1's VAE.
      dtype: of the weights and of the convolutions.
      mesh: mesh over which the weights are replicated.
      remat: as in `WanVAE`.

    Raises:
      ValueError: the config is another network's, or a key is unknown, missing or of a wrong shape.
    """
    config = read_config(path)
    model = nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0), dtype=dtype, remat=remat))
    layout = "wan" if convert.holds(path, "encoder.conv1.weight") else "diffusers"
    convert.load(model, path, table(config, layout), dtype=dtype, shardings=placer(PLACES, mesh))
    return model


def read_config(path: str | Path) -> Config:
    """The config of a folder; a single file has none and is Wan2.1's VAE as Wan-Video releases
    it."""
    if Path(path).is_file():
        return Config.wan2_1()
    return convert.config_of(Config, path)


def save(model: WanVAE, path: str | Path) -> None:
    """Writes the folder that `load`, and diffusers' AutoencoderKLWan.from_pretrained, read."""
    convert.save(model, path, table(model.config), config=model.config.to_dict())
