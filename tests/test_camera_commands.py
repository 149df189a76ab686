"""Camera commands: the published grammar, its edges, and the inverse."""

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
