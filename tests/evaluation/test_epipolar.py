"""Epipolar errors: by hand, and on nano scenes under the true path and under others."""

import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.camera import trajectory
from worldr1_jax.evaluation import epipolar
from worldr1_jax.nano import captions, videos, world

STRIDE = 4
MATRIX = world.intrinsics(videos.SIZE, videos.SIZE)


def errors(clips, paths):
    matrices = np.broadcast_to(MATRIX, (*paths.shape[:2], 3, 3))
    found = epipolar.errors(jnp.asarray(clips), jnp.asarray(paths), jnp.asarray(matrices))
    return {name: np.asarray(value) for name, value in found.items()}


@pytest.fixture(scope="module")
def truth():
    """Frames [B 5 64 64 3] and poses of one scene under four movements."""
    names = ("push_in", "move_left", "orbit_right", "pan_left")
    thing = captions.Thing("red", "box"), captions.Thing("blue", "sphere")
    made = [
        videos.render_specs(
            [captions.Spec(thing, "left of", "checkered", "in a brick room", (name,))],
            np.random.default_rng(4),
        )
        for name in names
    ]
    clips = np.concatenate([one.video[:, ::STRIDE] for one in made]).astype(np.float32) / 255
    return clips, np.concatenate([one.camtoworld[:, ::STRIDE] for one in made])


def path(name):
    return trajectory.path([name], videos.FRAMES, magnitudes=videos.MAGNITUDES)[::STRIDE]


def test_the_true_path_fits_and_others_do_not(truth):
    clips, paths = truth
    right = errors(clips, paths)
    assert right["epipolar"].max() < 0.35, right  # px of 64
    assert right["matches"].min() > 30 and right["behind"].max() < 0.1
    others = [path(name) for name in ("move_up", "push_in", "tilt_up", "push_in")]
    wrong = errors(clips, np.stack(others))
    assert (wrong["epipolar"] > 2 * right["epipolar"]).all(), (right, wrong)


@pytest.mark.slow
def test_the_unit_of_length_does_not_matter_and_the_sign_shows(truth):
    clips, paths = (x[:3] for x in truth)
    right = errors(clips, paths)
    longer = paths.copy()
    longer[..., :3, 3] *= 30
    np.testing.assert_allclose(errors(clips, longer)["epipolar"], right["epipolar"], rtol=1e-2)
    backward = errors(clips[:2], np.stack([path("pull_out"), path("move_right")]))
    assert backward["behind"].min() > 0.9


def test_a_still_path_explains_a_still_picture_and_nothing_else(truth):
    clips, paths = truth
    still = np.broadcast_to(np.eye(4, dtype=np.float32), paths.shape)
    frozen = errors(np.repeat(clips[:, :1], 5, 1), still)
    assert frozen["epipolar"].max() < 0.1  # what the search for parts of a pixel adds
    assert errors(clips, still)["epipolar"].min() > 0.5


def test_sampson_by_hand():
    """The camera steps to the right: lines are rows, and a match two rows off is 2 / sqrt(2) px
    from where both points could have been."""
    motion = np.eye(4, dtype=np.float32)
    motion[0, 3] = -1.0
    first = jnp.array([[40.0, 20.0], [40.0, 20.0], [40.0, 20.0]])
    second = jnp.array([[35.0, 20.0], [35.0, 22.0], [45.0, 20.0]])
    matches = epipolar.Matches(first, second, jnp.ones(3, bool))
    distance, parallax, front = epipolar.judge(matches, motion, MATRIX, MATRIX)
    np.testing.assert_allclose(distance, [0, 2**0.5, 0], atol=1e-4)
    np.testing.assert_allclose(parallax, [5, 29**0.5, 5], rtol=1e-4)
    assert front.tolist() == [True, True, False]


def test_matches_of_a_shift_are_the_shift():
    """A texture moved by (3, -2) px: matched to a tenth of a pixel; noise is not matched."""
    rng = np.random.default_rng(0)
    grid = np.fft.rfft2(rng.normal(size=(64, 64)))
    y, x = np.meshgrid(np.fft.fftfreq(64), np.fft.rfftfreq(64), indexing="ij")
    smooth = np.fft.irfft2(grid * np.exp(-60 * (x**2 + y**2)))
    smooth = jnp.asarray(0.5 + 0.15 * smooth / smooth.std(), jnp.float32)
    matches = epipolar.match(smooth, jnp.roll(smooth, (-2, 3), (0, 1)), 64, 8)
    kept = np.asarray(matches.found)
    moves = np.asarray(matches.second - matches.first)[kept]
    assert kept.sum() > 10
    np.testing.assert_allclose(np.median(moves, axis=0), [3, -2], atol=0.1)
    noise = jnp.asarray(rng.uniform(size=(2, 64, 64)), jnp.float32)
    assert int(epipolar.match(noise[0], noise[1], 64, 8).found.sum()) <= 2


def test_what_cannot_be_known_is_nan_and_bad_arguments_are_named(truth):
    clips, paths = (x[:1] for x in truth)
    blank = errors(np.full_like(clips, 0.5), paths)
    assert np.isnan(blank["epipolar"]).all() and np.isnan(blank["behind"]).all()
    with pytest.raises(ValueError, match="gap is 5"):
        epipolar.errors(clips, paths, np.broadcast_to(MATRIX, (1, 5, 3, 3)), gap=5)
    with pytest.raises(ValueError, match="videos has shape"):
        epipolar.errors(clips[:, :3], paths, np.broadcast_to(MATRIX, (1, 5, 3, 3)))
