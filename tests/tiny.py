"""A model small enough for tests of the whole loop: random weights in the publishers' files."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from configs import world
from worldr1_jax.models import umt5
from worldr1_jax.models.da3 import model as da3
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nano import tokenizer


def save_weights(folder: Path) -> Path:
    """Writes transformer, vae, text_encoder, tokenizer and da3.

    The transformer's output projection, which starts at zero, is random: else no gradient would
    reach the adapters, and text and adapters would change nothing.
    """
    dit = wan_dit.Config(
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    )
    text = umt5.Config(
        vocab_size=len(tokenizer.vocabulary()),
        d_model=32,
        d_kv=16,
        num_heads=2,
        d_ff=32,
        num_layers=1,
    )
    vae = wan_vae.Config(
        base_dim=4, z_dim=16, dim_mult=(1, 1, 2), num_res_blocks=1, temperal_downsample=(True,
        True), latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16, in_channels=12, out_channels=12,
        patch_size=2,
    )  # fmt: skip

    def transformer() -> wan_dit.WanDiT:
        made = wan_dit.WanDiT(dit, nnx.Rngs(0))
        head = made.proj_out.kernel
        head[...] = 0.3 * jax.random.normal(jax.random.key(4), head.shape)
        return made

    wan_dit.save(transformer(), folder / "transformer")
    umt5.save(umt5.UMT5Encoder(text, nnx.Rngs(1)), folder / "text_encoder")
    wan_vae.save(wan_vae.WanVAE(vae, nnx.Rngs(2)), folder / "vae")
    da3.save(da3.DA3(da3_config(), nnx.Rngs(3)), folder / "da3")
    tokenizer.save(folder / "tokenizer")
    return folder


def da3_config() -> da3.Config:
    """Nano's network with less of everything: 16 patches and 1,024 Gaussians a frame."""
    nano = da3.Config.nano()
    net = replace(nano.net, embed_dim=32, num_heads=2, depth=4, out_layers=(0, 1, 2, 3))
    head = replace(nano.head, features=16, out_channels=(16, 16, 16, 16))
    gaussians = replace(head, output_dim=nano.gs_adapter.raw_dim + 1)
    return replace(nano, net=net, head=head, gs_head=gaussians, process_res=32)


def config(folder: Path, variant: str = "nano,grpo", **changes):
    """nano's configuration on these weights, with few and small videos; `changes` are dotted
    fields."""
    c = world.get_config(variant)
    settings = {
        "policy.weights": str(folder), "rewards.reconstruct.da3": str(folder / "da3"),
        "frames": 5, "height": 32, "width": 32, "groups": 2, "group_size": 4, "num_updates": 4,
        "checkpoint_every": 1, "sample.steps": 4, "algorithm.window_range": (0, 3),
        "rewards.recon.views": 2, "evaluate.prompts": 2, "evaluate.batch": 2,
        "evaluate.samples": 4, "evaluate.guidances": (), "dynamic.main_updates": 2,
        "dynamic.dynamic_updates": 1, "mesh.data": 1, "sample.guidance": 1.0,
        "rewards.weights.recon": 1.0, "rewards.weights.general": 1.0, "advantage.rewards": "sum",
    }  # fmt: skip
    if "window_range" not in c.algorithm:
        settings.pop("algorithm.window_range")
    for name, value in (settings | changes).items():
        part, field = c, name
        while "." in field:
            head, field = field.split(".", 1)
            part = part[head]
        part[field] = value
    return c


def leaves(tree) -> list[np.ndarray]:
    """The leaves as host arrays."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
