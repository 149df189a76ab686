"""S_traj on every command: the path itself, small errors, and paths that must not win."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.camera import commands, trajectory
from worldr1_jax.geometry import rotation_angle
from worldr1_jax.rewards.trajectory import errors, parts, s_traj, s_traj_segments

FRAMES = 17
NANO = trajectory.Magnitudes.nano()
DEPTH = NANO.scene_depth
MOVING = [name for name in commands.PUBLISHED if name != "fixed"]
OPPOSITE = {"left": "right", "right": "left", "push": "pull", "pull": "push"} | {
    "in": "out",
    "out": "in",
}
compiled = jax.jit(s_traj)


def path(*names):
    return trajectory.path(names, FRAMES, magnitudes=NANO)


def score(asked, recovered, depth_scale=DEPTH):
    pair = jnp.asarray(asked)[None], jnp.asarray(recovered, jnp.float32)[None]
    return float(compiled(*pair, depth_scale=depth_scale)[0])


def turn(axis, degrees):
    """Right-handed rotation by `degrees` about a unit `axis`."""
    x, y, z = np.asarray(axis) * np.deg2rad(degrees)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    if angle == 0:
        return np.eye(3)
    sine, cosine = np.sin(angle) / angle, (1 - np.cos(angle)) / angle**2
    return np.eye(3) + sine * cross + cosine * cross @ cross


def walk(seed):
    """A random walk as long as a command's path, turning by a degree or so a frame."""
    rng = np.random.default_rng(seed)
    poses = [np.eye(4)]
    for _ in range(FRAMES - 1):
        step = np.eye(4)
        step[:3, 3] = rng.normal(size=3) * 0.1
        axis = rng.normal(size=3)
        step[:3, :3] = turn(axis / np.linalg.norm(axis), rng.normal() * 3)
        poses.append(poses[-1] @ step)
    return np.stack(poses).astype(np.float32)


def opposite(name):
    return path("_".join(OPPOSITE.get(word, word) for word in name.split("_")))


@pytest.mark.parametrize("name", commands.PUBLISHED)
@pytest.mark.parametrize("unit", [0.25, 1.0, 30.0])
def test_the_path_itself_scores_one_in_any_unit(name, unit):
    found = path(name)
    found[:, :3, 3] *= unit
    assert score(path(name), found, depth_scale=DEPTH * unit) >= 0.98


@pytest.mark.parametrize("name", MOVING)
def test_other_cameras_score_far_less(name):
    asked = path(name)
    assert score(asked, path("fixed")) <= 0.25
    assert score(asked, opposite(name)) <= 0.25
    walks = [score(asked, walk(seed)) for seed in range(16)]
    assert np.mean(walks) <= 0.25 and max(walks) <= 0.6, walks


@pytest.mark.parametrize("name", MOVING)
def test_other_commands_score_less(name):
    for other in MOVING:
        if other != name:
            assert score(path(name), path(other)) <= 0.5, other


def test_fixed_camera():
    asked = path("fixed")
    assert score(asked, path("fixed")) >= 0.999
    for name in MOVING:
        assert score(asked, path(name)) <= 0.3, name
    assert np.mean([score(asked, walk(seed)) for seed in range(8)]) <= 0.3


@pytest.mark.parametrize("name", commands.PUBLISHED)
def test_small_errors_cost_little(name):
    asked = path(name)
    found = asked.copy()
    progress = np.linspace(0, 1, FRAMES)
    length = max(np.linalg.norm(asked[:, :3, 3], axis=-1).max(), 0.05 * DEPTH)
    for frame in range(FRAMES):  # 2 degrees and 5% of the path at the end
        found[frame, :3, :3] = found[frame, :3, :3] @ turn([0.6, 0.0, 0.8], 2 * progress[frame])
        found[frame, :3, 3] += 0.05 * length * progress[frame] * np.array([0.6, 0.8, 0.0])
    assert score(asked, found) >= 0.9


def test_noise_of_a_still_camera_is_not_scaled_up():
    """A thousandth of the depth, in the right direction, is not a push-in."""
    found = path("push_in")
    found[:, :3, 3] *= 0.001 * DEPTH / NANO.push
    assert score(path("push_in"), found) <= 0.3


def test_first_cameras_need_not_be_the_identity():
    world = np.eye(4, dtype=np.float32)
    world[:3, :3] = turn([0, 1, 0], 50)
    world[:3, 3] = 3, -2, 1
    for name in commands.PUBLISHED:
        assert score(path(name), world @ path(name)) >= 0.98


def test_sequences():
    asked = path("push_in", "pan_left")
    assert score(asked, asked) >= 0.98
    assert score(asked, path("pan_left", "push_in")) < 0.7
    assert score(asked, path("push_in", "pan_right")) <= 0.3


