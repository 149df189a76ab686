"""The four parts of a Wan2.1 text-to-video model, loaded from one folder in diffusers' layout.

transformer/  vae/  text_encoder/  tokenizer/
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldr1_jax import sharding
from worldr1_jax.models import lora, umt5, wan_dit, wan_vae

PARTS = ("transformer", "vae", "text_encoder", "tokenizer")


@dataclasses.dataclass(frozen=True)
class Wan:
    """A loaded model. `tokens` is the padded length of a prompt."""

    dit: wan_dit.WanDiT
    vae: wan_vae.WanVAE
    text_encoder: umt5.UMT5Encoder
    tokenizer: Any
    tokens: int

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask `[B N]`, padded to `tokens` and cut there."""
        out = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            return_tensors="np",
        )
        return out["input_ids"].astype(np.int32), out["attention_mask"].astype(np.int32)


def check(folder: str | Path) -> None:
    """Raises ValueError, naming the part, unless the folder has all four."""
    folder = Path(folder)
    if not str(folder) or not folder.is_dir():
        raise ValueError(
            f"policy.weights '{folder}' is no folder: give one with {', '.join(PARTS)}"
        )
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ValueError(
            f"policy.weights {folder} lacks {missing[0]}/: it needs {', '.join(PARTS)}"
        )


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
) -> Wan:
    """Reads every part onto the mesh; with `lora_rank` the DiT gets fresh adapters drawn from
    `key`.

    Raises:
      ValueError: a missing or unreadable part, named.
    """
    from transformers import AutoTokenizer

    check(folder)
    folder = Path(folder)
    dit = wan_dit.load(
        folder / "transformer",
        dtype=dtype,
        remat=remat,
        mesh=mesh,
        shardings=sharding.placer("wan_dit", mesh),
    )
    if lora_rank:
        with jax.set_mesh(mesh):
            lora.add(dit, lora_rank, lora_alpha, nnx.Rngs(key if key is not None else 0))
        sharding.place(dit, "wan_dit", mesh)
    vae = wan_vae.load(folder / "vae", mesh=mesh)  # float32, as published
    text_encoder = umt5.load(
        folder / "text_encoder", dtype=dtype, mesh=mesh, shardings=sharding.placer("umt5", mesh)
    )
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    return Wan(dit, vae, text_encoder, tokenizer, tokens)
