"""Ours against diffusers in torch on the machine at hand, float32, in one run.

python -m tests.parity.side_by_side               # the 1.3B's block, and VAE decode at 17x128x128
python -m tests.parity.side_by_side --tokens=1024 --rounds=5

Both get all cores, and what our launchers set (--plain leaves it out): a malloc that keeps freed
memory, and XLA's own convolutions (cli.keep_memory, cli.spread_convolutions). Rounds alternate
between the two. Two figures, both torch over ours: the ratio of the median seconds, and of the
median processor seconds, which what else runs disturbs less.

What binds: at 4,096 tokens, forward and backward, 83% of our time is in matrix products (profiled),
1.4 TFLOP at the rate of one large product; the rest is softmax, GELU, norms and copies. VAE decode
is convolutions; YNNPACK's, which XLA prefers, kept two cores 82% busy.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from flax import nnx

from tests.launching import launcher
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nn import rotary

TEXT = 512  # tokens of a prompt
LATENTS = {1024: (1, 32, 32), 4096: (4, 32, 32)}  # tokens -> tokens along frames, rows, columns


def main() -> None:
    """Prints JSON objects, one a comparison: seconds of each side and torch's over ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--implementation", default="blocks", help="of our attention")
    parser.add_argument("--no-vae", action="store_true")
    parser.add_argument("--plain", action="store_true", help="the defaults of glibc and XLA")
    args = parser.parse_args()
    if not args.plain:
        launcher("cli").keep_memory()
        launcher("cli").spread_convolutions()
    for tokens in args.tokens:
        block(tokens, args.rounds, args.implementation)
    if not args.no_vae:
        vae_decode(args.rounds)


def block(tokens: int, rounds: int, implementation: str) -> None:
    """Forward and forward+backward of one block of Wan2.1-1.3B; gradients of weights and input."""
    config, grid = wan_dit.Config.wan_1_3b(), LATENTS[tokens]
    dim = config.dim
    rng = np.random.default_rng(0)
    x, text = (rng.normal(size=(1, n, dim)).astype(np.float32) for n in (tokens, TEXT))
    modulation = (0.1 * rng.normal(size=(1, 6, dim))).astype(np.float32)

    ours = wan_dit.WanBlocks(config, rngs=nnx.Rngs(0), stack=(), param_dtype=jnp.float32)
    graph, state = nnx.split(ours)
    rope = rotary.tables(grid, config.attention_head_dim)

    @jax.jit
    def forward(state, x):
        layer = nnx.merge(graph, state)
        return layer(
            x, text, modulation, rope, implementation=implementation, adapters=True, length=tokens
        )  # fmt: skip

    gradient = jax.jit(jax.grad(lambda state, x: forward(state, x).sum(), argnums=(0, 1)))

    theirs = WanTransformerBlock(
        dim, config.ffn_dim, config.num_attention_heads, "rms_norm_across_heads", True, config.eps
    )
    t, h, w = grid
    turn = WanRotaryPosEmbed(config.attention_head_dim, (1, 2, 2), 1024)
    theirs_rope = turn(torch.zeros(1, 16, t, 2 * h, 2 * w))
    inputs = [torch.from_numpy(a) for a in (x, text, modulation)]

    def torch_forward():
        with torch.no_grad():
            return theirs(inputs[0], inputs[1], inputs[2], theirs_rope)

    def torch_gradient():
        theirs.zero_grad()
        start = inputs[0].clone().requires_grad_()
        theirs(start, inputs[1], inputs[2], theirs_rope).sum().backward()

    versus(f"block {tokens} forward", lambda: forward(state, x), torch_forward, rounds)
    versus(f"block {tokens} forward+backward", lambda: gradient(state, x), torch_gradient, rounds)


def vae_decode(rounds: int) -> None:
    """Wan2.1's VAE, latents to 17 frames of 128x128."""
    ours = wan_vae.WanVAE(wan_vae.Config.wan2_1(), nnx.Rngs(0))
    graph, state = nnx.split(ours)
    decode = jax.jit(lambda state, z: nnx.merge(graph, state).decode(z))
    theirs = AutoencoderKLWan().eval()
    latents = np.random.default_rng(0).normal(size=(1, 5, 16, 16, 16)).astype(np.float32)
    channels_first = torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy())

    def torch_decode():
        with torch.no_grad():
            return theirs.decode(channels_first).sample

    versus("vae decode 17x128x128", lambda: decode(state, latents), torch_decode, rounds)


def versus(name: str, ours, theirs, rounds: int) -> None:
    """Prints medians over alternating rounds, after one that compiles, and their ratios."""
    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "torch": []}
    for _ in range(rounds + 1):
        for side, call in (("ours", ours), ("torch", theirs)):
            start, busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            taken[side].append((time.perf_counter() - start, time.process_time() - busy))
    wall, cpu = (
        {side: float(np.median([t[i] for t in values[1:]])) for side, values in taken.items()}
        for i in (0, 1)
    )
    figures = {
        "seconds": {k: round(v, 3) for k, v in wall.items()},
        "processor_seconds": {k: round(v, 3) for k, v in cpu.items()},
        "torch_over_ours": round(wall["torch"] / wall["ours"], 3),
        "in_processor_seconds": round(cpu["torch"] / cpu["ours"], 3),
    }
    print(json.dumps({name: figures}), flush=True)


if __name__ == "__main__":
    main()
