"""S_meta without a judge: where the exam is held, what passes it, and what cannot be judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.camera import commands, trajectory
from worldr1_jax.geometry import SH_C0
from worldr1_jax.nano import captions, videos, world
from worldr1_jax.rewards import consistency, likeness, meta_view
from worldr1_jax.rewards import trajectory as s_traj
from worldr1_jax.rewards.base import Evidence
from worldr1_jax.rewards.reconstruct import thinned
from worldr1_jax.types import Gaussians, Reconstruction

FRAMES, SIDE = 4, 32
agreement = jax.jit(meta_view.agreement)


def path(name, frames=FRAMES):
    return jnp.asarray(trajectory.path([name], frames, magnitudes=videos.MAGNITUDES))


def lifted(video, depth, poses):
    """A reconstruction [1 ...] from exact depth: a flat disc at each pixel."""
    frames, side = video.shape[:2]
    matrix = world.intrinsics(side, side)
    y, x = np.mgrid[:side, :side] + 0.5
    rays = np.stack([(x - side / 2) / matrix[0, 0], (y - side / 2) / matrix[1, 1], 0 * x + 1], -1)
    points = np.einsum("fij,fyxj->fyxi", poses[:, :3, :3], rays * depth[..., None])
    points = points + poses[:, None, None, :3, 3]
    quaternions = np.zeros((frames, side, side, 4))
    quaternions[..., 0] = 1
    scales = np.repeat((0.6 / matrix[0, 0] * depth)[..., None], 3, -1)
    gaussians = Gaussians(
        means=points.reshape(1, -1, 3),
        quaternions=quaternions.reshape(1, -1, 4),
        scales=scales.reshape(1, -1, 3),
        opacities=np.full((1, frames * side * side), 0.9),
        sh=((video - 0.5) / SH_C0).reshape(1, -1, 1, 3),
    )
    found = Reconstruction(
        depth[None], np.ones_like(depth)[None], poses[None], np.tile(matrix, (1, frames, 1, 1)),
        gaussians,
    )  # fmt: skip
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), found)


@pytest.fixture(scope="module")
def room():
    """A nano scene that the camera passes, its exact reconstruction, and the path."""
    thing = captions.Thing("red", "box"), captions.Thing("blue", "sphere")
    spec = captions.Spec(thing, "left of", "checkered", "in a brick room", ("move_right",))
    scene = world.build(spec, np.random.default_rng(3))
    poses = path("move_right")
    video, depth = world.render(scene, poses, height=SIDE, width=SIDE)
    return lifted(np.asarray(video), np.asarray(depth), np.asarray(poses)), poses[None]


def moved(found, factors):
    """Gaussians of each frame so many times farther from its camera."""
    each = found.gaussians.means.shape[1] // FRAMES
    cameras = jnp.repeat(found.camtoworld[:, :, :3, 3], each, axis=1)
    factor = jnp.repeat(jnp.asarray(factors), each)[None, :, None]
    means = cameras + (found.gaussians.means - cameras) * factor
    return found.replace(gaussians=found.gaussians.replace(means=means))


@pytest.mark.parametrize("name", commands.NAMES)
def test_the_axis_follows_from_the_path_asked_for(name):
    aside = name.startswith(("move", "orbit", "pan")) and name.endswith(("left", "right"))
    assert bool(meta_view.elevates(path(name)[None])[0]) == aside


def test_the_focus_is_a_weighted_mean_that_the_sky_does_not_move():
    depth = jnp.tile(jnp.array([[2.0, 4.0], [4.0, 1e6]]), (1, 3, 1, 1))
    found = Reconstruction(depth, jnp.ones_like(depth), None, None, None)
    assert float(meta_view.focus(found)[0]) == pytest.approx(4 / (1 / 2 + 1 / 4 + 1 / 4), rel=1e-4)
    surer = found.replace(confidence=jnp.ones_like(depth).at[0, 1, 0, 0].set(1e6))
    assert float(meta_view.focus(surer)[0]) == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize("elevate", [True, False])
def test_the_views_look_at_the_focus_from_aside(elevate):
    middle, angles = path("orbit_left")[None, 2], jnp.deg2rad(jnp.array([13.0, -13.0]))
    poses = meta_view.offset_poses(middle, jnp.array([4.0]), jnp.array([elevate]), angles)[0]
    centre = middle[0, :3, 3] + 4 * middle[0, :3, 2]
    np.testing.assert_allclose(poses[:, :3, 3] + 4 * poses[:, :3, 2], [centre, centre], atol=1e-5)
    np.testing.assert_allclose(poses[:, :3, 2] @ middle[0, :3, 2], np.cos(angles), atol=1e-6)
    steps = (poses[:, :3, 3] - middle[0, :3, 3]) @ middle[0, :3, :3]
    along = 1 if elevate else 0
    assert steps[0, along] * steps[1, along] < 0
    np.testing.assert_allclose(steps[:, 1 - along], 0, atol=1e-5)


def test_a_view_where_a_camera_was_gives_way_to_the_other_axis(room):
    """A push is seen from left and right, unless the video was in truth an orbit."""
    found, _ = room
    asked = path("push_in")[None]
    orbit = path("orbit_left")[None]
    for poses, axis in ((asked, 0), (orbit, 1)):
        views, depth = meta_view.exam(found.replace(camtoworld=poses), asked, 13.0)
        step = (views[0, 0, :3, 3] - poses[0, FRAMES // 2, :3, 3]) @ poses[0, FRAMES // 2, :3, :3]
        least = 0.9 * float(depth[0]) * np.sin(np.deg2rad(13))
        assert abs(step[axis]) > least > abs(step[1 - axis])


def test_one_scene_agrees_with_itself_and_what_the_path_hides_shows(room):
    found, asked = room
    right, parts = agreement(found, asked)
    assert right[0] > 0.8 and parts["cover"][0] >= meta_view.COVER, (right, parts)
    off = [moved(found, [1, far, 1, far]) for far in (1.1, 1.3)]
    scores = [float(agreement(each, asked)[0][0]) for each in off]
    assert scores[1] < scores[0] < right[0] - 0.05


def test_the_frames_of_either_half():
    assert meta_view._halves(5, "alternate").tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]
    assert meta_view._halves(5, "halves").tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]


def test_the_unit_of_length_does_not_matter(room):
    found, asked = room
    k = 37.0
    gaussians = found.gaussians.replace(
        means=k * found.gaussians.means, scales=k * found.gaussians.scales
    )
    poses = found.camtoworld.at[..., :3, 3].multiply(k)
    larger = found.replace(depth=k * found.depth, camtoworld=poses, gaussians=gaussians)
    scores = [jax.tree.leaves(agreement(each, asked)) for each in (larger, found)]
    for ours, theirs in zip(*scores, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_too_little_cover_halves_the_angle_and_then_is_not_judged(room):
    found, asked = room
    wide, parts = agreement(found, asked, angle=40.0)
    assert float(parts["angle"][0]) == 20.0
    assert np.isnan(wide[0]) == (parts["cover"][0] < meta_view.COVER)
    middle = np.abs(np.arange(SIDE) - SIDE / 2) < SIDE / 5
    narrow = jnp.tile(jnp.asarray(np.outer(middle, middle).ravel(), jnp.float32), FRAMES)
    opacities = found.gaussians.opacities * narrow
    gaussians = found.gaussians.replace(opacities=opacities)
    score, parts = agreement(found.replace(gaussians=gaussians), asked)
    assert np.isnan(score[0]) and parts["cover"][0] < meta_view.COVER
    assert parts["angle"][0] == meta_view.ANGLE / 2


def test_who_shows_less_sits_no_easier_exam(room, monkeypatch):
    """A view from half the angle is easier, and comes when the first one shows too little."""
    found, asked = room
    found = moved(found, 1.0 + 0.1 * np.random.default_rng(0).normal(size=FRAMES))
    whole, parts = agreement(found, asked)
    assert float(parts["angle"][0]) == meta_view.ANGLE
    easier, _ = agreement(found, asked, angle=meta_view.ANGLE / 2)
    assert easier[0] > whole[0]
    monkeypatch.setattr(meta_view, "COVER", float(parts["cover"][0]) + 0.001)
    again, parts = meta_view.agreement(found, asked)  # not the compiled one of above
    assert float(parts["angle"][0]) == meta_view.ANGLE / 2
    np.testing.assert_allclose(again, whole, rtol=1e-4)


def test_a_path_may_start_anywhere():
    """Of a user's own: turned and moved, it asks for the same."""
    turn = np.array([[0, 0, 1, 3], [0, 1, 0, 2], [-1, 0, 0, 1], [0, 0, 0, 1]], np.float32)
    for name in commands.NAMES:
        asked = np.asarray(path(name))[None]
        assert meta_view.elevates(turn @ asked) == meta_view.elevates(asked)
        assert s_traj.moves(turn @ asked) == s_traj.moves(asked) == (name != "fixed")


