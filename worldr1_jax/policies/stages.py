"""Prompts to videos on a mesh: encode, camera, starting noise, rollout, decode.

Trainer, evaluation and generation share these stages, so that what is trained is what is sampled.
Every stage is compiled once per batch size; batches lie over the mesh's data and fsdp axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PRNGKeyArray

from worldr1_jax.camera import commands, noise_warp, trajectory
from worldr1_jax.camera.injection import Camera
from worldr1_jax.data.text_cache import TextCache
from worldr1_jax.mesh import arrays, compiler
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.models import umt5
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.policies.wan import Wan, tokenize
from worldr1_jax.rollout import sample as sampling
from worldr1_jax.rollout import unipc
from worldr1_jax.types import Trajectory

COLUMNS = ("videos", None, None, "columns", None)  # latents over the devices of their video
IDLE = ("text", "vae", "policy", "rewards")  # networks that may wait on the hosts


class TextStage:
    """Prompts to embeddings `[B N D]` float32 over the mesh, padded places at zero.

    Each different prompt is encoded once, for the members of a group share theirs, and every device
    takes `at_once` at a time: the encoder's memory depends on no batch size, and it is compiled
    once.
    """

    def __init__(
        self,
        encoder: umt5.UMT5Encoder,
        tokenizer: Any,
        tokens: int,
        mesh: jax.sharding.Mesh,
        *,
        at_once: int = 1,
    ):
        self._tokenizer, self._tokens, self._mesh = tokenizer, tokens, mesh
        self._at_once = at_once * sharding.batch_parts(mesh, "sequences")
        self._graph, self._state = nnx.split(encoder)
        self._run, self._members = jax.jit(self._embed), jax.jit(self._rows_of)

    def __call__(self, prompts: Sequence[str]) -> Float[Array, "B N D"]:
        """The embeddings.

        Raises:
          ValueError: a number of prompts that the mesh does not divide.
        """
        parts = sharding.batch_parts(self._mesh)
        if len(prompts) % parts:
            raise ValueError(f"there are {len(prompts)} prompts; the mesh splits them in {parts}")
        unique = list(dict.fromkeys(prompts))
        members = np.array([unique.index(prompt) for prompt in prompts])
        unique += [unique[-1]] * (-len(unique) % self._at_once)
        state, rows = arrays.awake(self._state), []
        with arrays.on(self._mesh):
            for first in range(0, len(unique), self._at_once):
                some = unique[first : first + self._at_once]
                chosen = tokenize(self._tokenizer, some, self._tokens)
                rows.append(self._run(state, *(placed(a, self._mesh, "sequences") for a in chosen)))
            return self._members(rows, members)

    def _embed(self, state, ids, mask):
        found = umt5.zero_padding(nnx.merge(self._graph, state)(ids, mask), mask)
        return sharding.constrain(found, "sequences", None, None)

    def _rows_of(self, rows, members):
        return sharding.constrain(jnp.concatenate(rows)[members], "videos", "words", None)


def placed(array: np.ndarray, mesh: jax.sharding.Mesh, *axes: str | None) -> Array:
    """A host array over the mesh, by what its first axes are (see `sharding.spec_for`)."""
    names = (*axes, *(None,) * (array.ndim - len(axes)))
    spec = sharding.spec_for(array.shape, names, mesh)
    return arrays.to_global(np.asarray(array), NamedSharding(mesh, spec))


class Pipeline:
    """The compiled stages of one model at one video size."""

    def __init__(
        self,
        wan: Wan,
        mesh: jax.sharding.Mesh,
        *,
        size: tuple[int, int, int],
        sigmas: Float[Array, " T+1"],
        camera: Camera,
        text_cache: TextCache | None = None,
        chunked_vae: bool = False,
        videos_at_once: int = 0,
    ):
        """Args: `size` is (frames, height, width) of the videos in pixels, `sigmas` the schedule;
        `text_cache` gives the embeddings in place of the text encoder; with `chunked_vae` videos
        are decoded by chunks of frames, in memory that does not grow with their number;
        `videos_at_once` are evaluated by a device at a time (0: all that it has)."""
        self.wan, self.mesh, self.size, self.camera = wan, mesh, size, camera
        self.latent_shape = latent_shape(wan.vae.config, wan.dit.config, size)
        parts: Any = nnx.split(wan.dit, nnx.LoRAParam, ...)
        self._graph, adapters, self.base = parts
        self._treedef = jax.tree.structure(adapters)
        self.adapters = nnx.to_pure_dict(adapters)
        self.sigmas = arrays.everywhere(sigmas, mesh)
        self._text_cache, self._chunked_vae = text_cache, chunked_vae
        if text_cache is None:
            if wan.text_encoder is None:
                raise ValueError("the model was loaded without text encoder: give a text_cache")
            self._text = TextStage(wan.text_encoder, wan.tokenizer, wan.tokens, mesh)
        self._at_once = videos_at_once
        self._vae_graph, self._vae_state = nnx.split(wan.vae)
        self._decode = compiler.Jit(self._decode_latents, mesh, convolutions=True)
        self._rollout = compiler.Jit(
            self._rollout_batch, mesh, static_argnames=("sampler", "width")
        )  # fmt: skip

    def velocity(self, adapters, base, latents, timestep, text, adapters_on: bool = True) -> Array:
        """The one forward that rollout and update share."""
        # What rests over the devices of a video comes together: little, next to the forward.
        latents = sharding.constrain(latents, "videos", None, None, None, None)
        text = sharding.constrain(text, "videos", None, None)
        state = jax.tree.unflatten(self._treedef, jax.tree.leaves(adapters))
        dit = nnx.merge(self._graph, state, base)
        return dit(latents, timestep, text, adapters=adapters_on)

    def encode(self, prompts: Sequence[str]) -> Float[Array, "B N D"]:
        """Text embeddings with padded places at zero, over the mesh."""
        if self._text_cache is not None:
            rows = self._text_cache(prompts).astype(np.float32)
            return placed(rows, self.mesh, "videos", "words")
        return self._text(prompts)

    def encode_one(self, prompt: str) -> Float[Array, "N D"]:
        """One embedding that every device holds, for the negative prompt."""
        parts = sharding.batch_parts(self.mesh)
        row = self.encode([prompt] * parts)[0]
        return jax.device_put(row, arrays.replicated(self.mesh))

    def paths(self, prompts: Sequence[str]) -> Float[np.ndarray, "B F 4 4"]:
        """The camera path that each prompt asks for."""
        known: dict[tuple[commands.Move, ...], np.ndarray] = {}
        for moves in {commands.moves(p) for p in prompts}:
            known[moves] = np.asarray(
                trajectory.path(moves, self.size[0], magnitudes=self.camera.magnitudes), np.float32
            )
        return np.stack([known[commands.moves(p)] for p in prompts])

    def rollout(
        self,
        adapters: Any,
        text: Float[Array, "B N D"],
        paths: Float[np.ndarray, "B F 4 4"],
        keys: PRNGKeyArray,
        *,
        sampler: sampling.Sampler,
        text_null: Float[Array, "N D"] | None = None,
        start: int | Array = 0,  # of all videos, or of each
        width: int = 0,
        solver: unipc.UniPC | None = None,
        noise: Float[np.ndarray, "B f h w C"] | None = None,
    ) -> Trajectory:
        """Samples latents: one key a video; the window of `width` steps from `start` is stochastic
        and kept.

        Args:
          solver: UniPC (`unipc.make`) with its own steps and shift, for a sampler without window;
            by default Euler and stochastic steps on the pipeline's sigmas.
          noise: plain starting noise, unit variance, in place of what the keys draw; the camera
            enters it alike.

        Raises:
          ValueError: noise of another shape, or what `sample` refuses, such as UniPC with camera
            mode "step".
        """
        shape = (len(paths), *self.latent_shape)
        if noise is not None and noise.shape != shape:
            raise ValueError(f"noise is {list(noise.shape)}: these videos need {list(shape)}")
        keys = arrays.keys_to_global(keys, arrays.batched(self.mesh))
        asked = placed(paths, self.mesh, "videos")
        given = None if noise is None else placed(noise, self.mesh, "videos")
        with arrays.on(self.mesh):
            return self._rollout(
                adapters, arrays.awake(self.base), text, text_null, asked, keys,
                self._start(start), solver, given, sampler=sampler, width=width,
            )  # fmt: skip

    def _start(self, start) -> Array:
        """First steps of the windows: of all videos, or one each, over the mesh."""
        start = np.asarray(start, np.int32)
        return placed(start, self.mesh, "videos") if start.ndim else jnp.asarray(start)

    def decode(self, latents: Float[Array, "B f h w C"]) -> Float[Array, "B F H W 3"]:
        """Latents to videos in [0, 1]."""
        with arrays.on(self.mesh):
            return self._decode(arrays.awake(self._vae_state), latents)

    def _decode_latents(self, state, latents):
        return sampling.in_parts(
            partial(self._decode_part, state),
            sharding.turns(self.mesh, len(latents), self._at_once),
        )(latents)

    def _rollout_batch(
        self, adapters, base, text, text_null, paths, keys, start, solver, noise, *, sampler, width
    ):
        noise_keys, warp_keys, step_keys = (
            jax.vmap(partial(jax.random.fold_in, data=i))(keys) for i in range(3)
        )
        plain = noise
        if plain is None:
            plain = jax.vmap(lambda key: jax.random.normal(key, self.latent_shape))(noise_keys)
        noise, on_step = plain, None
        if self.camera.mode != "none":
            warped = self._warp(warp_keys, paths)
        if self.camera.mode == "initial":
            noise = noise_warp.inject(plain, warped, self.camera.strength)
        elif self.camera.mode == "step":
            on_step = partial(self._add_delta, warped=warped, plain=plain)
        velocity = sampling.in_parts(
            partial(self.velocity, adapters, base),
            sharding.turns(self.mesh, len(paths), self._at_once),
        )
        found = sampling.sample(
            velocity, step_keys, noise,
            jnp.asarray(self.sigmas) if solver is None else solver, text, text_null,
            sampler=sampler, window=(start, width), on_step=on_step,
        )  # fmt: skip
        # They rest until the update, over all devices that share a video.
        states = sharding.constrain(found.window_latents, None, *COLUMNS)
        latents = sharding.constrain(found.latents, *COLUMNS)
        return dataclasses.replace(found, latents=latents, window_latents=states)

    def _decode_part(self, state, latents):
        # The VAE's convolutions then exchange the columns at their edges; devices that share a
        # video would all do the same work otherwise.
        latents = sharding.constrain(latents, *COLUMNS)
        return nnx.merge(self._vae_graph, state).decode(latents, chunked=self._chunked_vae)

    def _add_delta(self, latents, step, *, warped, plain):
        return noise_warp.step_delta(
            latents, warped, step, noise=plain, strength=self.camera.strength
        )

    def _warp(self, keys, paths):
        """One video after the other, which bounds the memory of the warp."""
        warp = partial(
            noise_warp.warp_batch, latent_shape=self.latent_shape,
            flow_scale=self.camera.flow_scale, degradation=self.camera.degradation,
            depth=self.camera.magnitudes.scene_depth,
        )  # fmt: skip
        return arrays.each_device(warp)(keys, paths)


def latent_shape(
    vae: wan_vae.Config, dit: wan_dit.Config, size: tuple[int, int, int]
) -> tuple[int, int, int, int]:
    """(f, h, w, C) of the latents of a video of (frames, height, width) pixels.

    Raises:
      ValueError: a size that the VAE's compression and the DiT's patch do not divide.
    """
    frames, height, width = size
    space, time = vae.spatial_compression, vae.temporal_compression
    if frames < 1 or (frames - 1) % time:
        raise ValueError(f"frames is {frames}: it has to be 1 + {time} k, such as {1 + 4 * time}")
    sides = (("height", height, dit.patch_size[1]), ("width", width, dit.patch_size[2]))
    for name, value, patch in sides:
        unit = space * patch
        if value < unit or value % unit:
            raise ValueError(
                f"{name} is {value}: it has to be a multiple of {unit} (VAE times patch)"
            )
    return 1 + (frames - 1) // time, height // space, width // space, vae.z_dim
