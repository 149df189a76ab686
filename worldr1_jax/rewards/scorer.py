"""Rewards on a mesh: loaded, compiled by stages, and summed; `Scorer.score` is the same as one pure
function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from worldr1_jax.data.prompts import check_texts
from worldr1_jax.files import short
from worldr1_jax.geometry import are_rigid
from worldr1_jax.mesh import arrays, placement
from worldr1_jax.mesh.compiler import Jit, Program
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.rewards import combine
from worldr1_jax.rewards.base import Evidence, Parts, check_range
from worldr1_jax.rewards.choice import GENERAL, RECONSTRUCT, Choice, Named, choose
from worldr1_jax.rewards.function import HostFunction
from worldr1_jax.rewards.reconstruct import Reconstruct
from worldr1_jax.timing import StageTimer
from worldr1_jax.types import Scores

# (what stands for some videos, such as latents [b ...], their places in the batch [b]) -> videos
Decode = Callable[[Array, np.ndarray], Array]


def build(
    weights: Mapping[Named, float | None],
    *,
    general: str | Mapping[str, float] = "hps",
    reconstruct: Mapping[str, Any] | Reconstruct | None = None,
    mesh: jax.sharding.Mesh | None = None,
    videos_at_once: int = 0,
    idle_on_host: bool = False,
    dtype: Any = "float32",
    **sections: Mapping[str, Any],
) -> Scorer:
    """Loads what the named rewards need onto the mesh.

        build({"trajectory": 1.0, judge: 0.5}, reconstruct={"da3": "nano"})

    Args:
      weights: weight in the sum of each reward: a name of `base.REWARDS`, "general", a `Reward`,
        or a plain function (videos, prompts, camtoworld) -> [B] that is called on the host. A
        weight of 0 keeps the part as a measurement only; None leaves it out, as if not named.
      general: what "general" means: one reward, or several with their weights, averaged.
      reconstruct: fields of `Reconstruct`, which rewards look through in 3D.
      mesh: videos are split over its data and fsdp axes; None uses one device. On a mesh with other
        axes, weights and videos are whole on each device.
      videos_at_once: that a device scores at a time, which bounds memory; 0: all that it has.
      idle_on_host: the networks wait in the hosts' memory while no video is scored.
      dtype: of the products in the large networks.
      sections: fields of rewards, by their names.

    Raises:
      ValueError: an unknown reward or field, or weights that cannot be read.
    """
    choice = choose(weights, general=general, reconstruct=reconstruct, **sections)
    choice.check()
    return load(choice, mesh, videos_at_once=videos_at_once, idle_on_host=idle_on_host, dtype=dtype)


def load(
    choice: Choice,
    mesh: jax.sharding.Mesh | None = None,
    *,
    videos_at_once: int = 0,
    idle_on_host: bool = False,
    dtype: Any = "float32",
) -> Scorer:
    """A scorer of rewards that are chosen and checked; arguments as those of `build`."""
    if mesh is None:
        mesh = make_mesh({"data": 1}, jax.devices()[:1])
    networks = {name: reward.networks(mesh, dtype) for name, reward in choice.rewards.items()}
    if choice.needs():
        networks[RECONSTRUCT] = choice.reconstruct.networks(mesh, dtype)
    if idle_on_host:
        for network in jax.tree.leaves(networks, is_leaf=lambda x: isinstance(x, nnx.Module)):
            arrays.rest(network)
    return Scorer(choice, networks, mesh, videos_at_once=videos_at_once)


def described(choice: Choice, mesh: jax.sharding.Mesh, dtype: Any, **options: Any) -> Scorer:
    """A scorer whose networks are shapes on the mesh, at their published sizes; for plans."""
    networks = {name: reward.described(mesh, dtype) for name, reward in choice.rewards.items()}
    if choice.needs():
        networks[RECONSTRUCT] = choice.reconstruct.described(mesh, dtype)
    return Scorer(choice, networks, mesh, **options)


class Scorer:
    """Scores videos. Called, it takes them turn by turn through programs that are compiled apart,
    so that their times and their memory can be told apart; `score` is all of it as one function of
    arrays, for programs of users.

        reward = rewards.build({"trajectory": 1.0}, reconstruct={"da3": "nano"})
        scores = reward(videos, prompts, camtoworld)

        asked = reward.ask(prompts)
        loss = lambda videos: -reward.score(reward.networks, videos, camtoworld, asked).total.sum()
        jax.jit(jax.grad(loss))(videos)

    Attributes:
      networks: states of all networks, {reward: {network: state}}; a tree of arrays.
    """

    def __init__(
        self,
        choice: Choice,
        networks: Mapping[str, Mapping[str, nnx.Module]],
        mesh: jax.sharding.Mesh,
        *,
        videos_at_once: int = 0,
    ):
        """Arguments as those of `build`, with the networks on the mesh."""
        self.choice, self.mesh, self._at_once = choice, mesh, videos_at_once
        split = {
            name: {key: nnx.split(module) for key, module in own.items()}
            for name, own in networks.items()
        }
        self._graphs = {n: {k: v[0] for k, v in own.items()} for n, own in split.items()}
        self.networks = {n: {k: v[1] for k, v in own.items()} for n, own in split.items()}
        on_tpu = mesh.devices.flat[0].platform == "tpu"
        self._renderer = "pallas" if on_tpu else "tiled"
        self._look = Jit(self.evidence, mesh, convolutions=True, static_argnames="needs")
        self._parts = {
            name: Jit(partial(self._part, name), mesh, convolutions=True)
            for name, reward in choice.rewards.items()
            if not isinstance(reward, HostFunction)
        }
        self._combined = jax.jit(self.combine, static_argnames="off")
        self._turn = jax.jit(self._turn_of, static_argnums=2)
        self._joined = jax.jit(self._join, out_shardings=arrays.batched(mesh))

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each reward in the sum."""
        return self.choice.weights

    @property
    def frame_stride(self) -> int:
        """The 3D network sees every so many frames."""
        return self.choice.reconstruct.frame_stride

    # ---------------------------------------------------------------------- as a pure function

    def ask(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What the rewards want to know of the prompts, on the host: {reward: [B ...]}."""
        return {name: reward.ask(prompts) for name, reward in self.choice.rewards.items()}

    def score(
        self,
        networks: Any,
        videos: Float[Array, "B F H W 3"],
        camtoworld: Float[Array, "B F 4 4"],
        asked: Any,
        off: Sequence[str] = (),
    ) -> Scores:
        """Parts, weighted sum and validity; pure: jit, differentiate and batch it, on a mesh of any
        axis names, whose types are Auto.

        Args:
          networks: `self.networks`, or leaves like them.
          videos: in [0, 1].
          camtoworld: path asked for.
          asked: what `ask` gave.
          off: rewards that are left out.

        Raises:
          ValueError: a reward that is a plain function, which no program can hold; arrays that do
            not belong together, and, outside of a program, values that `__call__` refuses.
        """
        names = self._on(off)
        outside = [n for n in names if isinstance(self.choice.rewards[n], HostFunction)]
        if outside:
            raise ValueError(
                f"the reward {outside[0]} is a plain function: score calls none, turn it off"
            )
        self._check_videos(videos, camtoworld)
        check_range("videos", videos)
        _check_poses(camtoworld)
        _check_asked(names, asked, videos.shape[0])
        evidence = self.evidence(networks, videos, camtoworld, needs=self.choice.needs(names))
        parts: Parts = {}
        for name in names:
            parts |= self._part(name, networks[name], evidence, asked[name])
        return self.combine(parts, tuple(off))

    def evidence(
        self, networks: Any, videos: Array, camtoworld: Array, *, needs: str | None = None
    ) -> Evidence:
        """What the rewards look at, with a reconstruction if any needs one; pure."""
        needs = self.choice.needs() if needs is None else needs
        merged = self._merged(RECONSTRUCT, networks.get(RECONSTRUCT, {})) if needs else {}
        return self.choice.reconstruct.evidence(
            merged, videos, camtoworld, needs=needs, renderer=self._renderer
        )

    def combine(self, parts: Parts, off: Sequence[str] = ()) -> Scores:
        """The weighted sum of the parts that count, and R_gen as one part."""
        names = self._on(off)
        shares = {name: s for name, s in self.choice.general.items() if name in names}
        if shares:
            parts = parts | {GENERAL: _average(parts, shares)}
        return combine.combine(parts, {name: self.weights[name] for name in names})

    def _part(self, name: str, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        """One reward; NaN where the video is not finite, for not every reward would notice."""
        reward = self.choice.rewards[name]
        parts = reward.score(self._merged(name, networks), evidence, asked)
        sound = jnp.all(jnp.isfinite(evidence.videos), axis=(1, 2, 3, 4))
        return {key: jnp.where(sound, part, jnp.nan) for key, part in parts.items()}

    def _merged(self, name: str, states: Any) -> dict[str, Any]:
        return {key: nnx.merge(self._graphs[name][key], state) for key, state in states.items()}

    def _on(self, off: Sequence[str]) -> tuple[str, ...]:
        """Names of the rewards that are left when those of `off` are not asked."""
        out = {member for name in off for member in self.choice.members(name)}
        strange = sorted(out - self.choice.rewards.keys())
        if strange:
            raise ValueError(
                f"off names '{strange[0]}': the rewards are {', '.join(self.choice.rewards)}"
            )
        return tuple(name for name in self.choice.rewards if name not in out)

    # ------------------------------------------------------------------------- turn by turn

    def __call__(
        self,
        videos: Float[Array, "B F H W 3"],
        prompts: Sequence[str],
        camtoworld: Float[np.ndarray, "B F 4 4"],
        *,
        decode: Decode | None = None,
        off: Sequence[str] = (),
        timer: StageTimer | None = None,
        seen: Callable[[Evidence, np.ndarray], None] | None = None,
    ) -> Scores:
        """Parts, weighted sum and validity of a batch whose size the mesh divides.

        Args:
          videos: in [0, 1]; with `decode`, what it makes videos of, such as latents `[B ...]`, and
            no more videos exist than are scored at a time.
          prompts, camtoworld: of each video, what it was asked for.
          off: rewards that are neither measured nor counted; where none is left that needs it, no
            reconstruction is made.
          timer: is told of the stages decode, reconstruct, and one by each reward's name.
          seen: is given the evidence of each turn and its places in the batch.

        Raises:
          ValueError: videos, prompts and paths that do not belong together, videos that are not
            floats in [0, 1], paths that are not of rigid poses, so few frames that the 3D network
            would see no movement, or a name in `off` that is no reward.
        """
        if decode is None:
            self._check_videos(videos, camtoworld)
            check_range("videos", videos)
        self._check_batch(videos.shape[0], prompts, camtoworld)
        _check_poses(camtoworld)
        stage, names = timer or StageTimer(), self._on(off)
        turns = placement.turns(self.mesh, len(prompts), self._at_once)
        # The 3D network stays awake over all turns, the others while they are used.
        needs = self.choice.needs(names)
        network = {RECONSTRUCT: arrays.awake(self.networks[RECONSTRUCT])} if needs else {}
        found = []
        for turn in range(turns):
            places = self._turn_of(np.arange(len(prompts)), turn, turns)
            some = videos
            if turns > 1:
                with arrays.on(self.mesh):
                    some = self._turn(videos, turn, turns)
            if decode is not None:
                with stage("decode") as wait_for:
                    some = wait_for(decode(some, places))
                self._check_videos(some, camtoworld[places])
                check_range("videos", some)
            with stage(RECONSTRUCT) as wait_for:
                evidence = wait_for(self._see(network, some, camtoworld[places], needs))
            if seen is not None:
                seen(evidence, places)
            found.append(self._measured(names, evidence, [prompts[i] for i in places], stage))
        with arrays.on(self.mesh):
            parts = {name: self._joined([one[name] for one in found]) for name in found[0]}
            return self._combined(parts, off=tuple(off))

    def look(
        self, videos: Float[Array, "B F H W 3"], camtoworld: Float[np.ndarray, "B F 4 4"]
    ) -> Evidence:
        """The evidence of videos, compiled."""
        needs = self.choice.needs()
        network = {RECONSTRUCT: arrays.awake(self.networks[RECONSTRUCT])} if needs else {}
        return self._see(network, videos, camtoworld, needs)

    def measure(self, evidence: Evidence, prompts: Sequence[str]) -> Parts:
        """Every part of what is seen in `evidence`, compiled."""
        return self._measured(self._on(()), evidence, prompts, StageTimer())

    def programs(self, shapes: Any) -> Iterator[Program]:
        """The stages of one turn of training, which measures what counts; `shapes`
        (plan.programs.Shapes) describe what it is given."""
        names = self._on(self.choice.measured())
        needs = self.choice.needs(names)
        networks = arrays.shapes(self.networks)
        network = {RECONSTRUCT: networks[RECONSTRUCT]} if needs else {}
        if needs:
            yield Program(
                RECONSTRUCT,
                lambda: self._look.trace(network, shapes.some, shapes.asked, needs=needs),
                needed=self.choice.reconstruct.flops(shapes.some), times=shapes.turns,
            )  # fmt: skip
        # Shaped here, where no mesh is set: networks make constants, and described devices hold
        # none.
        made = jax.eval_shape(
            partial(self.evidence, needs=needs), network, shapes.some, shapes.asked
        )
        evidence = jax.tree.map(shapes.batched, made)
        for name in names:
            asked = jax.tree.map(
                shapes.batched, self.choice.rewards[name].ask(["A scene."] * len(shapes.some))
            )
            yield Program(
                name, partial(self._parts[name].trace, networks[name], evidence, asked),
                times=shapes.turns, inputs=evidence,
            )  # fmt: skip

    def _see(self, network: Any, videos: Array, camtoworld: np.ndarray, needs: str) -> Evidence:
        asked = arrays.to_global(np.asarray(camtoworld, np.float32), arrays.batched(self.mesh))
        with arrays.on(self.mesh):
            return self._look(network, videos, asked, needs=needs)

    def _measured(
        self, names: Sequence[str], evidence: Evidence, prompts: Sequence[str], stage: StageTimer
    ) -> Parts:
        parts: Parts = {}
        place = arrays.batched(self.mesh)
        for name in names:
            reward = self.choice.rewards[name]
            with stage(name) as wait_for:
                if isinstance(reward, HostFunction):
                    videos, asked = (arrays.to_host(x) for x in (evidence.videos, evidence.asked))
                    parts[name] = arrays.to_global(reward.call(videos, prompts, asked), place)
                    continue
                wanted = jax.tree.map(
                    partial(arrays.to_global, sharding=place), reward.ask(prompts)
                )
                with arrays.on(self.mesh):
                    awake = arrays.awake(self.networks[name])
                    parts |= wait_for(self._parts[name](awake, evidence, wanted))
        return parts

    def _turn_of(self, batch: Any, turn: Any, turns: int) -> Any:
        """What a turn takes of a batch: an equal run of every device's samples."""
        devices = placement.batch_parts(self.mesh)
        split = batch.reshape(devices, turns, -1, *batch.shape[1:])
        return split[:, turn].reshape(-1, *batch.shape[1:])

    def _join(self, turns: list[Array]) -> Array:
        """One value a sample from those of all turns."""
        devices = placement.batch_parts(self.mesh)
        return jnp.concatenate([row.reshape(devices, -1) for row in turns], axis=1).reshape(-1)

    # ---------------------------------------------------------------------------- checks

    def _check_batch(self, count: int, prompts: Sequence[str], camtoworld: Any) -> None:
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts are {short(repr(prompts))}: they have to be a list of texts")
        check_texts(prompts)
        if len(prompts) != count:
            raise ValueError(f"there are {count} videos and {len(prompts)} prompts: want as many")
        shape = camtoworld.shape
        if len(shape) != 4 or (shape[0], *shape[2:]) != (count, 4, 4):
            raise ValueError(
                f"camtoworld has the shape {shape}; {count} videos want {count} paths of 4x4 poses"
            )
        parts = placement.batch_parts(self.mesh)
        if count % parts:
            raise ValueError(f"there are {count} videos; the mesh splits them in {parts} parts")

    def _check_videos(self, videos: Any, camtoworld: Any) -> None:
        _check_arrays(videos=videos, camtoworld=camtoworld)
        if len(videos.shape) != 5 or videos.shape[-1] != 3:
            raise ValueError(f"videos have the shape {videos.shape}; it has to be (B, F, H, W, 3)")
        if 0 in videos.shape:
            raise ValueError(f"videos have the shape {videos.shape}: there is nothing to score")
        frames = (videos.shape[0], videos.shape[1])
        if camtoworld.shape != (*frames, 4, 4):
            raise ValueError(
                f"camtoworld has the shape {camtoworld.shape}; {frames[0]} videos of {frames[1]} "
                f"frames want {(*frames, 4, 4)}"
            )
        if self.choice.needs() and frames[1] <= self.frame_stride:
            raise ValueError(
                f"videos have {frames[1]} frame(s), and with frame_stride {self.frame_stride} the "
                "3D network would see 1: a camera path needs 2"
            )


def _check_arrays(**given: Any) -> None:
    """Raises ValueError for lists and tensors of torch, whose values mean the same."""
    for name, value in given.items():
        if not isinstance(value, np.ndarray | jax.Array):
            kind = type(value).__name__
            raise ValueError(f"{name} is a {kind}: it has to be an array of numpy or jax")


def _check_poses(camtoworld: Any) -> None:
    """Raises ValueError for matrices that are no rigid poses, such as transposed or scaled ones.
    Whether they are camtoworld or its inverse does not show."""
    if isinstance(camtoworld, jax.core.Tracer):
        return
    poses = camtoworld if isinstance(camtoworld, np.ndarray) else arrays.to_host(camtoworld)
    if not are_rigid(np.asarray(poses, np.float64)):
        raise ValueError(
            "camtoworld has a matrix that is no pose: it has to be [[R, t], [0 0 0 1]] with R a "
            "rotation and all numbers finite"
        )


def _check_asked(names: Sequence[str], asked: Mapping[str, Any], count: int) -> None:
    """Raises ValueError for what `ask` gave of other rewards or of another number of prompts."""
    for name in names:
        if name not in asked:
            raise ValueError(f"asked lacks the reward '{name}': it is what ask(prompts) gives")
        for leaf in jax.tree.leaves(asked[name]):
            if np.shape(leaf)[:1] != (count,):
                raise ValueError(
                    f"asked is of {list(np.shape(leaf)[:1])} prompts and there are {count} videos: "
                    "want as many"
                )


def _average(parts: Parts, shares: Mapping[str, float]) -> Array:
    return jnp.sum(jnp.stack([share * parts[name] for name, share in shares.items()]), axis=0)
