"""The renderer's figures: tiled against exact, and 12 million Gaussians with and without thinning.

python -m tests.measure.splat speed     # 100,000 Gaussians at 128x128, alternating, in one run
python -m tests.measure.splat full      # 81 frames of 294x504: 12.0 million; some minutes, 6 GB
python -m tests.measure.splat full --size 48 80     # the same, 311,040
python -m tests.measure.splat network   # what thinning costs on nano's own reconstructions
python -m tests.measure.splat cost      # seconds of a video on a core of v5e, by the model

`full` has no Depth Anything 3 of that size: its Gaussians are the pixels of a ray-cast nano scene,
lifted by the true depth with 1% of noise, as wide as a pixel, with opacities as they come between
0.3 and 0.95. `exact` would take hours for such an image, so it draws blocks of pixels of it.
"""

import argparse
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from worldr1_jax.camera import trajectory
from worldr1_jax.nano import captions, videos, world
from worldr1_jax.plan import splat_cost
from worldr1_jax.rewards import build, likeness
from worldr1_jax.rewards.reconstruct import thinned
from worldr1_jax.splat import exact, tiles
from worldr1_jax.splat import kernel as tile_kernel
from worldr1_jax.splat import lists as tile_lists
from worldr1_jax.splat import render as splat
from worldr1_jax.splat.projection import project
from worldr1_jax.types import Gaussians, Reconstruction

FRAMES, SIZE = 81, (294, 504)  # what Depth Anything 3 sees of 81 frames of 480x832
VIEWS = (20, 44)  # rendered in `full`: neither is among the frames that thinning keeps
BLOCKS = ((0.5, 0.5), (0.1, 0.1), (0.6, 0.75))  # corners, as shares, of what `exact` draws
BLOCK = 16  # px
NOISE, OPACITY = 0.01, (0.3, 0.95)
KEEP = (41, 21, 11, 6)


def speed(rounds: int = 3) -> None:
    """Seconds and processor seconds of both, after a run that compiles."""
    rng, count, size = np.random.default_rng(0), 100_000, (128, 128)
    means = rng.uniform([-1.5, -1.5, 1.0], [1.5, 1.5, 4.0], (count, 3))
    scene = Gaussians(
        means, rng.normal(size=(count, 4)), rng.uniform(0.005, 0.02, (count, 3)),
        rng.uniform(0.05, 0.9, count), 0.4 * rng.normal(size=(count, 9, 3)),
    )  # fmt: skip
    scene = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), scene)
    matrix = jnp.array([[[140.0, 0, 64], [0, 140, 64], [0, 0, 1]]])
    taken: dict[str, list] = {"tiled": [], "exact": []}
    images = {}
    for _ in range(rounds + 1):
        for method in taken:
            start, busy = time.perf_counter(), time.process_time()
            image = splat.render(scene, jnp.eye(4)[None], matrix, size, method=method)
            images[method] = jax.block_until_ready(image)
            taken[method].append((time.perf_counter() - start, time.process_time() - busy))
    (wall, cpu) = (
        {m: float(np.median([t[i] for t in taken[m][1:]])) for m in taken} for i in (0, 1)
    )
    show(
        gaussians=count, size=size, seconds=wall, processor_seconds=cpu,
        exact_over_tiled=wall["exact"] / wall["tiled"],
        in_processor_seconds=cpu["exact"] / cpu["tiled"],
        psnr=psnr(images["tiled"].rgb, images["exact"].rgb),
    )  # fmt: skip


def full(size: tuple[int, int], keep: tuple[int, ...]) -> None:
    """Tiled against exact on blocks of a view, and what thinning does to two views."""
    found, video = full_scene(size)
    whole = {}
    for kept in (FRAMES, *keep):
        gaussians = jax.tree.map(lambda x: x[0], thinned(found, kept).gaussians)
        for view in VIEWS:
            pose, matrix = found.camtoworld[0, view], found.intrinsics[0, view]
            start = time.perf_counter()
            image, rounds = jax.block_until_ready(draw(gaussians, pose, matrix, size))
            row = {"view": view, "seconds": time.perf_counter() - start, "rounds": int(rounds)}
            if kept == FRAMES:
                whole[view] = image
                row |= work(gaussians, pose, matrix, size)
                if view == VIEWS[0]:
                    row["psnr_to_exact"] = against_exact(gaussians, pose, matrix, image)
            else:
                row["psnr_to_all"] = psnr(image[..., :3], whole[view][..., :3])
            row["psnr_to_frame"] = psnr(image[..., :3], video[view])
            show(frames=kept, gaussians=gaussians.means.shape[0], **row)


