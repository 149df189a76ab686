"""The four parts of a Wan2.1 text-to-video model, loaded from one folder in either layout.

diffusers and launch/convert_weights.py:  transformer/  vae/  text_encoder/  tokenizer/
                          and, of diffusers alone, model_index.json  scheduler/
Wan-Video's own release:  config.json and diffusion_pytorch_model*.safetensors,  Wan2.1_VAE.pth,
                          models_t5_umt5-xxl-enc-bf16.pth,  google/umt5-xxl/
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax import files
from worldr1_jax.mesh import arrays, placement
from worldr1_jax.models import umt5
from worldr1_jax.models.wan import config as wan_dit_config
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import lora_files
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nn import lora
from worldr1_jax.nn.attention import for_mesh
from worldr1_jax.policies import adapters as adapters_of
from worldr1_jax.policies.base import POLICY, TEXT, VAE, Work
from worldr1_jax.policies.wan_folder import (
    CLASSES,
    INDEX,
    LAYOUTS,
    SCHEDULER,
    load_tokenizer,
    parts,
    tokenize,
)
from worldr1_jax.weights import convert

# Most rows of an embedding that no token has: tables are filled up to a round number. UMT5 has 84.
_UNUSED = 1024
# Published sizes, by the names of the config's variants.
SIZES = {"small": wan_dit.Config.wan_1_3b, "large": wan_dit.Config.wan_14b}


@dataclasses.dataclass(frozen=True)
class Shape:
    """DiT and VAE as their config.json files describe them."""

    dit: wan_dit.Config
    vae: wan_vae.Config

    @property
    def heads(self) -> int:
        return self.dit.num_attention_heads

    @property
    def text_width(self) -> int:
        return self.dit.text_dim

    def latents(self, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
        frames, height, width = size
        space, time = self.vae.spatial_compression, self.vae.temporal_compression
        if frames < 1 or (frames - 1) % time:
            raise ValueError(
                f"frames is {frames}: it has to be 1 + {time} k, such as {1 + 4 * time}"
            )
        patch = self.dit.patch_size
        for name, value, unit in (
            ("height", height, space * patch[1]),
            ("width", width, space * patch[2]),
        ):
            if value < unit or value % unit:
                raise ValueError(
                    f"{name} is {value}: it has to be a multiple of {unit} (VAE times patch)"
                )
        return 1 + (frames - 1) // time, height // space, width // space, self.vae.z_dim

    def work(self, size: tuple[int, int, int], text_tokens: int) -> Work:
        dit = self.dit
        count = wan_dit_config.tokens(dit, self.latents(size)[:3])
        linear, scores = wan_dit_config.flops(dit, count, text_tokens)
        weights = dit.num_layers * dit.dim * (8 * dit.dim + 2 * dit.ffn_dim)
        return Work(count, dit.dim, dit.num_layers, self.heads, linear, scores, weights)


@dataclasses.dataclass(frozen=True)
class Wan:
    """A loaded model, a `policies.base.Policy`. `tokens` is the padded length of a prompt; TEXT and
    the tokenizer are missing where prompts come encoded (data/text_cache.py)."""

    networks: Mapping[str, Any]
    tokenizer: Any
    tokens: int

    @property
    def shape(self) -> Shape:
        return Shape(self.networks[POLICY].config, self.networks[VAE].config)

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return tokenize(self.tokenizer, prompts, self.tokens)

    def embed(self, networks: Any, tokens: tuple[Array, ...]) -> Float[Array, "B N D"]:
        ids, mask = tokens
        return umt5.zero_padding(networks[TEXT](ids, mask), mask)

    def velocity(
        self, networks: Any, latents: Array, timestep: Array, text: Array, *, adapters: bool
    ) -> Array:
        return networks[POLICY](latents, timestep, text, adapters=adapters)

    def decode(self, networks: Any, latents: Array, *, chunked: bool) -> Array:
        return networks[VAE].decode(latents, chunked=chunked)


def read(folder: str | Path) -> Shape:
    """The shapes of DiT and VAE, from the small files alone; errors as for `load`."""
    found = parts(folder)
    dit, vae = wan_dit.read_config(found["transformer"]), wan_vae.read_config(found["vae"])
    if not dit.in_channels == dit.out_channels == vae.z_dim:
        raise ValueError(
            f"policy.weights {folder}: the transformer has {dit.in_channels} channels in and "
            f"{dit.out_channels} out, and the latents of the VAE {vae.z_dim}; text-to-video needs "
            "all equal"
        )
    return Shape(dit, vae)


def text_files(folder: str | Path) -> list[Path]:
    """What embeddings depend on: encoder and tokenizer."""
    found = parts(folder)
    return [found["text_encoder"], found["tokenizer"]]


def load_adapters(paths: Sequence[str], folder: str | Path, kind: str) -> lora.Adapters:
    """Adapters of runs or of LoRA files, "path:0.8" for a strength, for the model of a folder; see
    policies/adapters.py."""
    return adapters_of.load_all(paths, read(folder).dit, kind)


def read_adapters(paths: Sequence[str], folder: str | Path, kind: str) -> lora_files.Lora:
    """The same with the differences of whole weights that files hold; for `store`."""
    return adapters_of.read_all(paths, read(folder).dit, kind)


def load(
    folder: str | Path,
    *,
    mesh: jax.sharding.Mesh,
    tokens: int,
    dtype: Any = jnp.float32,
    remat: str = "none",
    lora_rank: int = 0,
    lora_alpha: float = 1.0,
    lora_layers: str = "attention",
    key: jax.Array | None = None,
    adapters: lora.Adapters | None = None,
    text: bool = True,
) -> Wan:
    """Reads every part onto the mesh.

    Args:
      folder: of either layout, or what `store` wrote.
      mesh: where the networks lie, by their tables PLACES.
      tokens: padded length of prompts.
      dtype: of matmuls and their resting kernels; norms and the VAE stay float32.
      remat: see wan_dit.WanDiT.
      lora_rank, lora_alpha, lora_layers, key: fresh adapters of the DiT, on these of lora.LAYERS;
        rank 0 for none.
      adapters: given ones instead, which every device holds; with a rank, what training starts
        from (see lora.grown).
      text: False reads neither text encoder nor tokenizer.

    Raises:
      ValueError: a missing or unreadable part, named, or adapters that do not fit.
    """
    found = parts(folder)
    dit = wan_dit.load(
        found["transformer"],
        dtype=dtype,
        remat=remat,
        mesh=mesh,
    )
    if lora_rank:
        with jax.set_mesh(mesh):
            lora.add(
                dit, lora_rank, lora_alpha, nnx.Rngs(key if key is not None else 0),
                targets=lora.LAYERS[lora_layers],
            )  # fmt: skip
        if adapters is not None:
            adapters = lora.grown(lora.adapters(dit), adapters)
            lora.detach(dit)
        else:
            placement.place(dit, wan_dit.ADAPTER_PLACES, mesh, placement.ADAPTERS)
    if adapters is not None:
        lora.attach(dit, adapters)
        state = nnx.state(dit, nnx.LoRAParam)
        nnx.update(dit, jax.device_put(state, arrays.replicated(mesh)))
        if lora_rank:
            placement.place(dit, wan_dit.ADAPTER_PLACES, mesh, placement.ADAPTERS)
    vae = wan_vae.load(found["vae"], mesh=mesh)  # float32, as published
    networks: dict[str, Any] = {POLICY: dit, VAE: vae}
    if not text:
        return Wan(networks, None, tokens)
    encoder = load_text(folder, mesh=mesh, tokens=tokens, dtype=dtype)
    return Wan({**networks, **encoder.networks}, encoder.tokenizer, tokens)


def load_text(
    folder: str | Path, *, mesh: jax.sharding.Mesh, tokens: int, dtype: Any = jnp.float32
) -> Wan:
    """Text encoder and tokenizer alone; errors as for `load`."""
    found = parts(folder)
    tokenizer = load_tokenizer(found["tokenizer"])
    encoder = umt5.load(found["text_encoder"], dtype=dtype, mesh=mesh)
    words = encoder.config.vocab_size
    if not words - _UNUSED <= len(tokenizer) <= words:
        raise ValueError(
            f"{found['tokenizer']} has {len(tokenizer)} tokens, and the text encoder beside it "
            f"{words}: they are not of one model"
        )
    return Wan({TEXT: encoder}, tokenizer, tokens)


def published(size: str) -> Shape:
    """The shape of a published size, of SIZES."""
    return Shape(SIZES[size](), wan_vae.Config.wan2_1())


def described(
    size: str,
    mesh: jax.sharding.Mesh,
    *,
    tokens: int,
    dtype: Any,
    remat: str,
    lora_rank: int,
    lora_alpha: float,
    lora_layers: str = "attention",
) -> Wan:
    """Wan2.1 1.3B ("small") or 14B ("large") as shapes that lie on the mesh; arguments as those of
    `load`."""
    config = SIZES[size]()

    def make_dit() -> nnx.Module:
        dit = wan_dit.WanDiT(
            config, nnx.Rngs(0), dtype=dtype, param_dtype=dtype, remat=remat,
            implementation=for_mesh(mesh, config.num_attention_heads, dtype),
        )  # fmt: skip
        targets = lora.LAYERS[lora_layers]
        return lora.add(dit, lora_rank, lora_alpha, nnx.Rngs(1), targets=targets)

    def make_text() -> nnx.Module:
        return umt5.UMT5Encoder(umt5.Config.xxl(), nnx.Rngs(0), dtype=dtype, param_dtype=dtype)

    dit = placement.describe(nnx.eval_shape(make_dit), wan_dit.PLACES, mesh)
    placement.describe(dit, wan_dit.ADAPTER_PLACES, mesh, placement.ADAPTERS)
    vae = nnx.eval_shape(lambda: wan_vae.WanVAE(wan_vae.Config.wan2_1(), nnx.Rngs(0)))
    networks = {
        POLICY: dit,
        VAE: placement.describe(vae, wan_vae.PLACES, mesh),
        TEXT: placement.describe(nnx.eval_shape(make_text), umt5.PLACES, mesh),
    }
    return Wan(networks, None, tokens)


def store(
    folder: str | Path,
    to: str | Path,
    *,
    mesh: jax.sharding.Mesh,
    dtype: Any,
    form: str = "orbax",
    adapters: lora.Adapters | None = None,
    differences: lora_files.Differences | None = None,
    shift: float = 3.0,
) -> None:
    """Converts a folder of either layout, one network after the other; every process of a mesh has
    to call it.

    Args:
      folder: what `load` reads.
      to: the new folder, with diffusers' four parts.
      mesh: where each network lies meanwhile.
      dtype: in which matmul kernels are written; norms and the VAE stay float32.
      form: "orbax", which later starts restore onto any mesh, with the bits that `load` gives from
        `folder` in the same dtype; or "diffusers", its safetensors and what else its
        WanPipeline.from_pretrained reads.
      adapters: to be folded into the DiT's kernels.
      differences: of whole weights, to be added to the DiT's (policies/adapters.py, read_all).
      shift: of the schedule that is written for diffusers where `folder` has none.

    Raises:
      ValueError: as for `load`, an unknown form, or `to` holds one of the parts already.
    """
    if form not in ("orbax", "diffusers"):
        raise ValueError(f"the form of weights is '{form}': it is orbax or diffusers")
    found, to = parts(folder), files.local(to)
    taken = [part for part in LAYOUTS["diffusers"] if os.path.lexists(to / part)]
    if taken:
        raise ValueError(f"{to} has {taken[0]}/ already: write to a new folder")
    files.check_writable(to)
    # Read before hours of converting, not after them.
    pipeline = _pipeline(Path(folder), found["tokenizer"], shift) if form == "diffusers" else {}

    def write(model: Any, part: str, save: Callable[[Any, Path], None]) -> None:
        if form == "orbax":
            convert.store(model, to / part, model.config.to_dict())
        elif jax.process_index() == 0:
            save(model, to / part)

    # Each network goes before the next one is read: a host holds one at a time.
    dit = wan_dit.load(
        found["transformer"],
        dtype=dtype,
        mesh=mesh,
    )
    if differences:
        lora_files.add(dit, differences)
    if adapters is not None:
        lora.merge(lora.attach(dit, adapters))
    made_of = f"policy.weights {folder}{' with adapters' if adapters or differences else ''}"
    convert.check_finite(dit, f"{made_of} in {jnp.dtype(dtype)}")
    write(dit, "transformer", wan_dit.save)
    del dit
    write(wan_vae.load(found["vae"], mesh=mesh), "vae", wan_vae.save)
    text = umt5.load(
        found["text_encoder"],
        dtype=dtype,
        mesh=mesh,
    )
    write(text, "text_encoder", umt5.save)
    if jax.process_index() == 0:
        _copy(found["tokenizer"], to / "tokenizer")
        for name, values in pipeline.items():
            files.write_atomically(to / name, f"{json.dumps(values, indent=2)}\n".encode())


def _copy(folder: Path, to: Path) -> None:
    """Copies the files of a folder, without hidden ones and what is no regular file."""
    files.make_folder(to)
    for file in files.visible(folder, "*"):
        with files.named(to / file.name, "written"):
            shutil.copyfile(file, to / file.name)


def _pipeline(folder: Path, tokenizer: Path, shift: float) -> dict[str, dict[str, Any]]:
    """What makes a pipeline of the four parts for diffusers, by file: the index, and a scheduler,
    that of `folder` if it has one. Raises ValueError for a part that does not say its class."""
    own = folder / SCHEDULER
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "solver_order": 2,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }
    if own.parent.is_dir():
        scheduler = files.read_json(own)
    config = tokenizer / "tokenizer_config.json"
    named = files.read_json(config).get("tokenizer_class") if config.is_file() else None
    index: dict[str, list[Any]] = {
        "scheduler": ["diffusers", scheduler.get("_class_name")],
        "text_encoder": ["transformers", CLASSES["text_encoder"]],
        "tokenizer": ["transformers", named or "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", CLASSES["transformer"]],
        "vae": ["diffusers", CLASSES["vae"]],
    }
    for part, library_and_class in index.items():
        if not isinstance(library_and_class[1], str):
            raise ValueError(f"policy.weights {folder}: the config of its {part} names no class")
    return {INDEX: {"_class_name": "WanPipeline", **index}, SCHEDULER: scheduler}