def test_gaussians_of_fewer_frames_are_split_by_their_own(room):
    found, asked = room
    few = thinned(found, 2)
    assert few.gaussian_frames == 2 and found.gaussian_frames is None
    score, _ = agreement(few, asked)
    first, last = (
        jax.tree.map(lambda leaf, part=part: leaf[:, part], found.gaussians)
        for part in (slice(0, SIDE**2), slice(-(SIDE**2), None))
    )
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 1), first, last)
    again, _ = agreement(found.replace(gaussians=both, gaussian_frames=2), asked)
    np.testing.assert_array_equal(score, again)


def test_a_reconstruction_that_is_not_finite_is_not_judged(room):
    """The renderer leaves out what is not finite, and frames that disagree would agree again."""
    found, asked = room
    means = found.gaussians.means.at[:, 0].set(jnp.nan)
    broken = found.replace(gaussians=found.gaussians.replace(means=means))
    evidence = Evidence(jnp.zeros((1, FRAMES, 8, 8, 3)), asked, broken, jnp.full((1, FRAMES), 0.1))
    scores = {"meta_view": jnp.ones(1)}
    assert np.isnan(likeness.where_shown(scores, evidence)["meta_view"][0])
    assert likeness.where_shown(scores, evidence.replace(reconstruction=found))["meta_view"][0] == 1
    turned = found.replace(camtoworld=found.camtoworld.at[0, 1, 0, 3].set(jnp.nan), gaussians=None)
    lost = evidence.replace(reconstruction=turned)
    assert np.isnan(consistency.Mvcs().score({}, lost, ())["mvcs"][0])