def network(count: int = 32, keep: tuple[int, ...] = (9, 5, 3)) -> None:
    """Nano's network on all 17 frames of ground-truth videos, its Gaussians thinned."""
    truth = videos.sample(77, count)
    batch = jnp.asarray(truth.video, jnp.float32) / 255.0
    scorer = build({"recon": 1.0}, recon={"likeness": "ssim"}, reconstruct={"da3": "nano"})
    seen = scorer.look(batch, truth.camtoworld)
    for kept in (batch.shape[1], *keep):
        fewer = seen.replace(reconstruction=thinned(seen.found(), kept))
        parts = scorer.measure(fewer, truth.captions)
        means = {name: float(jnp.mean(parts[name])) for name in ("recon", "psnr", "coverage")}
        show(frames=kept, **means)


def cost() -> None:
    """The model of `splat_cost` for 81 views, with its bound on rounds."""
    for kept in (FRAMES, *KEEP):
        count = kept * SIZE[0] * SIZE[1]
        seconds = splat_cost.video("v5e", gaussians=count, size=SIZE, views=FRAMES)
        show(frames=kept, gaussians=count, seconds=seconds)


def full_scene(size: tuple[int, int]) -> tuple[Reconstruction, np.ndarray]:
    """A reconstruction of 81 frames from the truth, and the frames."""
    rng = np.random.default_rng(3)
    spec = captions.sample_held_out(rng, False)
    path = np.asarray(trajectory.path(("orbit_left",), FRAMES, magnitudes=videos.MAGNITUDES))
    height, width = size
    video, depth = world.render(
        world.build(spec, rng), path, height=height, width=width, supersample=1
    )
    video, depth = np.asarray(video), np.asarray(depth)
    matrix = world.intrinsics(height, width)
    count = FRAMES * height * width
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack([(x - matrix[0, 2]) / matrix[0, 0], (y - matrix[1, 2]) / matrix[1, 1],
                     np.ones_like(x)], -1)  # fmt: skip
    noisy = depth * (1 + NOISE * rng.standard_normal(depth.shape, np.float32))
    means = np.einsum("fij,fhwj->fhwi", path[:, :3, :3], rays[None] * noisy[..., None])
    means += path[:, None, None, :3, 3]
    scales = np.repeat((0.5 * noisy / matrix[0, 0]).reshape(-1, 1), 3, 1)
    leaves = (
        means.reshape(-1, 3), np.tile(np.float32([1, 0, 0, 0]), (count, 1)), scales,
        rng.uniform(*OPACITY, count), ((video - 0.5) / 0.28209479).reshape(-1, 1, 3),
    )  # fmt: skip
    gaussians = Gaussians(*(jnp.asarray(leaf, jnp.float32)[None] for leaf in leaves))
    matrices = jnp.tile(jnp.asarray(matrix), (1, FRAMES, 1, 1))
    shown = jnp.asarray(depth)[None]
    return Reconstruction(shown, shown, jnp.asarray(path)[None], matrices, gaussians), video


@partial(jax.jit, static_argnames="size")
def draw(gaussians, pose, matrix, size):
    """One tiled view, r, g, b, depth times alpha, alpha; and the rounds that it took, which are
    those of the TPU kernel too: same tiles, same room."""
    grid = tile_lists.make_grid(size, 16, None, None, "xla")
    done, _ = tiles.run(grid, tiles.composite, project(gaussians, pose, matrix, size), record=False)
    return splat._untiled(done.canvas.features, grid), done.number


