"""A toy family of policies: one file, and one line in policies.base.FAMILIES."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldr1_jax.policies.base import POLICY, TEXT, VAE, Work

SIDE, CHANNELS, WIDTH = 8, 3, 16  # pixels a latent; channels of latents; width of embeddings


class Denoiser(nnx.Module):
    """Predicts that a video is of one colour, which the prompt decides; some of its noise stays,
    and its adapter is what learns."""

    def __init__(self, rngs: nnx.Rngs, dtype=jnp.float32):
        self.kernel = nnx.Param(jax.random.normal(rngs(), (WIDTH, CHANNELS), dtype))
        self.shift = nnx.LoRAParam(jnp.zeros((WIDTH, CHANNELS), jnp.float32))

    def __call__(self, latents, timestep, text, *, adapters):
        kernel = self.kernel[...] + (self.shift[...] if adapters else 0.0)
        colour = jnp.tanh(text.mean(1) @ kernel)[:, None, None, None]
        sigma = jnp.maximum(timestep / 1000, 1e-3).reshape(-1, 1, 1, 1, 1)
        return (0.7 * latents - colour) / sigma  # eps - x0, where x0 = colour + 0.3 latents


class Words(nnx.Module):
    """A vector for each letter."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs(), (128, WIDTH)))


class Enlarge(nnx.Module):
    """A decoder: every latent is a square of its colour."""

    def __init__(self):
        self.gain = nnx.Param(jnp.ones(()))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Latents are SIDE times smaller than videos, and have all of their frames."""

    heads: int = 1
    text_width: int = WIDTH

    def latents(self, size):
        frames, height, width = size
        if height % SIDE or width % SIDE:
            raise ValueError(f"height and width are {height} and {width}: multiples of {SIDE}")
        return frames, height // SIDE, width // SIDE, CHANNELS

    def work(self, size, text_tokens):
        count = int(np.prod(self.latents(size)[:3]))
        return Work(count, WIDTH, 1, 1, 2.0 * count * CHANNELS, 0.0, WIDTH * CHANNELS)


@dataclasses.dataclass(frozen=True)
class Toy:
    """The policy."""

    networks: dict
    tokens: int
    shape: Shape = Shape()

    def tokenize(self, prompts):
        ids = np.zeros((len(prompts), self.tokens), np.int32)
        for row, prompt in enumerate(prompts):
            letters = [ord(c) % 128 for c in prompt[: self.tokens]]
            ids[row, : len(letters)] = letters
        return (ids,)

    def embed(self, networks, tokens):
        return networks[TEXT].table[...][tokens[0]] * (tokens[0] > 0)[..., None]

    def velocity(self, networks, latents, timestep, text, *, adapters):
        return networks[POLICY](latents, timestep, text, adapters=adapters)

    def decode(self, networks, latents, *, chunked):
        large = jnp.repeat(jnp.repeat(latents, SIDE, 2), SIDE, 3)
        return jax.nn.sigmoid(networks[VAE].gain[...] * large)


def read(folder):
    """A family's `read`."""
    json.loads((Path(folder) / "transformer" / "config.json").read_text())
    return Shape()


def load(folder, *, mesh, tokens, dtype, key=None, **_):
    """A family's `load`."""
    seed = json.loads((Path(folder) / "transformer" / "config.json").read_text())["seed"]
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    networks = {
        POLICY: Denoiser(nnx.Rngs(seed)), TEXT: Words(nnx.Rngs(seed)), VAE: Enlarge()
    }  # fmt: skip
    for network in networks.values():
        nnx.update(network, jax.device_put(nnx.state(network), place))
    return Toy(networks, tokens)
