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