def work(gaussians, pose, matrix, size) -> dict[str, float]:
    """What a view takes, counted as its rounds go by, and beside it what `splat_cost` takes it for:
    tiles that a listed Gaussian touches, and chunks of the TPU kernel. Its seconds are of 81 such
    views."""
    grid = tile_lists.make_grid(size, 16, None, None, "xla")
    view = jax.jit(project, static_argnums=3)(gaussians, pose, matrix, size)
    slab = min(view.rows.shape[0], grid.pairs)
    order, visible = jax.jit(tiles._depth_order, static_argnums=1)(view, slab)
    table = jax.jit(tile_lists.table_of)(view)

    @jax.jit
    def one_round(table, order, canvas, cursor):
        lists = tile_lists.take(grid, table, order, visible, cursor, canvas.open)
        drawn = jnp.where(canvas.open, -(-lists.length // tile_kernel.CHUNK), 0).sum()
        after = tiles.composite(grid, lists, canvas, jnp.int32(0), False)
        return after, cursor + lists.taken, jnp.stack([lists.length.sum(), drawn])

    canvas, cursor, rounds, total = tiles.blank(grid.padded, 256), jnp.int32(0), 0, np.zeros(2)
    while cursor < visible and bool(canvas.open[: grid.tiles].any()):
        canvas, cursor, counts = one_round(table, order, canvas, cursor)
        rounds, total = rounds + 1, total + np.asarray(counts)
    count, listed = view.rows.shape[0], min(int(cursor), int(visible))
    steps = splat_cost.round_counts(grid, count)[1]
    model = splat_cost.video("v5e", gaussians=count, size=size, views=FRAMES, rounds=rounds)
    return {
        "rounds": rounds, "most_rounds": splat_cost.most_rounds(grid, count),
        "visible": int(visible), "listed": listed, "touched_tiles": total[0] / listed,
        "touched_tiles_by_model": (1 + 2 * splat_cost.RADIUS / grid.tile) ** 2,
        "chunks": int(total[1]), "chunks_by_model": rounds * steps, "v5e_seconds": model["total"],
    }  # fmt: skip


@partial(jax.jit, static_argnames="size")
def draw_blocks(gaussians, pose, matrix, size):
    """The pixels of all BLOCKS by the definition."""
    corners = jnp.array([[left, top] for top, left in corners_of(size)], jnp.float32)
    pixels = (exact.pixel_centres((BLOCK, BLOCK)) + corners[:, None]).reshape(-1, 2)
    return exact.draw(project(gaussians, pose, matrix, size), pixels)[:, :3]


def corners_of(size):
    """Top and left of each block, px."""
    return [(int(top * size[0]), int(left * size[1])) for top, left in BLOCKS]


def against_exact(gaussians, pose, matrix, image) -> list[float]:
    """PSNR of each block of the image to the definition's, in dB."""
    size = image.shape[:2]
    wanted = np.asarray(draw_blocks(gaussians, pose, matrix, size)).reshape(-1, BLOCK, BLOCK, 3)
    pairs = zip(corners_of(size), wanted, strict=True)
    return [psnr(image[t : t + BLOCK, x : x + BLOCK, :3], block) for (t, x), block in pairs]


def psnr(a, b) -> float:
    """dB, of images in [0, 1]; at most 140 here, where likeness.psnr stops at 100."""
    error = np.mean((np.clip(a, 0, 1) - np.clip(b, 0, 1)) ** 2)
    return float(-10 * np.log10(max(error, likeness.MSE_MIN * 1e-4)))


def show(**figures) -> None:
    """One line of JSON."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return value if isinstance(value, str | int) else round(float(value), 3)

    print(json.dumps({name: plain(value) for name, value in figures.items()}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "full", "network", "cost"))
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, help="of `full`, px")
    parser.add_argument("--keep", type=int, nargs="*", default=KEEP, help="frames, of `full`")
    args = parser.parse_args()
    if args.what == "full":
        full(tuple(args.size), tuple(args.keep))
    else:
        {"speed": speed, "network": network, "cost": cost}[args.what]()
