"""The renderer against a plain loop written from the formulas, finite differences, and itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.splat import lists as tile_lists
from worldr1_jax.splat import render as splat
from worldr1_jax.types import Gaussians

exact = partial(splat.render, method="exact")
in_rounds = partial(splat.render, pairs=40)
SIZE = (20, 28)  # not a multiple of the tile: the last tiles hang over the edge


def scene(count=150, seed=0, opacity=(0.02, 1.0), size=SIZE):
    """Gaussians in front of, beside and behind two cameras."""
    rng = np.random.default_rng(seed)
    means = rng.uniform([-1.5, -1.2, -0.5], [1.5, 1.2, 4.0], (count, 3))
    gaussians = Gaussians(
        means=means,
        quaternions=rng.normal(size=(count, 4)),
        scales=rng.uniform(0.02, 0.2, (count, 3)),
        opacities=rng.uniform(*opacity, count),
        sh=rng.normal(size=(count, 9, 3)) * 0.4,
    )
    poses = np.tile(np.eye(4), (2, 1, 1))
    angle = 0.2
    poses[1, :3, :3] = [
        [np.cos(angle), 0, np.sin(angle)],
        [0, 1, 0],
        [-np.sin(angle), 0, np.cos(angle)],
    ]
    poses[1, :3, 3] = 0.1, -0.05, 0.2
    height, width = size
    matrix = [[1.2 * width, 0, width / 2 - 0.7], [0, 1.1 * width, height / 2 + 0.4], [0, 0, 1]]
    gaussians = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gaussians)
    return gaussians, jnp.asarray(poses, jnp.float32), jnp.tile(jnp.asarray(matrix), (2, 1, 1))


def loop(gaussians, pose, matrix, size):
    """gsplat's image from its formulas, one Gaussian and one pixel at a time, in float64."""
    height, width = size
    means, quaternions, scales, opacities, sh = (
        np.asarray(getattr(gaussians, name), np.float64)
        for name in ("means", "quaternions", "scales", "opacities", "sh")
    )
    pose, matrix = np.asarray(pose, np.float64), np.asarray(matrix, np.float64)
    view = np.linalg.inv(pose)
    fx, fy, cx, cy = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
    camera = means @ view[:3, :3].T + view[:3, 3]
    image = np.zeros((height, width, 5))
    through = np.ones((height, width))
    done = np.zeros((height, width), bool)
    rows, columns = np.mgrid[:height, :width] + 0.5
    for n in np.argsort(camera[:, 2]):
        x, y, z = camera[n]
        if z < 0.01 or opacities[n] < 1 / 255:
            continue
        w, i, j, k = quaternions[n] / np.linalg.norm(quaternions[n])
        cross = np.array([[0, -k, j], [k, 0, -i], [-j, i, 0]])
        half = (np.eye(3) + 2 * w * cross + 2 * cross @ cross) @ np.diag(scales[n])
        tan_x, tan_y = 0.5 * width / fx, 0.5 * height / fy
        slope_x = np.clip(x / z, -cx / fx - 0.3 * tan_x, (width - cx) / fx + 0.3 * tan_x)
        slope_y = np.clip(y / z, -cy / fy - 0.3 * tan_y, (height - cy) / fy + 0.3 * tan_y)
        jacobian = np.array([[fx / z, 0, -fx * slope_x / z], [0, fy / z, -fy * slope_y / z]])
        flat = jacobian @ view[:3, :3] @ half
        conic = np.linalg.inv(flat @ flat.T + 0.3 * np.eye(2))
        offset = np.stack([columns - (fx * x / z + cx), rows - (fy * y / z + cy)], -1)
        power = 0.5 * np.einsum("hwi,ij,hwj->hw", offset, conic, offset)
        alpha = np.minimum(0.999, opacities[n] * np.exp(-power))
        alpha[alpha < 1 / 255] = 0
        stops = through * (1 - alpha) <= 1e-4
        done |= stops
        alpha[done] = 0
        direction = means[n] - pose[:3, 3]
        a, b, c = direction / np.linalg.norm(direction)
        basis = [0.28209479, -0.48860251 * b, 0.48860251 * c, -0.48860251 * a]
        basis += [1.09254843 * a * b, -1.09254843 * b * c, 0.94617470 * c * c - 0.31539157]
        basis += [-1.09254843 * a * c, 0.54627422 * (a * a - b * b)]
        colour = np.maximum(basis @ sh[n] + 0.5, 0)
        image += (alpha * through)[..., None] * np.array([*colour, z, 1])
        through *= 1 - alpha
    image[..., 3] /= np.maximum(image[..., 4], 1e-12)
    return image[..., :3], image[..., 3], image[..., 4]


