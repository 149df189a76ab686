"""Camera clauses of plain English: read as they are meant, or refused."""

import pytest

from worldr1_jax.camera import commands


@pytest.mark.parametrize(
    ("prompt", "names", "scene"),
    [
        ("Camera fixed. Moving up the stairs is an old man.", ["fixed"], None),
        ("Camera fixed. Family moves left.", ["fixed"], None),
        ("Camera first pushes in, then pans left. A box.", ["push_in", "pan_left"], "A box."),
        ("Camera very slowly pans left. A box.", ["pan_left"], "A box."),
        ("Camera movements: pan left. A box.", ["pan_left"], "A box."),
        ("Camera dramatically pushes in. A box.", ["push_in"], "A box."),
        ("Camera pull out to show more of the scene. A box.", ["pull_out"], "A box."),
        ("A row of camera dollies in a studio.", [], None),
    ],
)
def test_plain_english_is_neither_refused_nor_read_as_more(prompt, names, scene):
    assert not commands.complaint(prompt) and list(commands.parse(prompt)) == names
    assert commands.scene(prompt) == (scene or prompt.partition(". ")[2] or prompt)


@pytest.mark.parametrize("who", ["a butterfly", "Emily", "a family"])
def test_who_moves_is_no_manner(who):
    assert commands.complaint(f"Camera fixed, {who} moves left. A box.")


@pytest.mark.parametrize(
    ("clause", "want"),
    [
        ("Camera push in. Then it moves left.", ("push_in", "move_left")),
        ("Camera push in. Finally, it pulls out.", ("push_in", "pull_out")),
        ("Camera pans from left to right across the room.", ("pan_right",)),
        ("Camera pans from the left to the right slowly.", ("pan_right",)),
        ("Camera fixed. It stays still.", ("fixed",)),
    ],
)
def test_sentences_that_go_on_and_directions_that_are_none(clause, want):
    text = f"{clause} A red sphere."
    assert (commands.parse(text), commands.unknown(text)) == (want, ())


@pytest.mark.parametrize(
    "clause",
    [
        "Camera fixed on a car. It moves left.",
        "Camera push in on a car. It moves left.",
        "Camera moves left to the right of the table.",
        "Camera moves right to the left wall.",
        "Camera pan left with a zoom in.",
        "Camera orbit left around the statue twice.",
        "Camera push in toward the door in reverse.",
        "Camera pan left at 30 degrees per second.",
    ],
)
def test_what_would_be_dropped_made_up_or_turned_round_is_refused(clause):
    """It: the car. A place, not a direction. A count and a rate that nothing here honours."""
    assert commands.unknown(f"{clause} A red sphere.")


REFUSED = """
pans left over a desert at 40°C
pan left across a 360-degree panorama
orbit left around a globe tilted 23.5 degrees
orbits left around a 90 degree corner
pan left along a hot spring at 60 degrees
pans right at 5 degrees per second over the bay
orbits right around the statue at 30 degrees per second slowly
pan left 5 degrees a second
orbits left around the statue 2 times
orbits left around the statue two full turns
orbits left around the statue twice in a row
orbits left around the statue backwards
push in toward the door in reverse motion
pans right over 5 seconds
push in on a car. And then it moves left
push in on a car, then it moves left
push in on a car and it moves left
push in behind a car. Pan left. It moves left
push in with a car. It moves left
pan left. Do not tilt up
pan left. Don't tilt up
travels left along a wall
creeps forward
eases in
encircles the cat
revolves around the cat
push in - zoom
pans left: at a slow pace
pan left: no tilt
moves down the corridor
slowly moves up the hill
moves up close to the window
pans left to the right of the table
moves left to right wall
"""


@pytest.mark.parametrize("clause", REFUSED.strip().splitlines())
def test_what_a_place_or_a_thing_has_is_not_the_cameras(clause):
    """An angle of the scene, a count, a rate, what the camera sees moving, and ways of going that
    are none of ours are neither dropped nor read as a command."""
    assert commands.complaint(f"Camera {clause}. A box stands there.")


