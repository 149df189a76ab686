"""Rival captions: what a camera did, what it did not, and when nothing can be said."""

import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.camera import commands, trajectory
from worldr1_jax.rewards.base import Evidence
from worldr1_jax.rewards.hindsight import CLEAR, Hindsight, clauses
from worldr1_jax.rewards.trajectory import Trajectory
from worldr1_jax.types import Reconstruction

FRAMES, STRIDE = 17, 4
SCENE = "A red sphere on a tiled floor."


def paths(prompts):
    units = trajectory.Magnitudes.nano()
    every = [trajectory.path(commands.moves(p), FRAMES, magnitudes=units) for p in prompts]
    return np.stack(every).astype(np.float32)


def rivals(asked, done, seed=0):
    """Of videos whose cameras were asked for the one and did the other; None: nothing was found."""
    prompts = [commands.replaced(SCENE, names) for names in asked]
    found = paths([commands.text(names or ()) for names in done])[:, ::STRIDE]
    for place, names in enumerate(done):
        if names is None:
            found[place] = np.nan
    nothing = jnp.zeros((len(prompts), 1, 1, 1))
    evidence = Evidence(
        videos=nothing[..., None], asked=jnp.asarray(paths(prompts)), frame_stride=STRIDE,
        reconstruction=Reconstruction(nothing, nothing, jnp.asarray(found), nothing, None),
    )  # fmt: skip
    hindsight = Hindsight(Trajectory(depth_scale=4.0), paths)
    hindsight.see(evidence, np.arange(len(prompts)))
    return prompts, hindsight.choose(prompts, np.random.default_rng(seed))


def test_a_camera_that_did_something_else_has_the_caption_of_what_it_did():
    wrong = [("push_in",), ("pan_left", "move_right"), ("move_left",), ()]
    did = [("pan_left",), ("pan_left",), ("fixed",), ("orbit_right", "push_in")]
    _, found = rivals(wrong, did)
    assert found.prompts == [commands.replaced(SCENE, names) for names in did]
    assert (found.lead < -CLEAR / 2).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_camera_that_obeyed_has_a_caption_that_it_did_not_obey(seed):
    names = [("push_in",), ("pan_left", "push_in"), ("fixed",)]
    prompts, found = rivals(names, names, seed)
    assert (found.lead > CLEAR).all()
    for prompt, other, own in zip(prompts, found.prompts, names, strict=True):
        assert other != prompt and commands.scene(other) == SCENE
        assert 1 <= len(commands.parse(other)) <= len(own)


def test_where_nothing_was_found_a_caption_is_its_own_rival():
    prompts, found = rivals([("push_in",)] * 2, [None, ("push_in",)])
    assert found.prompts[0] == prompts[0] and found.lead[0] == 0
    assert found.lead[1] > 0


def test_every_clause_is_read_as_it_is_written():
    assert [commands.parse(commands.text(names)) for names in clauses()] == clauses()
    assert len(clauses()) == len(set(clauses())) == 9 + 8 * 7
