"""Camera commands at the head of a prompt: "Camera push in, then pan left. A red sphere ...".

The nine published names are in `PUBLISHED`; `EXTENSIONS` are ours (the published parser reads
them as no command). The clause is the sentence that opens the prompt with the word "Camera".
"""

import re

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

_CLAUSE = re.compile(r"\s*(?:the\s+)?camera\b(?P<body>[^.!?;\n]*)(?:[.!?;\n]\s*)?", re.IGNORECASE)
_ENDING = "(?:s|es|d|ed|ing|ning|ting)?"  # pushes in, panning left
_GAP = r"[\s_-]+"


def _phrase(name: str) -> str:
    """Regular expression of one command: inflected verb, any separator, whole words only."""
    verb, *direction = name.split("_")
    if verb == "move":
        verb = "mov(?:e)?"
    ending = "" if verb == "fixed" else _ENDING
    return _GAP.join([verb + ending, *direction])


_COMMANDS = re.compile(
    r"(?<![a-z])(?:" + "|".join(f"(?P<{name}>{_phrase(name)})" for name in NAMES) + r")(?![a-z])"
)
# Words that may stand between commands without asking for any movement.
_FILLERS = frozenset(
    re.findall(
        r"\w+",
        "then and while transitioning transitions into a an the to slowly gently smoothly quickly "
        "slightly steadily shot camera is remains stays view movement",
    )
)


def _body(text: str) -> str | None:
    """The lower-case words after "Camera" in the clause, or None when there is no clause."""
    match = _CLAUSE.match(text)
    return match["body"].lower() if match else None


def parse(text: str) -> tuple[str, ...]:
    """Reads the commands of a prompt's camera clause, in the order in which they are written.

    Args:
      text: a prompt. Case, commas and the words between commands ("then", "transitioning
        into a") do not matter. Commands outside the opening clause are not read: unlike the
        published search over the whole prompt, "people move left" is no camera command.

    Returns:
      Names out of `NAMES`, e.g. ("push_in", "pan_left"); ("fixed",) for a fixed camera; () when
      the prompt has no camera clause or the clause has no known command.
    """
    body = _body(text)
    if body is None:
        return ()
    return tuple(str(match.lastgroup) for match in _COMMANDS.finditer(body))


def unknown(text: str) -> tuple[str, ...]:
    """Phrases of the camera clause that `parse` cannot read, e.g. ("dolly zoom",).

    A caller that must not ignore what a user asked for raises when this is not empty.
    """
    body = _body(text)
    if body is None:
        return ()
    phrases = re.split(r",|\bthen\b|\band\b", _COMMANDS.sub(",", body))
    kept = (
        " ".join(word for word in re.findall(r"[\w'-]+", phrase) if word not in _FILLERS)
        for phrase in phrases
    )
    return tuple(phrase for phrase in kept if phrase)


def scene(text: str) -> str:
    """The prompt without its camera clause (the whole prompt when it has none)."""
    match = _CLAUSE.match(text)
    return text[match.end() :] if match else text


def text(names: tuple[str, ...] | list[str]) -> str:
    """Writes the clause that `parse` reads as `names`; "" for no names.

    ("move_left", "pull_out", "pan_left") -> "Camera move left, pull out, then pan left."

    Raises:
      ValueError: a name is not in `NAMES`.
    """
    check(names)
    words = [name.replace("_", " ") for name in names]
    if not words:
        return ""
    if len(words) > 1:
        words[-1] = "then " + words[-1]
    return f"Camera {', '.join(words)}."


def check(names: tuple[str, ...] | list[str]) -> None:
    """Raises ValueError when a name is not in `NAMES`."""
    wrong = [name for name in names if name not in NAMES]
    if wrong:
        raise ValueError(f"Unknown camera command {wrong[0]!r}; it must be one of {NAMES}.")