READ = {
    "orbit left around the statue 90 degrees": [("orbit_left", 90, "")],
    "orbit left around the statue, 90 degrees": [("orbit_left", 90, "")],
    "orbit left around the statue by 90 degrees slowly": [("orbit_left", 90, "slowly")],
    "pan right over 180 degrees": [("pan_right", 180, "")],
    "pushes in through a frame": ["push_in"],
    "pans left past each frame": ["pan_left"],
    "push in at night. It then pans left": ["push_in", "pan_left"],
    "pan left over a lake. It tilts up": ["pan_left", "tilt_up"],
    "push in. Then it moves left": ["push_in", "move_left"],
    "push in. Afterward, pan left": ["push_in", "pan_left"],
    "push in. Slow pan left": ["push_in", ("pan_left", None, "slowly")],
    "push in. Keep panning left": ["push_in", "pan_left"],
    "push in. Continue to pan left": ["push_in", "pan_left"],
    "push in. The view pans left": ["push_in", "pan_left"],
    "push in: slowly": [("push_in", None, "slowly")],
    "push in - then pan left": ["push_in", "pan_left"],
    "pan left — 30 degrees": [("pan_left", 30, "")],
    "move up over the hill": ["move_up"],
    "pans left to right on a beach": ["pan_right"],
    "pans left to right to reveal a city": ["pan_right"],
    "pans left to right by 30 degrees": [("pan_right", 30, "")],
    "pans right to left under the bridge": ["pan_left"],
    "pans slowly to the left": [("pan_left", None, "slowly")],
    "pushes slowly in": [("push_in", None, "slowly")],
    "tilts gently up": ["tilt_up"],
    "pans quickly right 30 degrees": [("pan_right", 30, "quickly")],
    "push in - toward the window. Then pan left to the desk": ["push_in", "pan_left"],
    "push in - cinematic. Then pan left": ["push_in", "pan_left"],
    "push in - past the trees; tilt up": ["push_in", "tilt_up"],
    "pan left - very slowly": [("pan_left", None, "slowly")],
    "pan left — in slow motion": [("pan_left", None, "slowly")],
    "move up to reveal the skyline, then pan left": ["move_up", "pan_left"],
    "moves down a little and pans left": ["move_down", "pan_left"],
    "begins with a slow push in, then it moves left": [
        ("push_in", None, "slowly"),
        "move_left",
    ],
    "push in for a while, then it pulls out": ["push_in", "pull_out"],
    "pans left past a tree, and it tilts up past a moving train": ["pan_left", "tilt_up"],
    "pans left past houses in a row": ["pan_left"],
    "pushes in on a man walking backwards": ["push_in"],
    "pushes in on a clock showing five minutes to noon": ["push_in"],
    "pushes in on a bomb with 10 seconds left": ["push_in"],
    "orbits left around the bed 180 degrees": [("orbit_left", 180, "")],
    "orbit left of 90 degrees around the statue": [("orbit_left", 90, "")],
    "orbits left through an arc of 90 degrees": [("orbit_left", 90, "")],
    "tilts up toward the sky 20 degrees to reveal a bird": [("tilt_up", 20, "")],
    "push in. The shot is slow": [("push_in", None, "slowly")],
}


@pytest.mark.parametrize("clause", READ)
def test_plain_clauses_are_read(clause):
    want = tuple(
        commands.Move(x) if isinstance(x, str) else commands.Move(*x) for x in READ[clause]
    )
    prompt = f"Camera {clause}. A box stands there."
    assert commands.understood(prompt) == want
    assert commands.scene(prompt) == "A box stands there."


@pytest.mark.parametrize("mark", [": ", " - ", " – ", " — ", "—"])
def test_the_scene_may_follow_in_the_same_sentence(mark):
    prompt = f"Camera push in{mark}a red fox in snow. Flakes fall."
    assert commands.parse(prompt) == ("push_in",) and not commands.complaint(prompt)
    assert commands.scene(prompt) == "a red fox in snow. Flakes fall."
    slow = f"Camera push in{mark}slowly{mark}a fox."
    assert commands.moves(slow) == (commands.Move("push_in", None, "slowly"),)


@pytest.mark.parametrize(
    "scene",
    [
        "Slow rivers run.", "The shot glows.", "Quick moving clouds.", "View up the street.",
        "The view up the street is clear.", "View left. A fox.", "Second half of a match.",
    ],
)  # fmt: skip
def test_what_follows_may_be_the_scene(scene):
    assert commands.scene(f"Camera push in. {scene}") == scene


def test_letters_that_change_their_length_cut_nothing():
    for prompt in ("Camera pan left over İzmir, İstanbul: 家", "Camera push in on İİ — x"):
        assert commands.parse(prompt)
    prompt = "Camera push in through İstanbul: a red fox in the snow."
    assert commands.scene(prompt) == "a red fox in the snow."


def test_a_thing_that_travels_is_no_camera():
    assert commands.scene("Camera travel gear on a shelf.") == "Camera travel gear on a shelf."
