"""Preprocessing against depth_anything_3 0.1.1 and OpenCV, at full size too."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens import make_frames
from worldr1_jax.rewards.reconstruct import processed_size, resize_frames

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("depth_anything_3")
pytest.importorskip("cv2")

CASES = ((480, 832, 504), (720, 1280, 504), (832, 480, 504), (300, 400, 504), *make_frames.CASES)


@pytest.mark.parametrize("height,width,longest", CASES)
def test_frames_are_the_packages(height, width, longest):
    picture = make_frames.picture(height, width)
    want = make_frames.published(picture, longest).astype(np.float32)
    size = processed_size(height, width, longest, make_frames.PATCH)
    assert size == want.shape[:2]
    got = resize_frames(jnp.asarray(picture, jnp.float32)[None, None] / 255, size)[0, 0]
    error = np.abs(255 * np.asarray(got) - want)
    print(f"{height}x{width} -> {size}: mean {error.mean():.3f}, most {error.max():.2f} of 255")
    # See tests/rewards/test_reconstruct.py.
    assert error.max() <= 1.6 and error.mean() <= 0.4


def test_sizes_are_the_packages():
    """Sides from 32 to 90 px, given a multiple of the patch size and less."""
    for longest in (56, 60):
        for height in range(32, 90, 5):
            for width in range(32, 90, 3):
                want = make_frames.published(np.zeros((height, width, 3), np.uint8), longest)
                got = processed_size(height, width, longest, make_frames.PATCH)
                assert got == want.shape[:2], (height, width, longest)
