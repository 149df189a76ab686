"""Views beside the path with known damage, and the nano judge that learns to see it.

The 3D network is left out: exact depth puts every pixel of a few frames into the world as a
Gaussian, which is what a perfect network would find. Then something is broken, the scene is seen
from the two places of the reward `judge`, and ray casting says what should have been seen there.

    damage = 1 - SSIM, over the pixels where the view shows anything

What is not shown is grey and does not count, which the judge has to learn too. Scenes stand still;
every choice follows from a seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from worldr1_jax.geometry import SH_C0
from worldr1_jax.models import qwen3_vl
from worldr1_jax.nano import captions, videos, world
from worldr1_jax.nano.fit import Batch, Schedule, fit
from worldr1_jax.rewards import judge
from worldr1_jax.rewards.likeness import ssim_where
from worldr1_jax.types import Gaussians, Reconstruction

FRAMES = 5  # of a video, evenly spaced, as many as the reward sees
FLOATERS = 1024  # places for Gaussians that belong to no pixel
OPACITY = 0.8
SPREAD = 0.35  # standard deviation of a pixel's Gaussian, px; the renderer adds 0.55
EDGE = 0.12  # step of depth to a neighbour, relative, above which a pixel shows both
FLAWLESS, RUINED = 0.05, 0.7  # damage that is graded 9, and 0
Rng = np.random.Generator


@dataclasses.dataclass
class Cloud:
    """The Gaussians of a video by frame and pixel, and those that belong to none; on the host."""

    depth: Float[np.ndarray, "F H W"]  # along each frame's axis, world units
    color: Float[np.ndarray, "F H W 3"]
    camtoworld: Float[np.ndarray, "F 4 4"]
    spread: Float[np.ndarray, "F H W"]  # px
    kept: Bool[np.ndarray, "F H W"]
    loose: Float[np.ndarray, "L 7"]  # position, size, colour; size 0: unused


# ---- What breaks: (cloud, strength in (0, 1], rng), in place -------------------------------------


def floaters(cloud: Cloud, strength: float, rng: Rng) -> None:
    """Up to 20 clumps of specks before the scene, in its colours."""
    clumps = 1 + round(19 * strength)
    each = FLOATERS // 20
    for clump in range(clumps):
        frame, y, x = (rng.integers(n) for n in cloud.depth.shape)
        depth = cloud.depth[frame, y, x] * rng.uniform(0.25, 0.85)
        centre = _unproject(cloud.camtoworld[frame], np.array([x, y]) + 0.5, depth)
        size = depth * rng.uniform(0.004, 0.02)
        part = cloud.loose[clump * each : (clump + 1) * each]
        part[:, :3] = centre + rng.normal(size=(each, 3)) * size * rng.uniform(1, 6)
        part[:, 3] = size
        colour = cloud.color[frame, rng.integers(videos.SIZE), rng.integers(videos.SIZE)]
        part[:, 4:] = np.clip(colour + rng.normal(size=(each, 3)) * 0.1, 0, 1)


def billboard(cloud: Cloud, strength: float, rng: Rng) -> None:
    """Every frame is flattened towards a card that faces its camera."""
    del rng
    middle = np.median(cloud.depth, axis=(1, 2), keepdims=True)
    cloud.depth = cloud.depth ** (1 - strength) * middle**strength


def backdrop(cloud: Cloud, strength: float, rng: Rng) -> None:
    """What is far is painted on a card before it."""
    share = rng.uniform(0.2, 0.6) * strength
    far = np.quantile(cloud.depth, 1 - share)
    cloud.depth = np.where(cloud.depth > far, far * rng.uniform(0.4, 1.0), cloud.depth)


def cameras(cloud: Cloud, strength: float, rng: Rng) -> None:
    """Every frame's camera is wrong in place and direction: doubled surfaces."""
    for pose in cloud.camtoworld:
        angles = rng.normal(size=3) * np.deg2rad(6 * strength)
        pose[:3, :3] = pose[:3, :3] @ _turn(angles)
        pose[:3, 3] += rng.normal(size=3) * 0.3 * strength


