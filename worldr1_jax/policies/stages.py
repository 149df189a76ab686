"""Prompts to videos on a mesh: encode, camera, starting noise, rollout, decode.

Trainer, evaluation and generation share these stages, so that what is trained is what is sampled.
Every stage is compiled once per batch size; batches lie over the mesh's data and fsdp axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
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
from worldr1_jax.fields import in_range, of_kind
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.compiler import Jit, Program
from worldr1_jax.policies.base import POLICY, TEXT, VAE, Policy
from worldr1_jax.rollout import sample as sampling
from worldr1_jax.rollout import schedule, unipc
from worldr1_jax.timing import StageTimer
from worldr1_jax.types import Trajectory

COLUMNS = ("videos", None, None, "columns", None)  # latents over the devices of their video


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How videos are sampled; the fields are `sample` of the config.

    Attributes:
      steps: T, of the schedule.
      shift: of the schedule; Wan at 480p 3, at 720p 5.
      guidance: of classifier-free guidance; 1 is off.
      negative_prompt: what guidance leads away from.
      videos_at_once: that a device samples, decodes or scores at a time; 0: all that it has.
    """

    steps: int = 50
    shift: float = 3.0
    guidance: float = 5.0
    negative_prompt: str = ""
    videos_at_once: int = 0

    def __post_init__(self) -> None:
        in_range(
            self, steps=(2, 10_000), shift=(1e-3, 1e3), guidance=(0, 1e3), videos_at_once=(0, 10**6)
        )
        of_kind(self, str, "negative_prompt")

    def sigmas(self) -> Float[np.ndarray, " T+1"]:
        """The schedule, on the host."""
        return np.asarray(schedule.sigmas(self.steps, self.shift))


@dataclasses.dataclass(frozen=True)
class Rolled:
    """Latents of a batch, and what they were made from."""

    prompts: Sequence[str]
    text: Float[Array, "B N D"]
    paths: Float[np.ndarray, "B F 4 4"]
    trajectory: Trajectory


