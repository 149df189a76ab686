"""Rewards on a mesh: loaded, compiled by stages, and summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.mesh import arrays, compiler
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import lpips as perceptual
from worldr1_jax.models.da3 import model as depth_anything
from worldr1_jax.nano import palette as general
from worldr1_jax.rewards import combine, consistency, recon, reconstruct, released, thin, trajectory
from worldr1_jax.timing import StageTimer
from worldr1_jax.types import Reconstruction, Scores
from worldr1_jax.weights.convert import read_config
from worldr1_jax.weights.shipped import resolve

NEEDS_3D = ("recon", "trajectory")
NAMES = (*NEEDS_3D, "general")
MODES = ("paper", "released")
# (what stands for some videos, such as latents [b ...], their places in the batch [b]) -> videos
Decode = Callable[[Array, np.ndarray], Array]


def build(
    weights: Mapping[str, float],
    *,
    da3: str | Path = "nano",
    lpips: str | Path | None = None,
    mode: str = "paper",
    mesh: jax.sharding.Mesh | None = None,
    frame_stride: int = 1,
    views: int | None = None,
    depth_scale: float = 1.0,
    change_floor: float = 0.0,
    change_min: float = 0.0,
    texture_min: float = recon.TEXTURE_MIN,
    gaussian_frames: int | None = None,
    videos_at_once: int = 0,
    idle_on_host: bool = False,
    dtype: Any = "float32",
) -> Reward:
    """Loads what the named rewards need onto the mesh.

    Args:
      weights: reward -> weight in the sum; a weight of 0 keeps the part as a measurement only.
      da3: folder of a Depth Anything 3 with Gaussian head, or "nano" for the one that ships with
        the package.
      lpips: folder of LPIPS, S_recon's measure at full size; None takes SSIM, for nano's 64 pixels.
      mode: "paper", or "released" for S_traj by the formula of World-R1's code.
      mesh: videos are split over its data and fsdp axes; None uses one device.
      frame_stride: the 3D network sees every so many frames.
      views: S_recon renders at most so many frames again, evenly spaced; None takes all that were
        reconstructed.
      depth_scale: typical depth in the 3D network's units (see `trajectory.s_traj`).
      change_floor, change_min, texture_min: what S_recon asks of a video besides likeness (see
        `recon.s_recon`); 0 nothing.
      gaussian_frames: render the Gaussians of at most so many frames (see `thin`); None takes all.
      videos_at_once: that a device scores at a time, which bounds memory; 0: all that it has.
      idle_on_host: the networks wait in the hosts' memory while no video is scored.
      dtype: of the products in the 3D network's backbone.

    Raises:
      ValueError: an unknown reward, or weights that cannot be read.
    """
    folder = check(weights, da3, mode)
    if mesh is None:
        mesh = make_mesh({"data": 1}, jax.devices()[:1])
    distance = None if lpips is None else perceptual.load(lpips, mesh=mesh)
    network = reconstruct.load(folder, mesh=mesh, dtype=dtype)
    for module in (network, distance):
        if idle_on_host and module is not None:
            arrays.rest(module)
    return Reward(
        dict(weights), network, mesh, frame_stride=frame_stride, views=views,
        depth_scale=depth_scale, distance=distance, mode=mode, gaussian_frames=gaussian_frames,
        videos_at_once=videos_at_once,
        asks={
            "change_floor": change_floor, "change_min": change_min, "texture_min": texture_min,
        },
    )  # fmt: skip


def check(weights: Mapping[str, float], da3: str | Path, mode: str = "paper") -> Path:
    """The folder of the 3D network; raises ValueError for an unknown reward or mode, no reward, no
    such network, or one without Gaussians."""
    if mode not in MODES:
        raise ValueError(f"rewards.mode is '{mode}': it is {' or '.join(MODES)}")
    unknown = [name for name in weights if name not in NAMES]
    if unknown:
        raise ValueError(f"rewards.weights names '{unknown[0]}': it knows {', '.join(NAMES)}")
    if not any(weights.values()):
        raise ValueError("rewards.weights are all 0: at least one reward has to count")
    folder = resolve(da3, "da3")
    network = depth_anything.Config.from_dict(read_config(folder))
    if network.gs_head is None:
        raise ValueError(
            f"rewards.da3 is '{da3}', a {network.model_name} without Gaussian head: S_recon needs "
            "one, as da3-giant has"
        )
    return folder


class Reward:
    """Scores videos. Stages are compiled apart, so that their times and their memory can be told
    apart."""

    def __init__(
        self,
        weights: dict[str, float],
        network: depth_anything.DA3,
        mesh: jax.sharding.Mesh,
        *,
        frame_stride: int,
        views: int | None,
        depth_scale: float,
        distance: perceptual.LPIPS | None,
        mode: str,
        asks: dict[str, float],
        gaussian_frames: int | None,
        videos_at_once: int,
    ):
        """Arguments as those of `build`, with the networks on the mesh."""
        self.weights, self.mesh, self.frame_stride = weights, mesh, frame_stride
        self._at_once = videos_at_once
        self._graph, self._state = nnx.split(network)
        self._reconstruct = compiler.Jit(self._reconstruct_videos, mesh, convolutions=True)
        halves: Any = (None, None) if distance is None else nnx.split(distance)
        self._lpips, self._lpips_state = halves
        self._views, self._depth_scale, self._mode = views, depth_scale, mode
        self._asks, self._gaussian_frames = asks, gaussian_frames
        on_tpu = mesh.devices.flat[0].platform == "tpu"
        self._renderer = "pallas" if on_tpu else "tiled"
        self._recon = compiler.Jit(self._recon_of_videos, mesh, convolutions=True)
        self._trajectory = jax.jit(self._trajectory_of_videos)
        self._masked = jax.jit(combine.masked)
        self._turn = jax.jit(self._turn_of, static_argnums=2)
        self._joined = jax.jit(self._join, out_shardings=arrays.batched(mesh))
        self._mvcs = jax.jit(consistency.mvcs)
        self._palette = jax.jit(general.palette)

    def __call__(
        self,
        videos: Float[Array, "B F H W 3"],
        prompts: Sequence[str],
        camtoworld: Float[np.ndarray, "B F 4 4"],
        *,
        decode: Decode | None = None,
        off: Sequence[str] = (),
        consistency: bool = False,
        timer: StageTimer | None = None,
    ) -> Scores:
        """Parts, weighted sum and validity of a batch whose size the mesh divides.

        With `decode`, `videos` are what it makes videos of, such as latents `[B ...]`, and no more
        videos exist than are scored at a time. Rewards in `off` do not count, and when both 3D
        rewards are off, no reconstruction is made. With `consistency`, "mvcs" is measured beside
        the rewards; it counts in none. A `timer` is told of the stages decode, reconstruct, render,
        consistency and general.

        Raises:
          ValueError: videos, prompts and paths that do not belong together, videos that are not
            floats, or so few frames that the 3D network would see no movement.
        """
        if decode is None:
            self._check_videos(videos, camtoworld)
        self._check_batch(videos.shape[0], prompts, camtoworld)
        turns = sharding.turns(self.mesh, len(prompts), self._at_once)
        stage = timer or StageTimer()
        geometric = not set(NEEDS_3D) <= set(off)
        network = arrays.awake(self._state) if geometric else None
        found = []
        for turn in range(turns):
            places = self._turn_of(np.arange(len(prompts)), turn, turns)
            some, paths = videos, camtoworld[places]
            if turns > 1:
                with arrays.on(self.mesh):
                    some = self._turn(videos, turn, turns)
            if decode is not None:
                with stage("decode") as wait_for:
                    some = wait_for(decode(some, places))
                self._check_videos(some, paths)
            of_some = [prompts[i] for i in places]
            found.append(self._parts(some, of_some, paths, network, consistency, stage))
        with arrays.on(self.mesh):
            parts = {name: self._joined([one[name] for one in found]) for name in found[0]}
        return self.combine(parts, off)

    def _parts(self, videos, prompts, camtoworld, network, consistency, stage) -> dict[str, Array]:
        """Every part of the reward; those in 3D with the state of the 3D network, if given."""
        parts: dict[str, Array] = {}
        if network is not None:
            with stage("reconstruct") as wait_for, arrays.on(self.mesh):
                found = wait_for(self._reconstruct(network, videos))
            with stage("render") as wait_for:
                parts |= wait_for(self.geometry(videos, found, camtoworld))
            if consistency:
                with stage("consistency") as wait_for:
                    measured = {"mvcs": wait_for(self.consistency(found))}
                parts |= self._where_shown(measured, parts)
        with stage("general") as wait_for:
            parts["general"] = wait_for(self.general(videos, prompts))
        return parts

    def _turn_of(self, batch: Any, turn: Any, turns: int) -> Any:
        """What a turn takes of a batch: an equal run of every device's samples."""
        devices = sharding.batch_parts(self.mesh)
        split = batch.reshape(devices, turns, -1, *batch.shape[1:])
        return split[:, turn].reshape(-1, *batch.shape[1:])

    def _join(self, turns: list[Array]) -> Array:
        """One value a sample from those of all turns."""
        devices = sharding.batch_parts(self.mesh)
        return jnp.concatenate([row.reshape(devices, -1) for row in turns], axis=1).reshape(-1)

    def _check_batch(self, count: int, prompts: Sequence[str], camtoworld: Any) -> None:
        if len(prompts) != count:
            raise ValueError(f"there are {count} videos and {len(prompts)} prompts: want as many")
        shape = camtoworld.shape
        if len(shape) != 4 or (shape[0], *shape[2:]) != (count, 4, 4):
            raise ValueError(
                f"camtoworld has the shape {shape}; {count} videos want {count} paths of 4x4 poses"
            )
        if shape[1] <= self.frame_stride:
            raise ValueError(
                f"videos have {shape[1]} frame(s), and with frame_stride {self.frame_stride} the "
                "3D network would see 1: a camera path needs 2"
            )
        parts = sharding.batch_parts(self.mesh)
        if count % parts:
            raise ValueError(f"there are {count} videos; the mesh splits them in {parts} parts")

    def _check_videos(self, videos: Any, camtoworld: Any) -> None:
        if len(videos.shape) != 5 or videos.shape[-1] != 3:
            raise ValueError(f"videos have the shape {videos.shape}; it has to be (B, F, H, W, 3)")
        if not jnp.issubdtype(videos.dtype, jnp.floating):
            raise ValueError(f"videos are {videos.dtype}: they have to be floats in [0, 1]")
        if videos.shape[:2] != camtoworld.shape[:2]:
            raise ValueError(
                f"camtoworld has the shape {camtoworld.shape}; {len(videos)} videos of "
                f"{videos.shape[1]} frames want {(*videos.shape[:2], 4, 4)}"
            )

    def reconstruct(self, videos: Float[Array, "B F H W 3"]) -> Reconstruction:
        """The 3D network's view of each video, with the Gaussians that are to be rendered."""
        with arrays.on(self.mesh):
            return self._reconstruct(arrays.awake(self._state), videos)

    def geometry(self, videos, found: Reconstruction, camtoworld) -> dict[str, Array]:
        """S_recon (PSNR and SSIM beside it) and S_traj (its factors and its errors beside it; NaN
        where a frame shows nothing, see `recon.BLANK`)."""
        asked = arrays.to_global(np.asarray(camtoworld, np.float32), arrays.batched(self.mesh))
        with arrays.on(self.mesh):
            lpips = arrays.awake(self._lpips_state)
            score, extra = self._recon(lpips, videos, found, asked)
            paths = self._trajectory(asked, found.camtoworld)
        return {"recon": score, **self._where_shown(paths, extra), **extra}

    def _where_shown(self, scores: dict[str, Array], parts: dict[str, Array]) -> dict[str, Array]:
        """The scores, NaN for videos with a frame that shows nothing."""
        with arrays.on(self.mesh):
            return self._masked(scores, parts["texture_least"] >= recon.BLANK)

    def consistency(self, found: Reconstruction) -> Array:
        """MVCS, a measure beside the rewards: see `consistency.mvcs`."""
        with arrays.on(self.mesh):
            return self._mvcs(found.depth, found.camtoworld, found.intrinsics)

    def general(self, videos, prompts: Sequence[str]) -> Array:
        """R_gen: see `general.palette`."""
        place = arrays.batched(self.mesh)
        colors, used = (arrays.to_global(a, place) for a in general.targets(prompts))
        with arrays.on(self.mesh):
            return self._palette(videos, colors, used)

    def combine(self, parts: dict[str, Array], off: Sequence[str] = ()) -> Scores:
        """The weighted sum of the parts that count."""
        weights = {name: 0.0 if name in off else weight for name, weight in self.weights.items()}
        with arrays.on(self.mesh):
            return combine.combine(parts, weights)

    def _recon_of_videos(self, lpips: Any, videos: Array, found: Reconstruction, asked: Array):
        seen = found.camtoworld.shape[1]
        views = None if self._views is None else min(self._views, seen)
        # Devices that hold the same videos take some views each.
        shared = tuple(name for name in ("context", "tensor") if self.mesh.shape[name] > 1)

        def own(lpips: Any, video: Array, found: Reconstruction, asked: Array):
            measure: Any = nnx.merge(self._lpips, lpips) if self._lpips else None
            return recon.s_recon(
                video[:, :: self.frame_stride], found, views=views, perceptual=measure,
                moves=trajectory.moves(asked), method=self._renderer, shared=shared, **self._asks,
            )  # fmt: skip

        return arrays.each_device(own, whole=1)(lpips, videos, found, asked)

    def _trajectory_of_videos(self, asked: Array, found: Array) -> dict[str, Array]:
        asked = asked[:, :: self.frame_stride]
        factors = trajectory.parts(asked, found, depth_scale=self._depth_scale)
        if self._mode == "released":
            score = released.s_traj(asked, found)
        else:
            score = trajectory.s_traj(asked, found, depth_scale=self._depth_scale)
        return {
            "trajectory": score,
            **{f"trajectory_{name}": value for name, value in factors.items()},
            **trajectory.errors(asked, found, depth_scale=self._depth_scale),
        }

    def _reconstruct_videos(self, state: Any, videos: Array) -> Reconstruction:
        network: Any = nnx.merge(self._graph, state)
        found = reconstruct.reconstruct(network, videos, frame_stride=self.frame_stride)
        return thin.by_frames(found, self._gaussian_frames)
