"""Camera commands at the head of a prompt: "Camera push in, then pan left. A red sphere ...".

The nine published names are in `PUBLISHED`. Ours, which the published parser reads as no command,
are `EXTENSIONS`, an angle ("pan left 30 degrees", for what turns), and "slowly" or "quickly". The
clause is the sentence that opens the prompt with the word "Camera", if it asks for a movement:
"Camera shop on a corner." is a scene, and so is everything after the clause.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

PUBLISHED: tuple[str, ...] = (
    "push_in",
    "pull_out",
    "move_left",
    "move_right",
    "orbit_left",
    "orbit_right",
    "pan_left",
    "pan_right",
    "fixed",
)
EXTENSIONS: tuple[str, ...] = (
    "tilt_up",
    "tilt_down",
    "move_up",
    "move_down",
    "roll_left",
    "roll_right",
)
NAMES: tuple[str, ...] = PUBLISHED + EXTENSIONS
SPEEDS: tuple[str, ...] = ("", "slowly", "quickly")
TURNS: tuple[str, ...] = tuple(
    name for name in NAMES if name.startswith(("pan", "tilt", "roll", "orbit"))
)


class Move(NamedTuple):
    """One command as a prompt asks for it.

    Attributes:
      name: out of `NAMES`.
      degrees: angle to turn by, above 0 and at most 360; None for the usual one. Only `TURNS`
        have it.
      speed: out of `SPEEDS`; "" is the usual one.
    """

    name: str
    degrees: float | None = None
    speed: str = ""


# A point inside "7.5 degrees" does not end the clause.
_CLAUSE = re.compile(
    r"\s*(?:the\s+)?camera\b(?P<body>(?:[^.!?;\n]|(?<=\d)\.(?=\d))*)(?:[.!?;\n]\s*)?",
    re.IGNORECASE,
)
_ENDING = "(?:s|es|d|ed|ing|ning|ting)?"  # pushes in, panning left
_GAP = r"[\s_-]+"


def _phrase(name: str) -> str:
    """Regular expression of one command: inflected verb, any separator, whole words only."""
    verb, *direction = name.split("_")
    if verb == "move":
        verb = "mov(?:e)?"
    ending = "" if verb == "fixed" else _ENDING
    if direction and direction[0] in ("left", "right"):  # "pans to the left"
        direction[0] = rf"(?:to\s+(?:the|its)\s+)?{direction[0]}"
    return _GAP.join([verb + ending, *direction])


_COMMANDS = re.compile(
    r"(?<![a-z])(?:" + "|".join(f"(?P<{name}>{_phrase(name)})" for name in NAMES) + r")(?![a-z])"
)
_SEPARATOR = re.compile(r",|\bthen\b|\band\b|\btransition(?:s|ing)\b")
_DEGREES = re.compile(r"(?:\bby\s+)?(?<![\w.])(\d+(?:\.\d+)?)[\s-]*(?:°|deg(?:rees?)?\b)")
_SPEED = re.compile(r"\b(?:(?P<slowly>slow(?:ly)?)|(?P<quickly>quick(?:ly)?|fast|rapid(?:ly)?))\b")


def _listed(words: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", words))


# Words that may stand between commands without asking for any movement.
_FILLERS = _listed(
    "then and while transitioning transitions into a an the to slowly gently smoothly quickly "
    "slightly steadily shot camera is remains stays view movement"
)
# What a camera can be asked for that is no command here. The verbs always ask for movement; the
# others are things as well, and ask for it before a direction or the end ("crane up"), or
# inflected ("craning").
_VERBS = re.compile(
    r"(?:zoom|doll(?:y|ie)|fl(?:y|ie)|follow|swoop|div|rotat|descend|ascend|whip|strafe|retreat|"
    r"approach|advance|glid|zigzag|spin|rush|lift|lower|push|pull|mov|pan|tilt|orbit|hover|climb|"
    r"tumbl|plung|soar)(?:e|ing|ning|ming|ping|s|es|ed)?"
)
_THINGS = _listed(
    "crane truck track boom jib pedestal arc spiral circle drop shake handheld sweep turn roll "
    "swing rise float drift slide dip bank loop flip walk back jump fall"
)
_INFLECTED = re.compile(
    rf"(?:{'|'.join(sorted(word.rstrip('e') for word in _THINGS))})\w?(?:ing|es|s)"
)
_DIRECTIONS = _listed(
    "up down left right in out forward forwards backward backwards back over around upward upwards "
    "downward downwards sideways closer away zoom"
)
_PREPOSITIONS = _listed(
    "toward towards past over under through along across from at on with of behind above below "
    "near beside between for by in around"
)


class _Clause(NamedTuple):
    """The camera clause of a prompt, read. No moves and nothing unknown: there is no clause."""

    moves: tuple[Move, ...]
    unknown: tuple[str, ...]
    scene: str


def moves(text: str) -> tuple[Move, ...]:
    """Reads the commands of a prompt's camera clause, in the order in which they are written.

    Args:
      text: a prompt. Case, commas and the words between commands ("then", "transitioning
        into a") do not matter. An angle or a speed belongs to the command in whose part of the
        clause it stands; parts end at commas, "then" and "and". Commands outside the opening
        clause are not read: unlike the published search over the whole prompt, "people move left"
        is no camera command.

    Returns:
      One `Move` a command; (Move("fixed"),) for a fixed camera; () when the prompt has no camera
      clause or the clause has no known command.
    """
    return _read(text).moves


def parse(text: str) -> tuple[str, ...]:
    """The names of `moves`, e.g. ("push_in", "pan_left")."""
    return tuple(move.name for move in moves(text))


def unknown(text: str) -> tuple[str, ...]:
    """Phrases of the camera clause that ask for what `moves` cannot read, e.g. ("dolly zoom",).

    A caller that must not ignore what a user asked for raises when this is not empty; see
    `complaint`.
    """
    return _read(text).unknown


def complaint(text: str) -> str:
    """What is wrong with a prompt's camera clause, as part of a sentence; "" when nothing is."""
    phrases = unknown(text)
    return f'the camera cannot "{phrases[0]}" (it can {_LISTED})' if phrases else ""


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises ValueError, naming every prompt whose camera clause asks for what is not known."""
    wrong = [
        f'prompt {number} "{phrases[0]}"'
        for number, phrases in enumerate(map(unknown, prompts), start=1)
        if phrases
    ]
    if wrong:
        raise ValueError(
            f"the camera clause asks in {', '.join(wrong)}: the camera can only {_LISTED}"
        )


def scene(text: str) -> str:
    """The prompt without its camera clause (the whole prompt when it has none)."""
    return _read(text).scene


def text(names: Sequence[str | Move]) -> str:
    """Writes the clause that `moves` reads as `names`; "" for no names.

    ("move_left", "pull_out", "pan_left") -> "Camera move left, pull out, then pan left."
    (Move("pan_left", 30, "slowly"),) -> "Camera pan left 30 degrees slowly."

    Raises:
      ValueError: as `check`.
    """
    asked = check(names)
    words = [
        " ".join(
            part
            for part in (
                move.name.replace("_", " "),
                "" if move.degrees is None else f"{move.degrees:g} degrees",
                move.speed,
            )
            if part
        )
        for move in asked
    ]
    if not words:
        return ""
    if len(words) > 1:
        words[-1] = "then " + words[-1]
    return f"Camera {', '.join(words)}."


def check(names: Sequence[str | Move]) -> tuple[Move, ...]:
    """Names and moves as moves.

    Raises:
      ValueError: a name is not in `NAMES`, a speed not in `SPEEDS`, or an angle is out of range or
        given to what does not turn.
    """
    asked = tuple(Move(name) if isinstance(name, str) else name for name in names)
    for move in asked:
        if move.name not in NAMES:
            raise ValueError(f"Unknown camera command {move.name!r}; it must be one of {NAMES}.")
        if move.speed not in SPEEDS:
            raise ValueError(f"Camera speed {move.speed!r} must be one of {SPEEDS}.")
        if move.degrees is not None and not (move.name in TURNS and 0 < move.degrees <= 360):
            raise ValueError(
                f"Camera command {move.name} cannot take {move.degrees:g} degrees: an angle is "
                f"above 0, at most 360, and for one of {TURNS}."
            )
    return asked


_LISTED = ", ".join(name.replace("_", " ") for name in NAMES)


def _read(text: str) -> _Clause:
    match = _CLAUSE.match(text)
    if not match:
        return _Clause((), (), text)
    found: list[Move] = []
    apart: list[list[str]] = []  # words of parts without a command
    beside: list[list[str]] = []  # words before and after a command in its part
    for part in _SEPARATOR.split(match["body"].lower()):
        hits = list(_COMMANDS.finditer(part))
        if not hits:
            apart.append(_words(part))
        for index, hit in enumerate(hits):
            end = hits[index + 1].start() if index + 1 < len(hits) else len(part)
            around = ("" if index else part[: hit.start()]) + " ; " + part[hit.end() : end]
            move, rest = _with_angle_and_speed(str(hit.lastgroup), around)
            found.append(move)
            beside += [_words(piece) for piece in rest.split(";")]
    wrong = [words for words in apart + beside if _asks(words)]
    if found:
        wrong += [words for words in apart if words and words[0] not in _PREPOSITIONS]
    kept = dict.fromkeys(" ".join(words) for words in wrong)
    if not found and not kept:
        return _Clause((), (), text)
    return _Clause(tuple(found), tuple(kept), text[match.end() :])


def _with_angle_and_speed(name: str, around: str) -> tuple[Move, str]:
    """Reads what stands beside a command; returns also what is left of it."""
    speed = _SPEED.search(around)
    angle = _DEGREES.search(around)
    degrees = float(angle[1]) if angle else None
    if degrees is not None and (name not in TURNS or not 0 < degrees <= 360):
        return Move(name, None, str(speed.lastgroup) if speed else ""), around
    return Move(name, degrees, str(speed.lastgroup) if speed else ""), _DEGREES.sub("", around)


def _words(part: str) -> list[str]:
    return [w for w in re.findall(r"[\w'°.-]+", _SPEED.sub(" ", part)) if w not in _FILLERS]


def _asks(words: Sequence[str]) -> bool:
    """Whether words ask for a movement, or for an angle that no command beside them can take."""
    if not words:
        return False
    first, *rest = words
    if first in _THINGS:
        return not rest or rest[0] in _DIRECTIONS
    if any(word.startswith(("deg", "°")) for word in words):
        return True
    if _VERBS.fullmatch(first) or _INFLECTED.fullmatch(first):
        return True
    return len(words) == 2 and rest[0] in ("left", "right", "up", "down")