@pytest.mark.slow
def test_as_a_reward_with_the_right_gradient(room):
    """The class says what the function says; every gradient is finite, and that of the colours has
    the slope of a finite difference."""
    found, asked = room
    found = moved(found, [1, 1.1, 1, 1.1])
    evidence = Evidence(jnp.zeros((1, FRAMES, 8, 8, 3)), asked, found, jnp.full((1, FRAMES), 0.1))

    @jax.jit
    def reward(evidence):
        def loss(found):
            parts = meta_view.MetaView().score({}, evidence.replace(reconstruction=found), ())
            return parts["meta_view"].sum(), parts

        return jax.value_and_grad(loss, has_aux=True)(evidence.reconstruction)

    (score, parts), gradient = reward(evidence)
    want, beside = agreement(found, asked)
    np.testing.assert_allclose(score, want[0], rtol=1e-5)
    assert set(parts) == {"meta_view", *(f"meta_view_{name}" for name in beside)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    slope = gradient.gaussians.sh
    along = slope / jnp.linalg.norm(slope)

    def at(step):
        gaussians = found.gaussians.replace(sh=found.gaussians.sh + step * along)
        found_there = found.replace(gaussians=gaussians)
        return float(reward(evidence.replace(reconstruction=found_there))[0][0])

    assert (at(0.1) - at(-0.1)) / 0.2 == pytest.approx(float(jnp.linalg.norm(slope)), rel=0.05)
    blank = evidence.replace(texture=jnp.zeros((1, FRAMES)))
    assert np.isnan(reward(blank)[0][0])


def test_ssim_of_shown_pixels():
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.uniform(size=(2, 2, 20, 24, 3)), jnp.float32)
    b = 0.5 * a + 0.5 * b
    everything = jnp.ones((2, 20, 24), bool)
    np.testing.assert_allclose(
        likeness.ssim_where(a, b, everything), likeness.ssim(a, b), atol=1e-5
    )
    left = everything.at[:, :, 12:].set(False)
    hidden = jnp.where(left[..., None], b, 0.0)
    np.testing.assert_allclose(
        likeness.ssim_where(a, b, left), likeness.ssim_where(a, hidden, left), atol=1e-6
    )
    assert float(likeness.ssim_where(a, b, ~everything)[0]) == 0


def test_bad_arguments_are_named(room):
    found, asked = room
    with pytest.raises(ValueError, match="asked has shape"):
        meta_view.agreement(found, asked[:, :2])
    with pytest.raises(ValueError, match="without Gaussians"):
        meta_view.agreement(found.replace(gaussians=None), asked)
    with pytest.raises(ValueError, match="split is 'thirds'"):
        meta_view.agreement(found, asked, split="thirds")
    with pytest.raises(ValueError, match="Gaussians of 1 frame"):
        meta_view.agreement(thinned(found, 1), asked)
    with pytest.raises(ValueError, match="angle is 0"):
        meta_view.MetaView(angle=0)
    with pytest.raises(ValueError, match="split is 'odd'"):
        meta_view.MetaView(split="odd")