class TextStage:
    """Prompts to embeddings `[B N D]` float32 over the mesh, padded places at zero.

    Each different prompt is encoded once, for the members of a group share theirs, and every device
    takes `at_once` at a time: the encoder's memory depends on no batch size, and it is compiled
    once.
    """

    def __init__(self, policy: Policy, mesh: jax.sharding.Mesh, *, at_once: int = 1):
        self._policy, self._mesh = policy, mesh
        self.at_once = at_once * sharding.batch_parts(mesh, "sequences")
        self._graph, self.state = nnx.split(policy.networks[TEXT])
        self.run, self._members = jax.jit(self._embed), jax.jit(self._rows_of)

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
        unique += [unique[-1]] * (-len(unique) % self.at_once)
        state, rows = arrays.awake(self.state), []
        with arrays.on(self._mesh):
            for first in range(0, len(unique), self.at_once):
                chosen = self._policy.tokenize(unique[first : first + self.at_once])
                rows.append(self.run(state, *(placed(a, self._mesh, "sequences") for a in chosen)))
            return self._members(rows, members)

    def _embed(self, state, *tokens):
        found = self._policy.embed({TEXT: nnx.merge(self._graph, state)}, tokens)
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
        policy: Policy,
        mesh: jax.sharding.Mesh,
        *,
        size: tuple[int, int, int],
        sampling: Sampling,
        camera: Camera,
        text_cache: TextCache | None = None,
        chunked_vae: bool = False,
    ):
        """Args: `size` is (frames, height, width) of the videos in pixels; `text_cache` gives the
        embeddings in place of the text encoder; with `chunked_vae` videos are decoded by chunks of
        frames, in memory that does not grow with their number."""
        self.policy, self.mesh, self.size, self.camera = policy, mesh, size, camera
        self.latent_shape = policy.shape.latents(size)
        parts: Any = nnx.split(policy.networks[POLICY], nnx.LoRAParam, ...)
        self._graph, adapters, self.base = parts
        self._treedef = jax.tree.structure(adapters)
        self.adapters = nnx.to_pure_dict(adapters)
        self.sampling = sampling
        self.sigmas = arrays.everywhere(sampling.sigmas(), mesh)
        self._text_cache, self._chunked_vae = text_cache, chunked_vae
        if text_cache is None:
            if TEXT not in policy.networks:
                raise ValueError("the model was loaded without text encoder: give a text_cache")
            self._text = TextStage(policy, mesh)
        self._at_once = sampling.videos_at_once
        self._vae_graph, self._vae_state = nnx.split(policy.networks[VAE])
        self._decode = Jit(self._decode_latents, mesh, convolutions=True)
        self._rollout = Jit(
            self._rollout_batch, mesh,
            static_argnames=("sampler", "width", "shared_by", "prefix"),
        )  # fmt: skip

    def velocity(self, adapters, base, latents, timestep, text, adapters_on: bool = True) -> Array:
        """The one forward that rollout and update share."""
        # What rests over the devices of a video comes together: little, next to the forward.
        latents = sharding.constrain(latents, "videos", None, None, None, None)
        text = sharding.constrain(text, "videos", None, None)
        state = jax.tree.unflatten(self._treedef, jax.tree.leaves(adapters))
        networks = {POLICY: nnx.merge(self._graph, state, base)}
        return self.policy.velocity(networks, latents, timestep, text, adapters=adapters_on)

    def encode(self, prompts: Sequence[str]) -> Float[Array, "B N D"]:
        """Text embeddings with padded places at zero, over the mesh."""
        if self._text_cache is not None:
            rows = self._text_cache(prompts).astype(np.float32)
            return placed(rows, self.mesh, "videos", "words")
        return self._text(prompts)

    def negative(self) -> Float[Array, "N D"]:
        """The embedding of the negative prompt."""
        return self.encode_one(self.sampling.negative_prompt)

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
                trajectory.path(moves, self.size[0], magnitudes=self.camera.units), np.float32
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
        shared_by: int = 1,
        prefix: bool = False,
        guidance: float | None = None,
    ) -> Trajectory:
        """Samples latents: one key a video; the window of `width` steps from `start` is stochastic
        and kept.

        Args:
          solver: UniPC (`unipc.make`) with its own steps and shift, for a sampler without window;
            by default Euler and stochastic steps on the pipeline's sigmas.
          noise: plain starting noise, unit variance, in place of what the keys draw; the camera
            enters it alike.
          shared_by: so many neighbours, of one prompt, start from one noise, warp included.
          prefix: and the steps before the window are taken once for all of them.
          guidance: in place of the sampler's; all values share one program.

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
                self._start(start), solver, given,
                None if guidance is None else jnp.float32(guidance), sampler=sampler, width=width,
                shared_by=shared_by, prefix=prefix,
            )  # fmt: skip

    def roll(
        self,
        adapters: Any,
        prompts: Sequence[str],
        keys: PRNGKeyArray,
        *,
        timer: StageTimer | None = None,
        **draw: Any,
    ) -> Rolled:
        """Text, camera paths and latents of a batch; `draw` are the keyword arguments of
        `rollout`."""
        with (timer or StageTimer())("rollout") as wait_for:
            text, paths = self.encode(prompts), self.paths(prompts)
            found = wait_for(self.rollout(adapters, text, paths, keys, **draw))
        return Rolled(prompts, text, paths, found)

    def _start(self, start) -> Array:
        """First steps of the windows: of all videos, or one each, over the mesh."""
        start = np.asarray(start, np.int32)
        return placed(start, self.mesh, "videos") if start.ndim else jnp.asarray(start)

    def decode(self, latents: Float[Array, "B f h w C"]) -> Float[Array, "B F H W 3"]:
        """Latents to videos in [0, 1]."""
        with arrays.on(self.mesh):
            return self._decode(arrays.awake(self._vae_state), latents)

    def held(self) -> dict[str, Any]:
        """States of the networks and the adapters, by the names of `policies.base`."""
        text = {} if self._text_cache is not None else {TEXT: self._text.state}
        return {**text, VAE: self._vae_state, POLICY: self.base, "adapters": self.adapters}

    def programs(self, shapes: Any, **draw: Any) -> Iterator[Program]:
        """The stages of one update; `shapes` (plan.programs.Shapes) describe what flows between
        them, `draw` is what `rollout` is given."""
        if self._text_cache is None:
            text = self._text
            yield Program(
                "text",
                lambda: text.run.trace(arrays.shapes(text.state), shapes.tokens, shapes.tokens),
                times=-(-shapes.groups // text.at_once),
            )  # fmt: skip
        yield Program("warp", lambda: jax.jit(self._warp).trace(shapes.keys, shapes.paths))
        work = self.policy.shape.work(self.size, shapes.text.shape[1])
        branches = 1 if shapes.null is None else 2
        yield Program(
            "rollout",
            lambda: self._rollout.trace(
                self.adapters, arrays.shapes(self.base), shapes.text, shapes.null, shapes.paths,
                shapes.keys, shapes.start, None, None, None, **draw,
            ),
            needed=shapes.steps * shapes.count * branches * (work.linear + work.scores),
        )  # fmt: skip
        yield Program(
            "decode",
            lambda: self._decode.trace(arrays.shapes(self._vae_state), shapes.some_latents),
            times=shapes.turns,
        )  # fmt: skip

    def _decode_latents(self, state, latents):
        return sampling.in_parts(
            partial(self._decode_part, state),
            sharding.turns(self.mesh, len(latents), self._at_once),
        )(latents)

    def _rollout_batch(
        self, adapters, base, text, text_null, paths, keys, start, solver, noise, guidance, *,
        sampler, width, shared_by=1, prefix=False,
    ):  # fmt: skip
        noise_keys, warp_keys, step_keys = (
            jax.vmap(partial(jax.random.fold_in, data=i))(keys) for i in range(3)
        )
        if shared_by > 1:
            noise_keys, warp_keys = (
                jnp.repeat(k[::shared_by], shared_by) for k in (noise_keys, warp_keys)
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
            # The warp of a still camera is noise of its own, which would flicker in the video.
            still = jnp.all(paths == paths[:, :1], axis=(1, 2, 3))
            on_step = partial(self._add_delta, warped=warped, plain=plain, still=still)

        def velocity(latents, *inputs):
            turns = sharding.turns(self.mesh, len(latents), self._at_once)
            network = partial(self.velocity, adapters, base)
            return sampling.in_parts(network, turns)(latents, *inputs)

        found = sampling.sample(
            velocity, step_keys, noise,
            jnp.asarray(self.sigmas) if solver is None else solver, text, text_null,
            sampler=sampler, window=(start, width), on_step=on_step,
            shared_by=shared_by if prefix else 1, guidance=guidance,
        )  # fmt: skip
        # They rest until the update, over all devices that share a video.
        states = sharding.constrain(found.window_latents, None, *COLUMNS)
        latents = sharding.constrain(found.latents, *COLUMNS)
        return dataclasses.replace(found, latents=latents, window_latents=states)

    def _decode_part(self, state, latents):
        # The VAE's convolutions then exchange the columns at their edges; devices that share a
        # video would all do the same work otherwise.
        latents = sharding.constrain(latents, *COLUMNS)
        networks = {VAE: nnx.merge(self._vae_graph, state)}
        return self.policy.decode(networks, latents, chunked=self._chunked_vae)

    def _add_delta(self, latents, step, *, warped, plain, still):
        moved = noise_warp.step_delta(
            latents, warped, step, noise=plain, strength=self.camera.strength
        )
        return jnp.where(still[:, None, None, None, None], latents, moved)

    def _warp(self, keys, paths):
        """One video after the other, which bounds the memory of the warp."""
        warp = partial(
            noise_warp.warp_batch, latent_shape=self.latent_shape,
            flow_scale=self.camera.flow_scale, degradation=self.camera.degradation,
            depth=self.camera.units.scene_depth,
        )  # fmt: skip
        return arrays.each_device(warp)(keys, paths)
