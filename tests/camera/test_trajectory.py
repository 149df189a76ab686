"""Camera paths: signs, composition, and geometry that the released code gets wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldr1_jax.camera import commands, trajectory

NANO = trajectory.Magnitudes.nano()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(commands.NAMES), max_size=4), st.integers(5, 81))
def test_every_path_is_rigid_and_starts_at_the_identity(names, frames):
    path = trajectory.path(names, frames)
    assert path.shape == (frames, 4, 4) and path.dtype == np.float32
    np.testing.assert_array_equal(path[0], np.eye(4))
    rotation = path[:, :3, :3].astype(np.float64)
    # 1e-6: a few float32 roundings of entries in [-1, 1].
    product = rotation @ rotation.swapaxes(1, 2)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(3), product.shape), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, atol=1e-6)
    np.testing.assert_array_equal(path[:, 3], np.tile([0, 0, 0, 1], (frames, 1)))


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("push_in", (0, 0, 600)),
        ("pull_out", (0, 0, -600)),
        ("move_right", (220, 0, 0)),
        ("move_left", (-220, 0, 0)),
        ("move_up", (0, -220, 0)),
        ("move_down", (0, 220, 0)),
        ("fixed", (0, 0, 0)),
    ],
)
def test_translations_go_their_way_at_constant_speed(name, offset):
    path = trajectory.path((name,), 81)
    expected = np.linspace(0, 1, 81)[:, None] * np.array(offset)
    np.testing.assert_allclose(path[:, :3, 3], expected, rtol=1e-6)
    np.testing.assert_array_equal(path[:, :3, :3], np.tile(np.eye(3), (81, 1, 1)))


@pytest.mark.parametrize(
    ("name", "axis", "sign"),
    [("pan_right", 0, 1), ("pan_left", 0, -1), ("tilt_down", 1, 1), ("tilt_up", 1, -1)],
)
def test_pans_turn_the_view(name, axis, sign):
    path = trajectory.path((name,), 17)
    forward = path[-1, :3, 2]
    assert forward[axis] == pytest.approx(sign * np.sin(np.radians(14)), abs=1e-6)
    np.testing.assert_array_equal(path[:, :3, 3], 0.0)


def test_roll_right_turns_the_image_left():
    down_in_world = trajectory.path(("roll_right",), 9)[-1, :3, 1]
    assert down_in_world[0] < 0  # clockwise from behind: the camera's foot swings to the left


@pytest.mark.parametrize(("name", "sign"), [("orbit_right", 1), ("orbit_left", -1)])
def test_orbits_face_their_centre(name, sign):
    path = trajectory.path((name,), 17, magnitudes=NANO).astype(np.float64)
    centre = np.array([0, 0, NANO.orbit_radius])
    to_centre = centre - path[:, :3, 3]
    distance = np.linalg.norm(to_centre, axis=-1)
    np.testing.assert_allclose(distance, NANO.orbit_radius, rtol=1e-6)
    np.testing.assert_allclose(to_centre / distance[:, None], path[:, :3, 2], atol=1e-6)
    assert sign * path[-1, 0, 3] == pytest.approx(4 * np.sin(np.radians(24)), rel=1e-6)


def test_segments_compose_as_poses_without_a_stall():
    path = trajectory.path(("pan_right", "push_in"), 81)
    alone = trajectory.path(("pan_right",), 41)
    np.testing.assert_allclose(path[:41], alone, atol=1e-6)
    # The push goes along the turned view, and every step of it moves.
    steps = np.diff(path[40:, :3, 3], axis=0)
    np.testing.assert_allclose(steps, np.tile(path[40, :3, 2] * 600 / 40, (40, 1)), rtol=1e-3)


def test_frames_of_each_command():
    assert trajectory.segments(2, 81) == (41, 40)
    assert trajectory.segments(3, 81) == (27, 27, 27)
    assert trajectory.segments(4, 17) == (5, 4, 4, 4)


def test_a_pan_is_an_exact_rotation():
    """The release's far origin makes pans look like noise to a trajectory reward."""
    path = trajectory.path(("pan_left",), 81)
    assert np.ptp(path[:, :3, 3]) == 0.0


def test_fixed_and_none_stay_at_the_identity():
    for names in ((), ("fixed",), ("fixed", "fixed")):
        np.testing.assert_array_equal(
            trajectory.path(names, 9), np.tile(np.eye(4, dtype=np.float32), (9, 1, 1))
        )
    assert trajectory.path((), 1).shape == (1, 4, 4)
    assert trajectory.path(("fixed",) * 3, 2).shape == (2, 4, 4)


def test_bad_input():
    with pytest.raises(ValueError, match="zoom"):
        trajectory.path(("zoom",), 9)
    with pytest.raises(ValueError, match="2 frames are too few for 2 camera commands"):
        trajectory.path(("pan_left", "push_in"), 2)
    with pytest.raises(ValueError, match="at least 1 frame"):
        trajectory.path((), 0)


def test_a_speed_changes_how_far_a_command_goes():
    for name in ("push_in", "orbit_left", "tilt_up"):
        slow = trajectory.path([commands.Move(name, None, "slowly")], 81)
        usual = trajectory.path([name], 81)
        # Half the rate: the slow path at frame 80 is where the usual one is at frame 40.
        np.testing.assert_allclose(slow[80], usual[40], atol=1e-4)  # lengths of hundreds, float32
    quick = trajectory.path([commands.Move("push_in", None, "quickly")], 9)
    np.testing.assert_allclose(quick[-1, 2, 3], 900.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["pan_right", "tilt_down", "roll_left", "orbit_right"])
def test_an_angle_is_reached_exactly(name):
    path = trajectory.path([commands.Move(name, 90)], 17, magnitudes=NANO).astype(np.float64)
    angle = np.degrees(np.arccos((np.trace(path[-1, :3, :3]) - 1) / 2))
    assert angle == pytest.approx(90, abs=1e-4)  # float32 entries


def test_with_an_angle_a_speed_changes_the_share_of_frames():
    moves = commands.moves("Camera pan left 30 degrees slowly, then push in.")
    path = trajectory.path(moves, 81)
    assert np.count_nonzero(np.abs(np.diff(path[:, 2, 3])) > 1e-3) == 27  # a third of 81
    turn = np.degrees(np.arcsin(-path[-1, 0, 2]))
    assert turn == pytest.approx(30, abs=1e-4)


def test_moves_without_angle_or_speed_are_names():
    names = ("move_left", "pull_out", "pan_left")
    np.testing.assert_array_equal(
        trajectory.path(commands.check(names), 81), trajectory.path(names, 81)
    )


def test_a_prompt_with_more_movements_than_frames_is_named():
    trajectory.check_fit(["Camera pan left; push in. A box."], 5)
    first = "Camera pan left 30 degrees quickly, then pan right 30 degrees slowly. A box."
    with pytest.raises(
        ValueError, match="5 frames are too few for 2 camera commands"
    ):  # 1 frame, that of the start
        trajectory.check_fit([first], 5)
    with pytest.raises(
        ValueError, match=r"prompt 'Camera pan left; push in\. A box\.': 2 frames are too few"
    ):
        trajectory.check_fit(["A box.", "Camera pan left; push in. A box."], 2)
