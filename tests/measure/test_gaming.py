"""The measure itself, on hand numbers and on a term whose best video is known."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.measure import gaming
from tests.measure.gaming import Pixels, climb, line, sheet, simple, spread, sums, weighed

GOAL = 0.7
PROMPT = "Camera push in. A red sphere and a blue cube on a gray floor."


def slope(videos):
    """The nearer to GOAL the better; a video whose first pixel is 1 has no score."""
    lost = np.asarray(videos[:, 0, 0, 0, 0] == 1.0)
    scores = np.where(lost, np.nan, -np.asarray((videos - GOAL) ** 2).mean((1, 2, 3, 4)))
    gradient = jnp.where(lost[:, None, None, None, None], 0.0, GOAL - videos)
    return scores, gradient


def test_a_climb_finds_the_best_video_and_leaves_alone_what_has_no_score():
    start = np.stack([np.zeros((2, 4, 4, 3)), np.ones((2, 4, 4, 3))])
    found = climb(slope, Pixels(start), rate=0.05, steps=20)
    np.testing.assert_allclose(found[0], GOAL, atol=1e-3)
    np.testing.assert_array_equal(found[1], 1.0)


def test_a_climb_takes_steps_back_that_lose():
    def steep(videos):
        scores, gradient = slope(videos)
        return np.exp(1e4 * scores), gradient * np.exp(1e4 * scores)[:, None, None, None, None]

    start = np.full((1, 1, 2, 2, 3), GOAL - 0.02)
    found = climb(steep, Pixels(start), rate=0.5, steps=12)
    np.testing.assert_allclose(found, GOAL, atol=1e-3)


def test_sums_and_spreads():
    scores = {"recon": np.array([1.0, np.nan]), "hps": np.array([3.0, 4.0])}
    np.testing.assert_array_equal(weighed(scores, {"recon": 2.0, "hps": 1.0}), [5.0, np.nan])
    np.testing.assert_array_equal(weighed(scores, {"recon": 0.0, "hps": 0.5}), [1.5, 2.0])
    # Deviations from the prompts' means are 1, -1, 2, -2; a prompt with a score missing is out.
    rows = np.array([[2.0, 0.0], [9.0, 5.0], [np.nan, 1.0]])
    assert spread(rows) == pytest.approx(np.sqrt(2.5))
    found = sums({"hps": 0.5}, {"hps": 0.1})
    assert (found["default"], found["learnt"]) == ({"hps": 0.5}, {"hps": 5.0})
    assert found["equal"] == dict.fromkeys(gaming.TERMS, 1.0)


def test_a_row():
    base = {term: np.array([0.5, 0.5]) for term in gaming.TERMS}
    scores = base | {"hps": np.array([0.75, 1.0]), "recon": np.array([0.25, np.nan])}
    scores["judge"] = np.full(2, np.nan)
    found = line("x", scores, base, {"a": {"hps": 1.0}, "b": {"recon": 4.0, "hps": 1.0}}, ["hps"])
    cells = [cell.strip() for cell in found.strip("|").split("|")]
    assert cells == ["x", "0.25 (1)", "0.50", "0.50", "none", "0.50", "**0.88**",
                     "+0.38, 2 of 2", "-0.75, 0 of 2"]  # fmt: skip


def test_cheats_without_a_gradient():
    base = np.random.default_rng(0).uniform(size=(1, 3, 16, 16, 3))
    found = simple(base, [PROMPT], np.eye(4)[None, None].repeat(3, 1))
    assert {video.shape for video in found.values()} == {base.shape}
    red, blue = gaming.named(PROMPT)
    np.testing.assert_array_equal(
        found["bands of the named colours"][0, 1, 4], [red] * 8 + [blue] * 8
    )
    # A camera that stands still sees the card as it is.
    np.testing.assert_allclose(found["a flat card on the asked path"][0, 2, 1:-1, 1:-1],
                               base[0, 0, 1:-1, 1:-1], atol=1e-6)  # fmt: skip
    image = Image.open(io.BytesIO(sheet(found)))
    assert image.width > gaming.COLUMNS * gaming.SHOWN * 16
    assert Image.open(io.BytesIO(sheet({"one": base}))).width < image.width / 2
