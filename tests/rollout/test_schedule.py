"""Schedule against hand numbers, and the places that a window takes."""

import jax
import numpy as np
import pytest

from worldr1_jax.rollout import schedule


def test_hand_numbers():
    # s = 1, .75, .5, .25, 0 and 3 s / (1 + 2 s)
    got = schedule.sigmas(4, 3.0)
    np.testing.assert_allclose(got, [1, 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5, 0], rtol=1e-7)
    assert got.dtype == np.float32


def test_shift_one_is_even():
    np.testing.assert_allclose(schedule.sigmas(5, 1.0), [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_strictly_descending(shift):
    got = np.asarray(schedule.sigmas(50, shift, sigma_max=0.999999))
    assert (np.diff(got) < 0).all() and got[-1] == 0 and got.shape == (51,)


@pytest.mark.parametrize("steps,shift,top", [(0, 3, 1), (4, 0, 1), (4, 3, 0), (4, 3, 1.5)])
def test_bad_input(steps, shift, top):
    with pytest.raises(ValueError):
        schedule.sigmas(steps, shift, sigma_max=top)


def test_random_window_takes_every_place():
    keys = jax.random.split(jax.random.key(0), 200)
    got = jax.vmap(lambda key: schedule.random_window(key, 3, 2, 8))(keys)
    assert set(np.asarray(got)) == {2, 3, 4, 5}


def test_progressive_window_slides_and_wraps():
    got = [int(schedule.progressive_window(u, 2, 1, 6, interval=2)) for u in range(10)]
    assert got == [1, 1, 2, 2, 3, 3, 4, 4, 1, 1]
    got = [int(schedule.progressive_window(u, 2, 1, 6, interval=1, stride=2)) for u in range(4)]
    assert got == [1, 3, 1, 3]


def test_check_window():
    schedule.check_window(10, 2, 0, 5)
    schedule.check_window(10, 9, 0, 9)
    for width, first, last in [(0, 0, 5), (2, 0, 10), (3, 4, 6), (1, 5, 5), (1, -1, 3)]:
        with pytest.raises(ValueError):
            schedule.check_window(10, width, first, last)
