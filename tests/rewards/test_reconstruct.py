"""From videos of any size to what Depth Anything 3 is given; goldens of its package and OpenCV."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens import make_frames, read
from worldr1_jax.rewards.reconstruct import area_matrix, processed_size, resize_frames

GOLDEN = Path(__file__).parents[1] / "goldens" / "frames.npz"


@pytest.mark.parametrize("height,width,longest", make_frames.CASES)
def test_frames_are_the_published_ones(height, width, longest):
    golden = read(GOLDEN)
    want = golden[make_frames.name(height, width, longest)].astype(np.float32)
    frame = make_frames.picture(height, width)[None, None]
    size = processed_size(height, width, longest, make_frames.PATCH)
    assert size == want.shape[:2]
    got = 255 * np.asarray(resize_frames(jnp.asarray(frame, jnp.float32) / 255, size))[0, 0]
    # The publisher rounds to whole levels after each of two steps, and OpenCV's cubic weights have
    # 11 bits. A cubic can double the first rounding.
    assert np.abs(got - want).max() <= 1.6
    assert np.abs(got - want).mean() <= 0.4


def test_resizing_keeps_constants_and_gradients():
    np.testing.assert_allclose(area_matrix(10, 4).sum(1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(area_matrix(3, 2) * 3, [[2, 1, 0], [0, 1, 2]], atol=1e-6)
    video = jnp.full((1, 1, 30, 40, 3), 0.25)
    np.testing.assert_allclose(resize_frames(video, (42, 56)), 0.25, rtol=1e-6)
    grads = jax.grad(lambda video: resize_frames(video, (14, 28)).sum())(video)
    assert float(jnp.abs(grads).min()) > 0  # every pixel counts: no aliasing
    same = jax.random.uniform(jax.random.key(0), (1, 1, 14, 28, 3))
    np.testing.assert_array_equal(resize_frames(same, (14, 28)), same)
