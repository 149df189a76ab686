"""Known damage: what breaks a cloud of Gaussians, and grades of it."""

import itertools

import numpy as np
import pytest

from worldr1_jax.nano import check, damage, videos, world

SIZE = videos.SIZE


@pytest.fixture
def cloud():
    """A slanted wall that five cameras see, each a step beside the last."""
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (damage.FRAMES, 1, 1))
    poses[:, 0, 3] = 0.1 * np.arange(damage.FRAMES)
    shape = (damage.FRAMES, SIZE, SIZE)
    depth = np.broadcast_to(np.linspace(3, 6, SIZE), shape).copy()
    return damage.Cloud(
        depth, rng.uniform(size=(*shape, 3)), poses, np.full(shape, damage.SPREAD),
        np.ones(shape, bool), np.zeros((damage.FLOATERS, 7)),
    )  # fmt: skip


def test_gaussians_lie_behind_their_pixels(cloud):
    made = damage.gaussians(cloud)
    means = made.means[0, : cloud.depth.size].reshape(*cloud.depth.shape, 3)
    seen = means - cloud.camtoworld[:, None, None, :3, 3]
    focal = world.FOCAL * SIZE
    np.testing.assert_allclose(seen[..., 2], cloud.depth, rtol=1e-5)
    np.testing.assert_allclose(
        seen[2, 5, :, 0] / seen[2, 5, :, 2] * focal + SIZE / 2, np.arange(SIZE) + 0.5, atol=1e-3
    )
    assert not made.opacities[0, cloud.depth.size :].any()


@pytest.mark.parametrize("kind", damage.BREAKS)
def test_what_breaks_follows_from_the_seed(cloud, kind):
    before = damage.gaussians(cloud)
    kind(cloud, 0.5, np.random.default_rng(1))
    after = damage.gaussians(cloud)
    pairs = zip(before.__dict__.values(), after.__dict__.values(), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)
    assert all(np.isfinite(leaf).all() for leaf in after.__dict__.values())


def test_a_billboard_is_flat_and_faces_its_camera(cloud):
    damage.billboard(cloud, 1.0, np.random.default_rng(0))
    np.testing.assert_allclose(cloud.depth, 4.5, atol=0.05)


def test_there_is_no_view_from_under_the_floor():
    scene = world.Scene(*[None] * 7, place=np.int32(0), phase=None)
    assert damage._inside(scene, np.array([0, 0, 1.0]))
    assert not damage._inside(scene, np.array([0, world.EYE_HEIGHT + 0.1, 1]))
    assert not damage._inside(scene, np.array([5, 0, 1.0]))


def test_grades_by_hand():
    middle = (damage.FLAWLESS + damage.RUINED) / 2
    got = damage.grades(np.array([0, damage.FLAWLESS, middle, damage.RUINED, 1]))
    np.testing.assert_allclose(got, [1, 1, 0.5, 0, 0], atol=1e-6)


def test_rank_correlation_by_hand():
    assert check.spearman(np.array([1.0, 5, 9]), np.array([1.0, 2, 100])) == pytest.approx(1)
    assert check.spearman(np.array([1.0, np.nan, 9]), np.array([2.0, 3, 1])) == pytest.approx(-1)
    # ranks 1.5 1.5 3 4 against 1 2 3 4: covariance 4.5 / 4, variances 4.5 / 4 and 5 / 4
    tied = check.spearman(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 3, 4]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_varied_views_have_the_same_damage():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (6, 5, 3), np.uint8)
    mirrored = image[:, ::-1]
    kinds = {tuple(view[0, 0]) for view in damage.varied(np.stack([image] * 200), rng)}
    wanted = itertools.chain(*(itertools.permutations(one[0, 0]) for one in (image, mirrored)))
    assert kinds == set(wanted)