def psnr(a, b):
    """dB, for images in [0, 1] or depths of that order."""
    return -10 * np.log10(np.mean((np.asarray(a) - np.asarray(b)) ** 2) + 1e-20)


@pytest.mark.parametrize("opacity", [(0.002, 0.6), (0.9, 1.0)])
def test_images_match_a_plain_loop(opacity):
    gaussians, poses, matrices = scene(count=300, opacity=opacity)
    images = splat.render(gaussians, poses, matrices, SIZE, method="exact")
    for view in range(2):
        expected = loop(gaussians, poses[view], matrices[view], SIZE)
        for image, wanted in zip(images[:3], expected, strict=True):
            # float32 against float64: 60 dB would already be invisible in 8 bits
            assert psnr(image[view], wanted) >= 60


def same(images, wanted):
    """float32 in another order of summation; where a pixel's stop falls on another Gaussian, the
    two differ by less than the transmittance at which it stops, 1e-4."""
    for ours, theirs in zip(images[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
        assert psnr(ours, theirs) >= 60


@pytest.mark.parametrize("opacity", [(0.002, 0.6), (0.9, 1.0)])
@pytest.mark.parametrize("pairs", [12, 150, None])  # many rounds, some, one
def test_tiles_are_exact(opacity, pairs):
    gaussians, poses, matrices = scene(count=300, opacity=opacity)
    wanted = exact(gaussians, poses, matrices, SIZE)
    images = splat.render(gaussians, poses, matrices, SIZE, pairs=pairs)
    same(images, wanted)
    assert images.overflow.tolist() == [0, 0]


@pytest.mark.parametrize("pairs", [200, None])
def test_the_kernel_equals_the_tiles(pairs):
    gaussians, poses, matrices = scene(count=300, opacity=(0.1, 1.0))
    ours = splat.render(gaussians, poses, matrices, SIZE, pairs=pairs)
    options = {"method": "pallas", "interpret": True, "pairs": pairs}
    images = splat.render(gaussians, poses, matrices, SIZE, **options)
    same(images, ours)
    assert images.overflow.tolist() == [0, 0]


def test_a_bound_on_rounds_counts_what_it_leaves_out():
    gaussians, poses, matrices = scene(count=300, opacity=(0.02, 0.2))
    wanted = exact(gaussians, poses, matrices, SIZE)
    short = splat.render(gaussians, poses, matrices, SIZE, pairs=64, rounds=1)
    assert (short.overflow > 0).all()
    assert psnr(short.rgb, wanted.rgb) < 40
    whole = splat.render(gaussians, poses, matrices, SIZE, pairs=64, rounds=300)
    assert whole.overflow.tolist() == [0, 0]


def test_hidden_overflow_is_not_counted():
    """Behind an opaque wall nothing is missed, so nothing is reported."""
    count = 300
    wall = Gaussians(
        means=jnp.stack([jnp.zeros(count), jnp.zeros(count), jnp.linspace(1, 2, count)], -1),
        quaternions=jnp.tile(jnp.array([1.0, 0, 0, 0]), (count, 1)),
        scales=jnp.full((count, 3), 10.0),
        opacities=jnp.full(count, 0.95),
        sh=jnp.zeros((count, 1, 3)),
    )
    _, poses, matrices = scene()
    result = splat.render(wall, poses, matrices, SIZE, pairs=12 * 16, rounds=1)
    assert result.overflow.tolist() == [0, 0]
    np.testing.assert_allclose(result.alpha, 1.0, atol=2e-4)
    np.testing.assert_allclose(result.rgb, 0.5, atol=1e-3)


def test_both_ways_to_sort_by_tile_agree():
    rng = np.random.default_rng(0)
    owner = jnp.asarray(np.sort(rng.choice(70, 200)), jnp.int32)
    tile = jnp.asarray(rng.permuted(np.arange(200) % 11), jnp.int32)  # 10 stands for no pair
    once = np.unique(np.stack([owner, tile]), axis=1)  # a Gaussian is in a tile once
    owner, tile = jnp.asarray(once[0]), jnp.asarray(once[1])
    counted = tile_lists._count_into_tiles(tile, owner, slab=70, tiles=10)
    for a, b in zip(tile_lists._sort_into_tiles(tile, owner, tiles=10), counted, strict=True):
        kept = int(counted[2].sum()) if a.shape == tile.shape else len(a)
        np.testing.assert_array_equal(a[:kept], b[:kept])


@pytest.mark.slow
@pytest.mark.parametrize("renderer", [splat.render, exact], ids=["tiles", "exact"])
def test_gradients_match_finite_differences(renderer):
    size = (10, 12)
    gaussians, poses, matrices = scene(count=25, opacity=(0.3, 0.8), size=size)
    key = jax.random.key(0)
    target = jax.random.normal(key, (2, *size, 5))

    @jax.jit
    def loss(gaussians):
        image = renderer(gaussians, poses, matrices, size)
        stacked = jnp.concatenate([image.rgb, image.depth[..., None], image.alpha[..., None]], -1)
        return jnp.sum(stacked * target * jnp.array([1, 1, 1, 0.1, 1]))

    gradient = jax.jit(jax.grad(loss))(gaussians)
    for name, step in [("means", 1e-3), ("scales", 5e-4), ("opacities", 3e-3), ("sh", 1e-2),
                       ("quaternions", 3e-3)]:  # fmt: skip
        leaf = getattr(gaussians, name)
        slope = getattr(gradient, name)
        assert jnp.all(jnp.isfinite(slope))
        # Directions of a few Gaussians each: the skip below 1/255 is a jump that a step may cross.
        errors = []
        for n in range(leaf.shape[0]):
            direction = jnp.zeros_like(leaf).at[n].set(slope[n])
            size_of = jnp.linalg.norm(direction)
            if size_of < 1e-2:
                continue
            direction = direction / size_of
            ahead = loss(gaussians.replace(**{name: leaf + step * direction}))
            behind = loss(gaussians.replace(**{name: leaf - step * direction}))
            errors.append(abs((ahead - behind) / (2 * step) - size_of) / size_of)
        assert len(errors) >= 5
        # The median, because of those jumps: 1/255 of a colour over a step of 1e-3 is a slope of 4.
        assert np.median(errors) < 0.03, (name, errors)


kernel = partial(splat.render, method="pallas", interpret=True, pairs=200)


def gradient_of_lists(renderer):
    gaussians, poses, matrices = scene(count=120, opacity=(0.3, 1.0))
    target = jax.random.normal(jax.random.key(1), (2, *SIZE, 3))

    @jax.jit
    def loss(gaussians):
        return jnp.sum(renderer(gaussians, poses, matrices, SIZE).rgb * target)

    return jax.tree.leaves(jax.jit(jax.grad(loss))(gaussians))


@pytest.fixture(scope="module")
def oracle_gradient():
    return gradient_of_lists(exact)


@pytest.mark.parametrize("renderer", [pytest.param(in_rounds, marks=pytest.mark.slow), kernel])
def test_gradients_of_lists_match_the_oracle(renderer, oracle_gradient):
    for a, b in zip(gradient_of_lists(renderer), oracle_gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * float(jnp.abs(b).max()))


def test_batches_equal_single_scenes():
    first, poses, matrices = scene(seed=1)
    second, _, _ = scene(seed=2)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    double = jnp.stack([poses, poses[::-1]]), jnp.stack([matrices, matrices])
    batched = splat.render(both, *double, SIZE)
    mapped = jax.vmap(lambda g, c, k: splat.render(g, c, k, SIZE))(both, *double)
    for index, one in enumerate((first, second)):
        single = splat.render(one, double[0][index], matrices, SIZE)
        for a, b, c in zip(batched[:3], mapped[:3], single[:3], strict=True):
            np.testing.assert_allclose(a[index], c, atol=1e-5)
            np.testing.assert_allclose(b[index], c, atol=1e-5)


def test_bad_shapes_are_named():
    gaussians, poses, matrices = scene(count=5)
    with pytest.raises(ValueError, match="camtoworld has shape"):
        splat.render(gaussians, poses[0], matrices[0], SIZE)
    with pytest.raises(ValueError, match="intrinsics has shape"):
        splat.render(gaussians, poses, matrices[:1], SIZE)
    with pytest.raises(ValueError, match="method is 'fast'"):
        splat.render(gaussians, poses, matrices, SIZE, method="fast")
    with pytest.raises(ValueError, match="pairs is 3"):
        splat.render(gaussians, poses, matrices, SIZE, pairs=3)
    with pytest.raises(ValueError, match="coefficients"):
        splat.render(gaussians.replace(sh=gaussians.sh[:, :5]), poses, matrices, SIZE)


def test_entries_by_product_are_those_of_the_table():
    """TPUs look the number of open tiles up with a product: exact to the largest sum of a grid."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.integers(0, 1 << 20, (20, 33)), jnp.int32)
    row, column = jnp.asarray(rng.integers(0, 20, 500)), jnp.asarray(rng.integers(0, 33, 500))
    np.testing.assert_array_equal(
        tile_lists._entries_by_product(table, row, column), tile_lists._entries(table, row, column)
    )
    traced = str(jax.make_jaxpr(tile_lists._entries_by_product)(table, row, column))
    assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in traced  # or TPUs would round
