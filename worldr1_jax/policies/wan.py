"""The four parts of a Wan2.1 text-to-video model, loaded from one folder in either layout.

diffusers and launch/convert_weights.py:  transformer/  vae/  text_encoder/  tokenizer/
                          and, of diffusers alone, model_index.json  scheduler/
Wan-Video's own release:  config.json and diffusion_pytorch_model*.safetensors,  Wan2.1_VAE.pth,
                          models_t5_umt5-xxl-enc-bf16.pth,  google/umt5-xxl/
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldr1_jax import files
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.models import umt5
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import lora_files
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nn import lora
from worldr1_jax.weights import convert

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
# What says that a folder is of another model, of which reading the four parts alone would make
# something that nobody trained.
_OTHERS = {
    "transformer_2": "the second expert of Wan2.2-A14B",
    "high_noise_model": "the first expert of Wan2.2-A14B",
    "low_noise_model": "the second expert of Wan2.2-A14B",
    "Wan2.2_VAE.pth": "the VAE of Wan2.2-TI2V-5B",
    "image_encoder": "the image encoder of image-to-video",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "that of image-to-video",
}
INDEX = "model_index.json"
_MOST_TOKENIZER = 256 * files.MIB
# diffusers' class -> the part that has to be of it.
_CLASSES = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
}


@dataclasses.dataclass(frozen=True)
class Wan:
    """A loaded model. `tokens` is the padded length of a prompt. Text encoder and tokenizer are
    None where prompts come encoded (data/text_cache.py)."""

    dit: wan_dit.WanDiT
    vae: wan_vae.WanVAE
    text_encoder: umt5.UMT5Encoder | None
    tokenizer: Any
    tokens: int


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
    root = files.local(folder)
    if not str(folder) or not os.path.isdir(root):
        raise ValueError(
            f"policy.weights '{files.short(str(folder))}' is no folder: give one in diffusers' "
            "layout or of Wan-Video's own release"
        )
    _check_model(root)
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


def _check_model(root: Path) -> None:
    """Raises ValueError for what makes another model of a folder than the four parts do."""
    for name, what in _OTHERS.items():
        if os.path.lexists(root / name):
            raise ValueError(
                f"policy.weights {root} has {name}, {what}: what is read is Wan2.1's text-to-video "
                "model"
            )
    if not os.path.lexists(root / INDEX):
        return
    index = files.read_json(root / INDEX)
    kind = index.pop("_class_name", None)
    if kind != "WanPipeline":
        raise ValueError(
            f"{root / INDEX} is of {files.short(repr(kind))}: what is read is a 'WanPipeline'"
        )
    for name, value in index.items():
        if name.startswith("_") or name in ("tokenizer", "scheduler"):
            continue
        wanted = _CLASSES.get(name)
        made = value[1] if isinstance(value, list) and len(value) == 2 else value
        if made != wanted and (wanted or made):  # null, [null, null] and false: not in use
            raise ValueError(
                f"{root / INDEX} has '{files.short(name)}' = {files.short(repr(made))}: Wan2.1's "
                f"text-to-video model needs {repr(wanted) if wanted else 'it null'}"
            )


def read_configs(folder: str | Path) -> tuple[wan_dit.Config, wan_vae.Config]:
    """The shapes of DiT and VAE, from the small files alone; errors as for `load`."""
    found = parts(folder)
    dit, vae = wan_dit.read_config(found["transformer"]), wan_vae.read_config(found["vae"])
    if not dit.in_channels == dit.out_channels == vae.z_dim:
        raise ValueError(
            f"policy.weights {folder}: the transformer has {dit.in_channels} channels in and "
            f"{dit.out_channels} out, and the latents of the VAE {vae.z_dim}; text-to-video needs "
            "all equal"
        )
    return dit, vae


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
      mesh: where the networks lie, by the tables of mesh/placement.py.
      tokens: padded length of prompts.
      dtype: of matmuls and their resting kernels; norms and the VAE stay float32.
      remat: see wan_dit.WanDiT.
      lora_rank, lora_alpha, key: fresh adapters of the DiT; rank 0 for none.
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
        shardings=sharding.placer("wan_dit", mesh),
    )
    if lora_rank:
        with jax.set_mesh(mesh):
            lora.add(dit, lora_rank, lora_alpha, nnx.Rngs(key if key is not None else 0))
        if adapters is not None:
            adapters = lora.grown(lora.adapters(dit), adapters)
            lora.detach(dit)
        sharding.place(dit, "wan_dit", mesh)
    if adapters is not None:
        lora.attach(dit, adapters)
        state = nnx.state(dit, nnx.LoRAParam)
        nnx.update(dit, jax.device_put(state, arrays.replicated(mesh)))
    vae = wan_vae.load(found["vae"], mesh=mesh)  # float32, as published
    if not text:
        return Wan(dit, vae, None, None, tokens)
    return Wan(dit, vae, *load_text(folder, mesh=mesh, dtype=dtype), tokens)


def load_text(
    folder: str | Path, *, mesh: jax.sharding.Mesh, dtype: Any = jnp.float32
) -> tuple[umt5.UMT5Encoder, Any]:
    """Text encoder and tokenizer alone; errors as for `load`."""
    found = parts(folder)
    tokenizer = load_tokenizer(found["tokenizer"])
    encoder = umt5.load(
        found["text_encoder"], dtype=dtype, mesh=mesh, shardings=sharding.placer("umt5", mesh)
    )
    if len(tokenizer) > encoder.config.vocab_size:
        raise ValueError(
            f"{found['tokenizer']} has {len(tokenizer)} tokens, more than the "
            f"{encoder.config.vocab_size} of the text encoder beside it"
        )
    return encoder, tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, of whose own code none is run.

    Raises:
      ValueError: a folder with code of its own, or without a tokenizer that transformers knows.
    """
    from transformers import AutoTokenizer

    for file in files.visible(folder, "*.json"):
        if "auto_map" in files.read_json(file, _MOST_TOKENIZER):
            raise ValueError(
                f"{file} names code to run ('auto_map'): none is run from a folder of weights; use "
                "a tokenizer that transformers knows"
            )
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises no narrower type
        reason = files.short(str(error).strip().split("\n")[0])
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can read: {reason}"
        ) from error


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

    def write(model: Any, part: str, save: Callable[[Any, Path], None]) -> None:
        if form == "orbax":
            convert.store(model, to / part, model.config.to_dict())
        elif jax.process_index() == 0:
            save(model, to / part)

    # Each network goes before the next one is read: a host holds one at a time.
    dit = wan_dit.load(
        found["transformer"], dtype=dtype, mesh=mesh, shardings=sharding.placer("wan_dit", mesh)
    )
    if differences:
        lora_files.add(dit, differences)
    if adapters is not None:
        lora.merge(lora.attach(dit, adapters))
    write(dit, "transformer", wan_dit.save)
    del dit
    write(wan_vae.load(found["vae"], mesh=mesh), "vae", wan_vae.save)
    text = umt5.load(
        found["text_encoder"], dtype=dtype, mesh=mesh, shardings=sharding.placer("umt5", mesh)
    )
    write(text, "text_encoder", umt5.save)
    if jax.process_index() == 0:
        _copy(found["tokenizer"], to / "tokenizer")
        if form == "diffusers":
            _write_index(Path(folder), to, shift)