def scales(cloud: Cloud, strength: float, rng: Rng) -> None:
    """Every frame's depth has a factor of its own."""
    factor = np.exp(rng.normal(size=(FRAMES, 1, 1)) * 0.35 * strength)
    cloud.depth = cloud.depth * factor


def waves(cloud: Cloud, strength: float, rng: Rng) -> None:
    """Depth bends in every frame in another way: torn surfaces."""
    coarse = rng.normal(size=(FRAMES, 6, 6))
    rows = np.linspace(0, 5, videos.SIZE)
    weight = np.maximum(1 - np.abs(rows[:, None] - np.arange(6)), 0)
    bent = np.einsum("yi,fij,xj->fyx", weight, coarse, weight)
    cloud.depth = cloud.depth * np.exp(0.35 * strength * bent)


def noise(cloud: Cloud, strength: float, rng: Rng) -> None:
    """Depth is noisy from pixel to pixel: surfaces dissolve."""
    cloud.depth = cloud.depth * np.exp(rng.normal(size=cloud.depth.shape) * 0.2 * strength)


def smear(cloud: Cloud, strength: float, rng: Rng) -> None:
    """Gaussians too wide."""
    del rng
    cloud.spread = cloud.spread * (1 + 5 * strength)


def holes(cloud: Cloud, strength: float, rng: Rng) -> None:
    """Parts of every frame are gone: grey, or what lies behind."""
    for frame in range(FRAMES):
        for _ in range(1 + round(3 * strength)):
            size = rng.integers(6, 10 + round(16 * strength), 2)
            y, x = (rng.integers(videos.SIZE - n) for n in size)
            cloud.kept[frame, y : y + size[0], x : x + size[1]] = False


BREAKS: tuple[Callable[[Cloud, float, Rng], None], ...] = (
    floaters, billboard, backdrop, cameras, scales, waves, noise, smear, holes,
)  # fmt: skip


def _turn(angles: np.ndarray) -> np.ndarray:
    """The rotation about the axis `angles` by its length."""
    length = max(float(np.linalg.norm(angles)), 1e-9)
    x, y, z = angles / length
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(length) * cross + (1 - np.cos(length)) * cross @ cross


