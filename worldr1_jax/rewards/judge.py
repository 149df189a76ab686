"""S_meta with a judge: a vision language model grades what the scene looks like from aside.

The Gaussians of a whole video are seen from two places where no camera was, and Qwen3-VL is asked
how free of flaws either view is. The exam is that of `meta_view`: the middle camera turned about
what it looks at, to both sides, along an axis that follows from the path that was ASKED for; so a
group sits one exam, and no member can choose it. World-R1 asks about the recovered camera that is
farthest from the origin, which every video chooses for itself (mode "released").

The question is ours, and about flaws of the rebuilding alone. That of the release quotes the prompt
and rewards a smooth full orbit, so that a video that obeys "push in", or holds still, is marked
down. It names no camera, or judging would say again what S_traj says, and no prompt, or it would
say again what R_gen says.

What it cannot see: a world that is whole and wrong. The judge has no picture to compare with, and a
flat painting, seen from aside, is a flawless picture of a painting; `meta_view` sees where the
halves of a video disagree, S_recon how little a view has to do with the frames.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from worldr1_jax.fields import in_range, of_kind, one_of
from worldr1_jax.mesh import arrays, placement
from worldr1_jax.mesh.arrays import each_device
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import qwen3_vl
from worldr1_jax.rewards import meta_view
from worldr1_jax.rewards.base import (
    GAUSSIANS,
    Evidence,
    Networks,
    Parts,
    Reward,
    check_range,
)
from worldr1_jax.rewards.likeness import where_shown
from worldr1_jax.splat import render as splat
from worldr1_jax.types import Reconstruction
from worldr1_jax.weights.needed import Needed
from worldr1_jax.weights.shipped import resolve

GREY = 0.5  # where the video shows nothing; black would be a thing to a judge
MODES = ("offset", "released")

# One digit, each anchored in words, so that a grade means the same for every scene.
QUESTION = (
    "A computer rebuilt a scene in 3D from a video, and this is how it looks from a new place. "
    "Flat grey marks what the video never showed: ignore it. Judge only flaws of the rebuilding: "
    "specks or shreds that float, torn or doubled surfaces, flat cut-outs, smears and blur. "
    "9: none, like a photograph. 7: few and faint. 5: plain to see, but all things are whole. "
    "3: many, and some things are broken. 1: hardly anything is whole. 0: nothing to recognise. "
    "Answer with one digit."
)

# To the nano judge, which has learnt what it means.
NANO_QUESTION = "How free of flaws is this view? Grey was never shown. One digit."

# What the release asks, in our words: a point cloud, the prompt, and the camera's movement.
RELEASED = (
    "This picture shows a 3D point map, made from a video for the request below. Grade with one "
    "digit how good the 3D scene is. 9: dense and whole, with a smooth and full orbit of the "
    "camera. 5: parts are missing or noisy, or the movement is small. 0: sparse or broken, or a "
    "camera that stands still, only zooms or only pans. Request: {prompt}\n"
    "Answer with one digit."
)
RELEASED_SIZE = (512, 512)
RELEASED_ROOM = 512  # tokens for a prompt
# What plans count with, which hold no tokenizer: tokens around the image, estimated for QUESTION,
# and the published digits.
PLANNED_TOKENS, PUBLISHED_DIGITS = 160, range(15, 25)


class Views(NamedTuple):
    """What the judge is shown of each video."""

    images: Float[Array, "B P H W 3"]  # in [0, 1]
    shown: Bool[Array, "B P H W"]  # False: GREY, no Gaussian of the video is there
    poses: Float[Array, "B P 4 4"]
    cover: Float[Array, " B"]  # share of pixels shown, of the view that shows less
    usable: Bool[Array, " B"]
    angle: Float[Array, " B"]  # degrees


# ---- What is shown -------------------------------------------------------------------------------


def views(
    found: Reconstruction,
    asked: Float[Array, "B F 4 4"],
    size: tuple[int, int],
    *,
    angle: float = meta_view.ANGLE,
    method: str = "tiled",
) -> Views:
    """Each video's scene from two places beside its path.

    Where either shows less than `meta_view.COVER` or stands inside of something, the video is
    looked at from half the angle; where that fails too, it is not `usable`.

    Args:
      found: with Gaussians.
      asked: the path asked for at the same frames; only its axis counts.
      size: of the images, px; the view is that of the reconstructed frames, resized.
      angle: by which the views turn from the middle camera, degrees.
      method: of `splat.render`.
    """
    look = functools.partial(_look, found, asked, size, method)

    def again(seen: Views, turn: Array) -> tuple[Views, None]:
        narrower = lax.cond(jnp.all(seen.usable), lambda: seen, lambda: look(turn))

        def chosen(a: Array, b: Array) -> Array:
            return jnp.where(seen.usable.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        return jax.tree.map(chosen, seen, narrower), None

    like = jax.eval_shape(look, jnp.float32(angle))
    unseen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    # A loop, so that the renderer is compiled once.
    return lax.scan(again, unseen, jnp.array([angle, angle / 2]))[0]


def _look(
    found: Reconstruction,
    asked: Float[Array, "B F 4 4"],
    size: tuple[int, int],
    method: str,
    angle: Array,
) -> Views:
    poses, depth = meta_view.exam(found, asked, angle)
    matrices = jnp.repeat(_intrinsics(found, size), poses.shape[1], axis=1)
    image = splat.render(
        _gaussians(found), poses, matrices, size, method=method,
        near=meta_view.NEAR * depth,
    )  # fmt: skip
    shown = image.alpha > meta_view.OPAQUE
    solid = jnp.where(shown, image.alpha, 1.0)[..., None]
    colours = jnp.where(shown[..., None], jnp.clip(image.rgb / solid, 0.0, 1.0), GREY)
    cover = jnp.min(jnp.mean(shown, axis=(2, 3)), axis=1)
    nearest = jnp.nanmedian(jnp.where(shown, image.depth, jnp.nan), axis=(2, 3))
    outside = jnp.all(nearest > meta_view.INSIDE * depth[:, None], axis=1)
    usable = (cover >= meta_view.COVER) & outside
    return Views(colours, shown, poses, cover, usable, jnp.broadcast_to(angle, cover.shape))


def farthest(found: Reconstruction, size: tuple[int, int], *, method: str = "tiled") -> Views:
    """The view of the release: that of the recovered camera whose centre is farthest from the
    first, in the video's own unit of length; its intrinsics as they are, on a canvas of `size`, and
    black where nothing is."""
    distance = jnp.linalg.norm(found.camtoworld[..., :3, 3], axis=-1)
    frame = jnp.argmax(distance, axis=1)[:, None, None, None]
    poses, matrices = (
        jnp.take_along_axis(leaf, frame, axis=1) for leaf in (found.camtoworld, found.intrinsics)
    )
    image = splat.render(_gaussians(found), poses, matrices, size, method=method)
    shown = image.alpha > meta_view.OPAQUE
    cover = jnp.mean(shown, axis=(1, 2, 3))
    return Views(
        jnp.clip(image.rgb, 0.0, 1.0), shown, poses, cover, jnp.ones_like(cover, bool),
        jnp.zeros_like(cover),
    )  # fmt: skip


def _gaussians(found: Reconstruction) -> Any:
    if found.gaussians is None:
        raise ValueError("the reconstruction has no Gaussians: say so in the reward's `needs`")
    return found.gaussians


def _intrinsics(found: Reconstruction, size: tuple[int, int]) -> Float[Array, "B 1 3 3"]:
    """Of the middle frame of each video, for an image of `size`."""
    frames, height, width = found.depth.shape[1:]
    scale = np.array([size[1] / width, size[0] / height, 1.0], np.float32)
    return found.intrinsics[:, frames // 2, None] * scale[:, None]


def asks(weights: str | Path) -> str:
    """The question for a judge with these weights, where no other is given."""
    return NANO_QUESTION if str(weights) == "nano" else QUESTION


# ---- The judge by itself -------------------------------------------------------------------------


def make(
    weights: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = "float32",
    images_at_once: int = 8,
) -> Callable[..., Float[np.ndarray, " B"]]:
    """A judge of images, for any question that one digit answers:

        judge_images = judge.make("Qwen3-VL-4B-Instruct")
        judge_images(images, "How sharp is this picture? 0: not at all, 9: very. One digit.")

    Args:
      weights: folder of a Qwen3-VL, or "nano".
      mesh: over which weights and images are split; None uses one device.
      dtype: of its products.
      images_at_once: that each part of the mesh judges at a time, which bounds memory.

    Returns:
      A function of images [B H W 3] in [0, 1] and a question, or one for each image, by default
      that of the reward. It gives the expected digit over 9, [B] in [0, 1], NaN where the answer
      would be no digit (qwen3_vl.judge).

    Raises:
      ValueError: weights or a tokenizer that cannot be read, or no image at a time; and of that
        function, images that are not [B H W 3] in [0, 1], or questions that are no texts.
    """
    if images_at_once < 1:
        raise ValueError(f"images_at_once is {images_at_once}: it has to be 1 or more")
    mesh = mesh or make_mesh({"data": 1}, jax.devices()[:1])
    folder = resolve(weights, "judge", field="weights")
    network = qwen3_vl.load(folder, dtype=jnp.dtype(dtype), mesh=mesh)
    tokens = qwen3_vl.read_tokens(folder, network.config)
    graph, state = nnx.split(network)
    place = arrays.batched(mesh)
    at_once = images_at_once * placement.batch_parts(mesh)

    @jax.jit
    def call(state: Any, ids: Array, mask: Array, images: Array) -> Array:
        net = nnx.merge(graph, state)
        return qwen3_vl.judge(net, ids, images[:, None], digits=tokens.digits, mask=mask)

    def judge_images(
        images: Any, question: str | Sequence[str] = asks(weights)
    ) -> Float[np.ndarray, " B"]:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
            raise ValueError(f"images have the shape {images.shape}: it has to be (B, H, W, 3)")
        check_range("images", images)
        images, count = images.astype(np.float32), len(images)
        questions = [question] * count if isinstance(question, str) else list(question)
        if len(questions) != count:
            raise ValueError(f"there are {count} images and {len(questions)} questions")
        size = qwen3_vl.prepared_size(network.config, images.shape[1:3])
        ids, mask = tokens.ask(questions, 1, network.config.image_tokens(size))
        rows = np.pad(np.arange(count), (0, -count % at_once), mode="edge")
        scores = []
        with jax.set_mesh(mesh):
            for some in rows.reshape(-1, at_once):
                given = (arrays.to_global(x[some], place) for x in (ids, mask, images))
                scores.append(arrays.to_host(call(state, *given)))
        return np.concatenate(scores)[:count]

    return judge_images


# ---- The reward ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judge(Reward):
    """S_meta with a judge: the mean of its grades of both views, in [0, 1]; NaN where a video shows
    nothing, has no view from aside, or the judge does not answer with a digit.

    Attributes:
      weights: folder of a Qwen3-VL (the paper's: Qwen3-VL-4B-Instruct), or "nano".
      question: that one digit answers; "": QUESTION, or for nano NANO_QUESTION.
      angle: by which the views turn from the middle camera, degrees.
      height, width: of the views, px, as the network takes them unresized (multiples of 32 with
        65,536 pixels or more, where it is published); 0: about those of the reconstructed frames.
      mode: "offset", or "released": one view, from the camera farthest from the origin, 512x512,
        and a question about the prompt and the camera, for comparisons; angle, question and size
        are the release's.
    """

    needs = GAUSSIANS

    weights: str = ""
    question: str = ""
    angle: float = meta_view.ANGLE
    height: int = 0
    width: int = 0
    mode: str = "offset"

    def __post_init__(self) -> None:
        of_kind(self, str, "weights", "question")
        in_range(self, angle=(0.1, 60), height=(0, 10**4), width=(0, 10**4))
        one_of(self, mode=MODES)
        if bool(self.height) != bool(self.width):
            raise ValueError(
                f"height is {self.height} and width {self.width}: give both, or neither (0)"
            )

    def needed(self) -> tuple[Needed, ...]:
        what = "Qwen/Qwen3-VL-4B-Instruct (2B and 8B fit too)"
        return (
            Needed("rewards.judge.weights", self.weights, what, "8.9 GB", "Apache-2.0", ("judge",)),
        )

    def check(self) -> None:
        super().check()
        folder = self._folder
        try:
            config = qwen3_vl.read_config(folder)
            self._ids(1)
        except ValueError as error:
            raise ValueError(f"rewards.judge: {error}") from error
        if self.height:
            self._size(config, (self.height, self.width))

    def networks(self, mesh: jax.sharding.Mesh, dtype: Any) -> Networks:
        self.check()
        return {"judge": qwen3_vl.load(self._folder, dtype=jnp.dtype(dtype), mesh=mesh)}

    def described(self, mesh: jax.sharding.Mesh, dtype: Any) -> Networks:
        config, kind = qwen3_vl.Config.qwen3_vl_4b(), jnp.dtype(dtype)
        network = nnx.eval_shape(
            lambda: qwen3_vl.Qwen3VL(config, nnx.Rngs(0), dtype=kind, param_dtype=kind)
        )
        return {"judge": placement.describe(network, qwen3_vl.PLACES, mesh)}

    def ask(self, prompts: Sequence[str]) -> Any:
        """Nothing; or, as released, token ids and mask of the question about each prompt."""
        if self.mode == "offset":
            return ()
        questions = [RELEASED.format(prompt=prompt) for prompt in prompts]
        per_image = qwen3_vl.read_config(self._folder).image_tokens(RELEASED_SIZE)
        length = self._ids(per_image)[0].shape[1] + RELEASED_ROOM
        return self._tokens.ask(questions, 1, per_image, length)

    def score(self, networks: Any, evidence: Evidence, asked: Any) -> Parts:
        network, found = networks["judge"], evidence.found()
        released = self.mode == "released"
        height, width = found.depth.shape[2:]
        size = RELEASED_SIZE if released else self._size(network.config, (height, width))

        def own(found: Reconstruction, path: Float[Array, "B F 4 4"]) -> Views:
            if released:
                return farthest(found, size, method=evidence.renderer)
            return views(found, path, size, angle=self.angle, method=evidence.renderer)

        seen = each_device(own)(found, evidence.path)
        ids, mask = asked if released else self._ids(network.config.image_tokens(size))
        ids, mask = (jnp.broadcast_to(x, (len(seen.cover), x.shape[1])) for x in (ids, mask))

        def grade(image: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
            digits = self._digits
            return qwen3_vl.judge(network, ids, image[:, None], digits=digits, mask=mask)

        # One view after the other: memory of one, which is what the decoder's needs most of.
        grades = lax.map(grade, jnp.moveaxis(seen.images, 1, 0))
        score = jnp.where(seen.usable, jnp.mean(grades, axis=0), jnp.nan)
        beside = {"judge_cover": seen.cover, "judge_angle": seen.angle}
        return where_shown({"judge": score}, evidence) | beside

    @property
    def _folder(self) -> Path:
        return resolve(self.weights, "judge", field="rewards.judge.weights")

    @cached_property
    def _tokens(self) -> qwen3_vl.Tokens:
        return qwen3_vl.read_tokens(self._folder, qwen3_vl.read_config(self._folder))

    @property
    def _digits(self) -> Sequence[int]:
        return self._tokens.digits if self.weights else PUBLISHED_DIGITS

    def _ids(self, per_image: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask [1 N] of the question about an image of so many tokens."""
        if not self.weights:  # a plan: only its shape counts
            ids = np.zeros((1, PLANNED_TOKENS + per_image), np.int32)
            ids[0, :per_image] = qwen3_vl.Config().image_token_id
            return ids, np.ones_like(ids, bool)
        question = self.question or asks(self.weights)
        if self.mode == "released":
            question = RELEASED.format(prompt="")
        return self._tokens.ask([question], 1, per_image)

    def _size(self, config: qwen3_vl.Config, shown: tuple[int, int]) -> tuple[int, int]:
        """Of the views: the network's own for images like the reconstructed ones, or as chosen."""
        if not self.height:
            return qwen3_vl.prepared_size(config, shown)
        size = qwen3_vl.prepared_size(config, (self.height, self.width))
        if size != (self.height, self.width):
            raise ValueError(
                f"rewards.judge.height and width are {self.height} and {self.width}, which the "
                f"network would resize to {size[0]} and {size[1]}: give those, or 0 and 0"
            )
        return size