def _copy(folder: Path, to: Path) -> None:
    """Copies the files of a folder, without hidden ones and what is no regular file."""
    files.make_folder(to)
    for file in files.visible(folder, "*"):
        with files.named(to / file.name, "written"):
            shutil.copyfile(file, to / file.name)


def _write_index(folder: Path, to: Path, shift: float) -> None:
    """What makes a pipeline of the four parts for diffusers: the index, and a scheduler, that of
    `folder` if it has one."""
    if (folder / "scheduler").is_dir():
        _copy(folder / "scheduler", to / "scheduler")
    else:
        scheduler = {
            "_class_name": "UniPCMultistepScheduler",
            "num_train_timesteps": 1000,
            "solver_order": 2,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": shift,
        }
        _write_json(to / "scheduler" / "scheduler_config.json", scheduler)
    scheduler_class = files.read_json(to / "scheduler" / "scheduler_config.json")["_class_name"]
    config = to / "tokenizer" / "tokenizer_config.json"
    named = files.read_json(config).get("tokenizer_class") if config.is_file() else None
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", _CLASSES["text_encoder"]],
        "tokenizer": ["transformers", named or "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", _CLASSES["transformer"]],
        "vae": ["diffusers", _CLASSES["vae"]],
    }
    _write_json(to / INDEX, index)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    files.write_atomically(path, f"{json.dumps(values, indent=2)}\n".encode())
