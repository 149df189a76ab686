"""The four parts of a Wan2.1 text-to-video model, loaded from one folder in either layout.

diffusers and launch/convert_weights.py:  transformer/  vae/  text_encoder/  tokenizer/
Wan-Video's own release:  config.json and diffusion_pytorch_model*.safetensors,  Wan2.1_VAE.pth,
                          models_t5_umt5-xxl-enc-bf16.pth,  google/umt5-xxl/
"""

from __future__ import annotations

import dataclasses
import html
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.mesh import arrays, placement
from worldr1_jax.models import umt5
from worldr1_jax.models.wan import config as wan_dit_config
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nn import lora
from worldr1_jax.nn.attention import for_mesh
from worldr1_jax.policies import adapters as adapters_of
from worldr1_jax.policies.base import POLICY, TEXT, VAE, Work
from worldr1_jax.weights import convert

# Published sizes, by the names of the config's variants.
SIZES = {"small": wan_dit.Config.wan_1_3b, "large": wan_dit.Config.wan_14b}

# Where each part lies in a folder, by layout; "" is the folder itself.
LAYOUTS = {
    "diffusers": {
        "transformer": "transformer",
        "vae": "vae",
        "text_encoder": "text_encoder",
        "tokenizer": "tokenizer",
    },
    "original": {
        "transformer": "",
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "google/umt5-xxl",
    },
}


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


def tokenize(tokenizer: Any, prompts: Sequence[str], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask `[B N]` int32, padded to N = `tokens` and cut there.

    Prompts are cleaned as Wan and diffusers do: HTML entities are resolved, white space is made
    single. Departure: without ftfy, which mends text of a wrong encoding and straightens quotes.
    """
    out = tokenizer(
        [" ".join(html.unescape(html.unescape(prompt)).split()) for prompt in prompts],
        padding="max_length",
        max_length=tokens,
        truncation=True,
        return_tensors="np",
    )
    return out["input_ids"].astype(np.int32), out["attention_mask"].astype(np.int32)


def parts(folder: str | Path) -> dict[str, Path]:
    """Paths of transformer, vae, text_encoder and tokenizer.

    Raises:
      ValueError: no such folder, one of neither layout, or a part that is missing, named.
    """
    root = Path(folder)
    if not str(folder) or not root.is_dir():
        raise ValueError(
            f"policy.weights '{folder}' is no folder: give one in diffusers' layout or of "
            "Wan-Video's own release"
        )
    places = {name: {p: root / place for p, place in d.items()} for name, d in LAYOUTS.items()}
    there = {
        name: [part for part, path in found.items() if path != root and path.exists()]
        for name, found in places.items()
    }
    layout = max(there, key=lambda name: len(there[name]))
    if not there[layout]:
        names = "; ".join(", ".join(filter(None, d.values())) for d in LAYOUTS.values())
        raise ValueError(
            f"policy.weights {folder} is of neither layout that is read: it needs {names}"
        )
    for part, path in places[layout].items():
        if not path.exists():
            wanted = ", ".join(filter(None, LAYOUTS[layout].values()))
            raise ValueError(
                f"policy.weights {folder} lacks {LAYOUTS[layout][part]}, its {part}: it needs "
                f"{wanted}"
            )
    return places[layout]


def read(folder: str | Path) -> Shape:
    """The shapes of DiT and VAE, from the small files alone; errors as for `load`."""
    found = parts(folder)
    return Shape(wan_dit.read_config(found["transformer"]), wan_vae.read_config(found["vae"]))


def text_files(folder: str | Path) -> list[Path]:
    """What embeddings depend on: encoder and tokenizer."""
    found = parts(folder)
    return [found["text_encoder"], found["tokenizer"]]


def load_adapters(path: str | Path, folder: str | Path, kind: str) -> lora.Adapters:
    """Adapters of a run or of a LoRA file for the model of a folder; see policies/adapters.py."""
    return adapters_of.load(path, read(folder).dit, kind)


def load(
    folder: str | Path,
    *,
    mesh: jax.sharding.Mesh,
    tokens: int,
    dtype: Any = jnp.float32,
    remat: str = "none",
    lora_rank: int = 0,
    lora_alpha: float = 1.0,
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
      lora_rank, lora_alpha, key: fresh adapters of the DiT; rank 0 for none.
      adapters: given ones instead, which every device holds.
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
            lora.add(dit, lora_rank, lora_alpha, nnx.Rngs(key if key is not None else 0))
        placement.place(dit, wan_dit.ADAPTER_PLACES, mesh, placement.ADAPTERS)
    if adapters is not None:
        lora.attach(dit, adapters)
        state = nnx.state(dit, nnx.LoRAParam)
        nnx.update(dit, jax.device_put(state, arrays.replicated(mesh)))
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
    from transformers import AutoTokenizer

    found = parts(folder)
    encoder = umt5.load(found["text_encoder"], dtype=dtype, mesh=mesh)
    return Wan({TEXT: encoder}, AutoTokenizer.from_pretrained(str(found["tokenizer"])), tokens)


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
) -> Wan:
    """Wan2.1 1.3B ("small") or 14B ("large") as shapes that lie on the mesh; arguments as those of
    `load`."""
    config = SIZES[size]()

    def make_dit() -> nnx.Module:
        dit = wan_dit.WanDiT(
            config, nnx.Rngs(0), dtype=dtype, param_dtype=dtype, remat=remat,
            implementation=for_mesh(mesh, config.num_attention_heads, dtype),
        )  # fmt: skip
        return lora.add(dit, lora_rank, lora_alpha, nnx.Rngs(1))

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
) -> None:
    """Converts a folder of either layout, one network after the other; every process of a mesh has
    to call it.

    Args:
      folder: what `load` reads.
      to: the new folder, with diffusers' four parts.
      mesh: where each network lies meanwhile.
      dtype: in which matmul kernels are written; norms and the VAE stay float32.
      form: "orbax", which later starts restore onto any mesh, with the bits that `load` gives from
        `folder` in the same dtype; or "diffusers", its safetensors.
      adapters: to be folded into the DiT's kernels.

    Raises:
      ValueError: as for `load`, an unknown form, or `to` holds one of the parts already.
    """
    if form not in ("orbax", "diffusers"):
        raise ValueError(f"the form of weights is '{form}': it is orbax or diffusers")
    found, to = parts(folder), Path(to)
    taken = [part for part in LAYOUTS["diffusers"] if (to / part).exists()]
    if taken:
        raise ValueError(f"{to} has {taken[0]}/ already: write to a new folder")

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
    if adapters is not None:
        lora.merge(lora.attach(dit, adapters))
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
        shutil.copytree(found["tokenizer"], to / "tokenizer")