def test_batch_finite_and_nan():
    asked = np.stack([path(name) for name in commands.PUBLISHED])
    found = np.stack([walk(seed) * 1e3 for seed in range(len(asked))])
    found[:, :, 3] = 0, 0, 0, 1
    result = np.asarray(s_traj(jnp.asarray(asked), jnp.asarray(found)))
    assert np.all(np.isfinite(result)) and np.all((result >= 0) & (result <= 1))
    found[2, 5, 0, 0] = np.nan
    result = np.asarray(s_traj(jnp.asarray(asked), jnp.asarray(found)))
    assert np.isnan(result[2]) and np.isfinite(np.delete(result, 2)).all()
    with pytest.raises(ValueError, match="two equal shapes"):
        s_traj(jnp.asarray(asked), jnp.asarray(found[:, 1:]))


def test_rotation_angle_is_exact_near_zero():
    degrees = [0.0, 1e-3, 0.1, 14.0, 179.0]
    matrices = np.stack([turn([0.0, 0.6, 0.8], angle) for angle in degrees]).astype(np.float32)
    np.testing.assert_allclose(np.rad2deg(rotation_angle(matrices)), degrees, rtol=1e-3, atol=1e-6)


def test_errors_by_hand():
    """Three frames, positions 0, 1, 2 ahead: 10 degrees off at the last; then to the side."""
    asked = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    asked[:, 2, 3] = 0, 1, 2
    found = asked.copy()
    found[2, :3, :3] = turn([0, 1, 0], 10)
    result = {name: float(value[0]) for name, value in errors(asked[None], found[None]).items()}
    assert result["rot_err"] == pytest.approx(np.deg2rad(10), rel=1e-4)
    assert result["trans_err"] == pytest.approx(0, abs=1e-4)
    # |R - I| in Frobenius norm is 2 sqrt(2) sin(angle / 2)
    assert result["cam_mc"] == pytest.approx(8**0.5 * np.sin(np.deg2rad(5)), rel=1e-3)
    found[:, :3, 3] = found[:, [2, 0, 1], 3]  # sideways: no scale helps, so it is left out
    assert float(errors(asked[None], found[None])["trans_err"][0]) == pytest.approx(1.5, rel=1e-3)


def test_parts_say_which_half_is_wrong():
    """A pan where a move was asked for: no translation, and rotation where there was none."""
    asked, turned = jnp.asarray(path("move_left"))[None], jnp.asarray(path("pan_left"))[None]
    right = parts(asked, asked, depth_scale=DEPTH)
    wrong = parts(asked, turned, depth_scale=DEPTH)
    product = wrong["translation"] * wrong["rotation"]
    np.testing.assert_allclose(product, s_traj(asked, turned, depth_scale=DEPTH), rtol=1e-5)
    assert right["translation"][0] > 0.99 and right["rotation"][0] > 0.99
    assert wrong["translation"][0] < 0.3 and wrong["rotation"][0] < 0.3


def by_segments(asked, recovered, frames=3):
    """The path's scores at every fourth frame, as the 3D network sees nano's videos."""
    pair = (jnp.asarray(x, jnp.float32)[None, ::4] for x in (asked, recovered))
    return float(s_traj_segments(*pair, depth_scale=DEPTH, frames=frames)[0])


def test_one_segment_is_the_whole_path():
    for name in ("push_in", "orbit_left", "fixed"):
        for found in (path(name), walk(1), path("move_left")):
            pair = jnp.asarray(path(name))[None], jnp.asarray(found)[None]
            whole = s_traj(*pair, depth_scale=DEPTH)
            one = s_traj_segments(*pair, depth_scale=DEPTH, frames=FRAMES)
            np.testing.assert_allclose(one, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", commands.PUBLISHED)
def test_segments_know_right_from_wrong(name):
    assert by_segments(path(name), path(name)) >= 0.98
    if name != "fixed":
        assert by_segments(path(name), path("fixed")) <= 0.25
        assert by_segments(path(name), opposite(name)) <= 0.25
        assert by_segments(path("fixed"), path(name)) <= 0.3


def test_a_jump_condemns_the_segments_that_contain_it():
    """All that follows is 20 degrees off: two of three segments hold the jump, or one of
    four."""
    asked = path("push_in")
    jumped = asked.copy()
    jumped[9:, :3, :3] = turn([0, 1, 0], 20)
    assert by_segments(asked, jumped, frames=3) == pytest.approx(1 / 3, abs=0.05)
    assert by_segments(asked, jumped, frames=2) == pytest.approx(3 / 4, abs=0.05)
    assert score(asked, jumped) < 0.01


def test_segments_share_one_scale():
    """Half the way at once and then none is no even push, however each half is scaled."""
    asked, found = path("push_in"), path("push_in")
    found[:, 2, 3] = np.minimum(2 * found[:, 2, 3], found[-1, 2, 3])
    assert by_segments(asked, found) < 0.7
    with pytest.raises(ValueError, match="segments are of 9 frames"):
        by_segments(asked, found, frames=9)
