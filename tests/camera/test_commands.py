"""Camera commands: the published grammar, its edges, and the inverse."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldr1_jax.camera import commands


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Camera push in, then pan left. A red sphere.", ("push_in", "pan_left")),
        (
            "Camera move left, pull out, then pan left. A city.",
            ("move_left", "pull_out", "pan_left"),
        ),
        (
            "camera ORBIT LEFT, transitioning into a pan right. A lake.",
            ("orbit_left", "pan_right"),
        ),
        ("Camera slowly pushes in and pans left", ("push_in", "pan_left")),
        ("Camera moving right. Sea", ("move_right",)),
        ("Camera push in, then fixed. A wall.", ("push_in", "fixed")),
        ("Camera fixed. A lake.", ("fixed",)),
        ("The camera tilts up. A tower.", ("tilt_up",)),
        ("A crowd. People move left and push in.", ()),
        ("Camera on a tripod. A dog, pan left.", ()),
        ("A retro camera lens.", ()),
        ("Camera push into the span left.", ()),
        ("Cameraman push in.", ()),
        ("", ()),
    ],
)
def test_parse(text, names):
    assert commands.parse(text) == names


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(commands.NAMES), max_size=5), st.sampled_from([str.upper, str]))
def test_text_is_the_inverse(names, case):
    clause = commands.text(names)
    prompt = case(clause + " A pan left of the push in.") if names else "A pan left."
    assert commands.parse(prompt) == tuple(names)
    assert commands.unknown(prompt) == ()


def test_text_writes_the_published_form():
    names = ("move_left", "pull_out", "pan_left")
    assert commands.text(names) == "Camera move left, pull out, then pan left."
    assert commands.text(()) == ""
    with pytest.raises(ValueError, match="fly_up"):
        commands.text(("fly_up",))


def test_unknown_movements_are_reported():
    prompt = "Camera push in, then dolly zoom, crane up and pan left. A cat."
    assert commands.parse(prompt) == ("push_in", "pan_left")
    assert commands.unknown(prompt) == ("dolly zoom", "crane up")
    assert commands.unknown("Camera slowly pan left, transitioning into a pull out. X") == ()
    assert commands.unknown("A crane.") == ()


def test_scene_is_the_prompt_without_its_clause():
    assert commands.scene("Camera pan left. A cat sat. On a mat.") == "A cat sat. On a mat."
    assert commands.scene("A cat.") == "A cat."


@pytest.mark.parametrize(
    ("text", "moves"),
    [
        (
            "Camera pan left 30 degrees, then push in slowly. X",
            [("pan_left", 30), ("push_in", None, "slowly")],
        ),
        (
            "Camera slowly pan left and tilt up by 7.5°. X",
            [("pan_left", None, "slowly"), ("tilt_up", 7.5)],
        ),
        (
            "CAMERA: 20-DEGREE ORBIT RIGHT, PULL OUT FAST",
            [("orbit_right", 20), ("pull_out", None, "quickly")],
        ),
        ("Camera rolls to the left 90 deg, moves up", [("roll_left", 90), ("move_up",)]),
        ("Camera move down, then roll right.", [("move_down",), ("roll_right",)]),
    ],
)
def test_angles_and_speeds(text, moves):
    expected = tuple(commands.Move(*move) for move in moves)
    assert commands.moves(text) == expected
    assert commands.unknown(text) == ()
    assert commands.moves(commands.text(expected) + " X") == expected


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("Camera crane up. A crane.", ("crane up",)),
        ("Camera dolly zoom.", ("dolly zoom",)),
        ("Camera zooms in, then pan left. X", ("zooms in",)),
        ("Camera push in 30 degrees. X", ("30 degrees",)),  # what does not turn has no angle
        ("Camera pan left 400 degrees. X", ("400 degrees",)),
        ("Camera pan left, then kaleidoscope. X", ("kaleidoscope",)),
        ("Camera frobnicate left. X", ("frobnicate left",)),
        ("Camera whip pan left. X", ("whip",)),
        ("Camera craning down. X", ("craning down",)),
    ],
)
def test_every_unknown_movement_of_the_clause_is_named(text, phrases):
    assert commands.unknown(text) == phrases
    assert phrases[0] in commands.complaint(text)


@pytest.mark.parametrize(
    "text",
    [
        "Camera pan left. A crane lifts a beam, and a truck and a dolly wait by the tracks.",
        "Camera push in toward the red crane. X",
        "Camera push in over water and past a crane. X",
        "A crane rises; zoom lens on a table.",
        "Camera crane on a film set. X",
        "Camera shop on a corner. Lenses tilt up.",
        "Camera track curving through sand. X",
        "",
    ],
)
def test_things_of_the_scene_are_no_movements(text):
    assert commands.unknown(text) == () and commands.complaint(text) == ""
    if not commands.moves(text):
        assert commands.scene(text) == text


@pytest.mark.parametrize(
    ("text", "names", "scene"),
    [
        ("Camera pans left to right. X", ("pan_right",), "X"),
        ("Camera orbits from the right to the left. X", ("orbit_left",), "X"),
        ("Camera moves leftwards. X", ("move_left",), "X"),
        ("Camera push in; pan left. A cat.", ("push_in", "pan_left"), "A cat."),
        ("Camera pan left; a cat moves left.", ("pan_left",), "a cat moves left."),
        ("Camera push in. Then pan left. A cat.", ("push_in", "pan_left"), "A cat."),
        ("Camera push in... then pan left. A cat.", ("push_in", "pan_left"), "A cat."),
        ("Camera push in. The camera pans left. Tea", ("push_in", "pan_left"), "Tea"),
        ("Camera push in. Then a door opens.", ("push_in",), "Then a door opens."),
        ("Camera push in → pan left & tilt up. X", ("push_in", "pan_left", "tilt_up"), "X"),
        ("\ufeffCamera pan left. X", ("pan_left",), "X"),
        ("\u200e\u200bCam\u00adera pan\u200b left. A\u200bB", ("pan_left",), "A\u200bB"),
        ("Ｃａｍｅｒａ　ｐａｎ　ｌｅｆｔ。 猫", ("pan_left",), "猫"),
        ("“Camera pan left.” A cat.", ("pan_left",), "A cat."),
        ("'Camera pan left.' A cat.", ("pan_left",), "A cat."),
        ("- Camera pan left. X", ("pan_left",), "X"),
        ("• Camera pan left. X", ("pan_left",), "X"),
        ("12) Camera pan left. X", ("pan_left",), "X"),
        ("1. “Camera pan left.” X", ("pan_left",), "X"),
        ("**Camera**: pan left. X", ("pan_left",), "X"),
        ("[Camera pan left] A cat on a mat.", ("pan_left",), "A cat on a mat."),
        ("Camera_pan_left. X", ("pan_left",), "X"),
        ("Camera push in toward the left door. X", ("push_in",), "X"),
        ("Camera pan left over a house without 3 windows. X", ("pan_left",), "X"),
        ("Camera pan left while a cat sleeps. X", ("pan_left",), "X"),
        ("Camera pan left at night time. X", ("pan_left",), "X"),
        ("Camera pan left. Push in. A cat.", ("pan_left", "push_in"), "A cat."),
        ("Camera. Pan left... and push in. A cat.", ("pan_left", "push_in"), "A cat."),
        ("Camera 'pan left', then \"push in\". X", ("pan_left", "push_in"), "X"),
        ("Camera [pan left], push in. X", ("pan_left", "push_in"), "X"),
        (
            "Camera motion: pan left. Fixed to a wall, a lamp.",
            ("pan_left",),
            "Fixed to a wall, a lamp.",
        ),
    ],
)
def test_how_clauses_are_written_in_the_wild(text, names, scene):
    assert commands.parse(text) == names and commands.unknown(text) == ()
    assert commands.scene(text) == scene


@pytest.mark.parametrize(
    ("text", "moves"),
    [
        ("Camera pan left, 30 degrees, slowly. X", [("pan_left", 30, "slowly")]),
        ("Camera slowly, pan left. X", [("pan_left", None, "slowly")]),
        ("Camera pan left +30º. X", [("pan_left", 30)]),
        ("Camera push in toward the slow river. X", [("push_in",)]),
        ("Camera push in toward the river slowly. X", [("push_in", None, "slowly")]),
        ("Camera push in on a slowly spinning top. X", [("push_in",)]),
        ("Camera pan left to the fast river. X", [("pan_left",)]),
        ("Camera swiftly pan left. X", [("pan_left", None, "quickly")]),
        ("Camera (slowly) pan left. 20 degrees. X", [("pan_left", 20, "slowly")]),
    ],
)
def test_how_far_and_how_fast_belong_to_the_command_that_they_stand_by(text, moves):
    assert commands.understood(text) == tuple(commands.Move(*move) for move in moves)


@pytest.mark.parametrize(
    "text",
    [
        "Camera does not pan left. X",
        "Camera doesn’t pan left. X",
        "Camera never pans left. X",
        "Camera pan not left. X",
        "Camera stops panning left. X",
        "Camera pan left, not right. X",
        "Camera pan left instead of right. X",
        "Camera pan left or right. X",
        "Camera pan left/right. X",
        "Camera pan left and right. X",
        "Camera pan left after pushing in. X",
        "Camera push in while panning left. X",
        "Camera pan left 30 degrees to the right. X",
        "Camera pan left in reverse. X",
        "Camera orbit clockwise. X",
        "Camera pan left -30 degrees. X",
        "Camera pan left −30°. X",
        "Camera pan left-30 degrees. X",
        "Camera pan left 20-30 degrees. X",
        "Camera pan left 30 degrees 20 degrees. X",
        "Camera pan left 0 degrees. X",
        "Camera pan left 1,000 degrees. X",
        "Camera pan left 30. X",
        "Camera pan left 0.5 rad. X",
        "Camera pan left for 3 seconds. X",
        "Camera pan left twice. X",
        "Camera pan left by half. X",
        "Camera slowly quickly pan left. X",
        "Camera left pan. X",
        "Camera: cinematic zoom. X",
        "Camera push in; dolly zoom. X",
        "Camera push in. Then zoom in. X",
        "A city at night. Camera pans left.",
        "A city, the camera slowly pans left.",
        "Slow motion. Camera pan left. X",
        "A ship at sea. The camera rolls right.",
        "A ship at sea. The camera zooms in.",
        "<camera>pan left</camera> X",
        "A cat. Camera - pan left.",
        "Camera refuses to pan left. X",
        "Camera hardly pans left. X",
        "Camera pan left is forbidden. X",
        "Camera pan left minus 30 degrees. X",
        "Camera pan left ‑30 degrees. X",
        "Camera pan left .5 degrees. X",
        "Camera pan left less than 30 degrees. X",
        "Camera pan left 30 degrees per second. X",
        "Camera pan left two times. X",
        "Camera pan left ½ turn. X",
        "Camera pan left at high speed. X",
        "Camera pan left, push in at the same time. X",
        "Camera pan left when a cat moves. X",
        "Camera pan left with a push in. X",
        "Camera pan left, push in first. X",
        "Camera pan left-ish. X",
        "Camera: 1. pan left 2. push in. X",
        "Camera pan left, a cat moves left. X",
        "Camera pan left to reveal a dog moving right. X",
        "Camera operator moves left. X",
    ],
)
def test_what_moves_do_not_honour_is_never_passed_over(text):
    assert commands.unknown(text), commands.moves(text)
    with pytest.raises(
        ValueError, match=r'^a prompt asks for what the camera cannot ".+" \(it can'
    ):
        commands.understood(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Camera pan left, and a cat moves left. X", "pan_left"),
        ("Camera push in to the man who rolls left. X", "push_in"),
    ],
)
def test_what_others_do_is_no_command(text, name):
    assert commands.parse(text) == (name,)


@pytest.mark.parametrize(
    "piece",
    [
        ",", "pan left,", "slowly,", ".then", "camera ", "(", ";", "1. ", " - ", " - 5", "— no",
        ": x no", " a -", "it ", " ", " 5 degrees",
    ],
)  # fmt: skip
def test_a_long_text_takes_no_longer_than_its_length(piece):
    """100 kB, which take 0.2 s; what grew with the square would take minutes."""
    began = time.process_time()
    for opening in ("Camera pan left, ", "Camera pan left at x"):
        commands.complaint(opening + piece * (50_000 // len(piece)) + "x")
    assert time.process_time() - began < 5


def test_a_negated_movement_is_none():
    assert commands.moves("Camera does not pan left, push in. X") == (commands.Move("push_in"),)


def test_all_prompts_with_unknown_movements_are_named_at_once():
    commands.check_prompts(["Camera pan left. A crane.", "A crane."])
    with pytest.raises(
        ValueError, match=r'prompt 2 "crane up", prompt 3 "zoom in": the camera can'
    ):
        commands.check_prompts(["X", "Camera crane up. X", "Camera zoom in. X"])


def test_wrong_moves_are_refused():
    for move in (
        commands.Move("push_in", 30), commands.Move("pan_left", 0),
        commands.Move("pan_left", 361), commands.Move("pan_left", None, "briskly"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="Camera"):
            commands.check([move])


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