def _unproject(pose: np.ndarray, pixels: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """World points [... 3] of pixels [... 2] at depths [...]."""
    focal = world.FOCAL * videos.SIZE
    rays = np.concatenate(
        [(pixels - videos.SIZE / 2) / focal, np.ones((*pixels.shape[:-1], 1))], axis=-1
    )
    return (rays * np.asarray(depth)[..., None]) @ pose[:3, :3].T + pose[:3, 3]


# ---- Views ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Graded:
    """N views and what is wrong with them."""

    images: np.ndarray  # [N H W 3] uint8, as the reward shows them to the judge
    truth: np.ndarray  # [N H W 3] uint8, ray cast
    damage: np.ndarray  # [N] float32, 0 to 1
    broken: np.ndarray  # [N len(BREAKS)] float32, strengths

    def __len__(self) -> int:
        return len(self.images)


def sample(seed: int, count: int, *, held_out: bool = False) -> Graded:
    """Draws scenes, breaks most of them in one or two ways, and looks at them from aside; the
    result is a function of the arguments. Videos with no view from aside are drawn again."""
    rng = np.random.default_rng(seed)
    found: list[tuple[np.ndarray, ...]] = []
    while len(found) < count:
        spec = captions.sample_held_out(rng, held_out)
        scene = world.build(spec, rng)
        truth, cloud = _exact(spec, scene)
        broken = _break(cloud, rng)
        seen = _seen(gaussians(cloud), truth)
        if not bool(seen.usable[0]):
            continue
        right, _ = world.render(scene, seen.poses[0])
        damage = np.asarray(1 - ssim_where(seen.images[0], right, seen.shown[0]))
        images, right = (
            np.round(255 * np.asarray(x)).astype(np.uint8) for x in (seen.images[0], right)
        )
        for view, pose in enumerate(np.asarray(seen.poses[0])):
            if _inside(scene, pose[:3, 3]):
                found.append((images[view], right[view], damage[view], broken))
    return Graded(*(np.stack(column) for column in zip(*found[:count], strict=True)))


def cached(folder: str | Path, seed: int, count: int, *, chunk: int = 250, log=print) -> Graded:
    """`sample` in chunks that are kept as files in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for index in range(0, count, chunk):
        path = folder / f"views_{seed}_{index:06d}.npz"
        if not path.is_file():
            part = sample(videos.hash_seed(seed, index), min(chunk, count - index))
            unfinished = path.with_name(f"unfinished_{path.name}")
            np.savez(unfinished, **dataclasses.asdict(part))
            unfinished.rename(path)
            log(f"{index + len(part)} of {count} videos seen from aside")
        with np.load(path) as data:
            parts.append([data[field.name] for field in dataclasses.fields(Graded)])
    return Graded(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _inside(scene: world.Scene, place: np.ndarray) -> bool:
    """Whether there is a view to cast from here: not from under the floor or behind a wall."""
    low, high = world.OPEN if int(scene.place) >= world.FIRST_SKY else world.ROOM
    return bool(np.all(place > low) and np.all(place < high))


def _exact(spec: captions.Spec, scene: world.Scene) -> tuple[Reconstruction, Cloud]:
    """What a perfect 3D network finds of a video, without Gaussians, and the cloud of them."""
    path = videos.path(spec.commands)[:: (videos.FRAMES - 1) // (FRAMES - 1)]
    video, depth = (np.asarray(x) for x in world.render(scene, path))
    matrix = np.broadcast_to(world.intrinsics(videos.SIZE, videos.SIZE), (1, FRAMES, 3, 3))
    parts: list[Any] = [depth[None], np.ones_like(depth[None]), path[None], matrix, None]
    found = Reconstruction(*parts)
    shape = depth.shape
    loose = np.zeros((FLOATERS, 7))
    kept = np.ones(shape, bool)
    for axis in (1, 2):
        for step in (-1, 1):
            kept &= np.abs(np.roll(depth, step, axis) / depth - 1) < EDGE
    return found, Cloud(depth, video, path.copy(), np.full(shape, SPREAD), kept, loose)


def _break(cloud: Cloud, rng: Rng) -> np.ndarray:
    """Nothing (one time in eight), or one or two things; the strengths of BREAKS."""
    broken = np.zeros(len(BREAKS), np.float32)
    if rng.random() < 0.3:  # a network that predicts a Gaussian for every fourth pixel
        cloud.kept[:, 1::2] = cloud.kept[:, :, 1::2] = False
        cloud.spread = cloud.spread * 2
    if rng.random() < 0.125:
        return broken
    for which in rng.choice(len(BREAKS), rng.integers(1, 3), replace=False):
        broken[which] = rng.uniform(0.05, 1)
        BREAKS[which](cloud, float(broken[which]), rng)
    return broken


def gaussians(cloud: Cloud) -> Gaussians:
    """The cloud as the renderer takes it, [1 N ...]."""
    rows, columns = np.mgrid[: videos.SIZE, : videos.SIZE] + 0.5
    pixels = np.stack([columns, rows], axis=-1)
    surface = [
        _unproject(pose, pixels, depth)
        for pose, depth in zip(cloud.camtoworld, cloud.depth, strict=True)
    ]
    size = cloud.spread * cloud.depth / (world.FOCAL * videos.SIZE)
    opacity = OPACITY * cloud.kept
    loose = cloud.loose
    means = np.concatenate([np.reshape(surface, (-1, 3)), loose[:, :3]])
    size = np.concatenate([size.ravel(), np.maximum(loose[:, 3], 1e-4)])
    opacity = np.concatenate([opacity.ravel(), OPACITY * (loose[:, 3] > 0)])
    color = np.concatenate([cloud.color.reshape(-1, 3), loose[:, 4:]])
    leaves: tuple[Any, ...] = (
        means, np.tile([1.0, 0, 0, 0], (len(means), 1)), np.repeat(size[:, None], 3, 1), opacity,
        ((color - 0.5) / SH_C0)[:, None],
    )  # fmt: skip
    return Gaussians(*(jnp.asarray(leaf[None], jnp.float32) for leaf in leaves))


@jax.jit
def _seen(found: Gaussians, truth: Reconstruction) -> judge.Views:
    size = (videos.SIZE, videos.SIZE)
    whole = truth.replace(gaussians=found)  # type: ignore[attr-defined]
    return judge.views(whole, truth.camtoworld, size)


# ---- The judge -----------------------------------------------------------------------------------


def grades(damage: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """In [0, 1], 1 for a view without flaws."""
    return np.clip((RUINED - damage) / (RUINED - FLAWLESS), 0, 1)


def varied(
    images: UInt8[np.ndarray, "N H W 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "N H W 3"]:
    """Views with the same damage: each as it is or mirrored, with its three colours in any order.
    The damage is a mean over places and colours, and grey stays grey."""
    mirrored = rng.random((len(images), 1, 1, 1)) < 0.5
    order = rng.permuted(np.tile(np.arange(3), (len(images), 1)), axis=1)
    images = np.where(mirrored, images[:, :, ::-1], images)
    return np.take_along_axis(images, order[:, None, None], axis=3)


def train_judge(
    views: Graded,
    folder: Path,
    schedule: Schedule,
    *,
    seed: int,
    log: Callable[[str], None] = print,
    start: Path | None = None,
) -> None:
    """A nano Qwen3-VL, and its tokenizer, that answers the reward's question with the digits next
    to the grade of a view, each as often as it is near."""
    size = qwen3_vl.train_tokenizer([judge.NANO_QUESTION, "user\n", "assistant\n"], folder)
    config = qwen3_vl.Config.nano(size)
    network = qwen3_vl.load(start) if start else qwen3_vl.Qwen3VL(config, nnx.Rngs(seed))
    tokens = qwen3_vl.read_tokens(folder, config)
    shape = (videos.SIZE, videos.SIZE)
    ids = jnp.asarray(tokens.ask([judge.NANO_QUESTION], 1, config.image_tokens(shape))[0])
    digits = jnp.asarray(tokens.digits)
    graph, params = nnx.split(network)

    def loss(params: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        network = nnx.merge(graph, params)
        images = batch["images"].astype(jnp.float32)[:, None] / 255
        logits = network(jnp.broadcast_to(ids, (len(images), ids.shape[1])), images)
        likely = jax.nn.log_softmax(logits)[:, digits]
        near = 1 - jnp.abs(9 * batch["grades"][:, None] - jnp.arange(10))
        value = -jnp.mean(jnp.sum(jnp.maximum(near, 0) * likely, axis=1))
        answer = jax.nn.softmax(likely) @ (jnp.arange(10) / 9)
        return value, {"loss": value, "off": jnp.mean(jnp.abs(answer - batch["grades"]))}

    def batches() -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        wanted = grades(views.damage).astype(np.float32)
        while True:
            rows = rng.integers(0, len(views), schedule.batch)
            yield {"images": varied(views.images[rows], rng), "grades": wanted[rows]}

    def snapshot(average: Any) -> None:
        qwen3_vl.save(nnx.merge(graph, average), folder)

    fit(loss, params, batches(), schedule, seed=seed, log=log, snapshot=snapshot)
