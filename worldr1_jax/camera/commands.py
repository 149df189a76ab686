"""Camera commands at the head of a prompt: "Camera push in, then pan left. A red sphere ...".

The nine published names are in `PUBLISHED`. Ours, which the published parser reads as no command,
are `EXTENSIONS`, an angle ("pan left 30 degrees", for what turns), and "slowly" or "quickly". The
clause is the sentence that opens the prompt with the word "Camera", if it asks for a movement:
"Camera shop on a corner." is a scene, and so is everything after the clause. Sentences that follow
it and begin with a command, or speak of the camera still, belong to it. What a clause asks for and
nobody here can do, such as "does not pan left", is not passed over: see `complaint`. Nor is what
stands before a command and may give it another meaning or subject: "refuses to pan left", "a cat
moves left".
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from worldr1_jax.camera import vocabulary
from worldr1_jax.files import short

PUBLISHED, EXTENSIONS, NAMES = vocabulary.PUBLISHED, vocabulary.EXTENSIONS, vocabulary.NAMES
SPEEDS, TURNS = vocabulary.SPEEDS, vocabulary.TURNS


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
    return f'the camera cannot "{short(phrases[0])}" (it can {_LISTED})' if phrases else ""


def understood(text: str) -> tuple[Move, ...]:
    """`moves`, where nothing is left that they do not honour.

    Raises:
      ValueError: `complaint` has one.
    """
    if wrong := complaint(text):
        raise ValueError(f"a prompt asks for what {wrong}")
    return moves(text)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises ValueError, naming every prompt whose camera clause asks for what is not known."""
    wrong = [
        f'prompt {number} "{short(phrases[0])}"'
        for number, phrases in enumerate(map(unknown, prompts), start=1)
        if phrases
    ]
    if wrong:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(
            f"the camera clause asks in {', '.join(wrong[:20])}{more}: the camera can only "
            f"{_LISTED}"
        )


def scene(text: str) -> str:
    """The prompt without its camera clause (the whole prompt when it has none)."""
    return _read(text).scene


def replaced(prompt: str, names: Sequence[str | Move]) -> str:
    """The prompt, or the sentence about its scene, with these commands in place of its own; errors
    as for `text`."""
    clause = text(names)
    return f"{clause} {scene(prompt)}" if clause else scene(prompt)


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
            raise ValueError(f"Unknown camera command {move.name!r}; it must be one of {NAMES}")
        if move.speed not in SPEEDS:
            raise ValueError(f"Camera speed {move.speed!r} must be one of {SPEEDS}")
        if move.degrees is not None and not (move.name in TURNS and 0 < move.degrees <= 360):
            raise ValueError(
                f"Camera command {move.name} cannot take {move.degrees:g} degrees: an angle is "
                f"above 0, at most 360, and for one of {TURNS}"
            )
    return asked


_LISTED = ", ".join(name.replace("_", " ") for name in NAMES) + ", in a sentence that comes first"


def _read(text: str) -> _Clause:
    plain, places = _plain(text)
    head = vocabulary.HEAD.match(plain)
    first = vocabulary.SENTENCE.match(plain, head.end()) if head else None
    if first is None:
        return _Clause((), _strays(plain), text)
    bodies, end = [first["body"]], first.end()
    more, aside = _goes_on(plain, end, after=first["end"]), _aside(first["body"].lower())
    if aside and (more is None or vocabulary.ENDS_IN_IT.search(plain[end : more.start()])):
        bodies, end = [first["body"][: aside.start()]], first.start() + aside.end()
        more = None
    while more is not None:
        bodies.append(_with_it(plain[end : more.start()], more["body"]))
        first, end = more, more.end()
        more = _goes_on(plain, end, after=first["end"])
    found, wrong = _clause(" then ".join(bodies).lower())
    if not found and not wrong:
        return _Clause((), _strays(plain), text)
    return _Clause(found, (*wrong, *_strays(plain[end:])), text[places[end] :])


def _plain(text: str) -> tuple[str, list[int]]:
    """The text without what cannot be seen (byte order marks, zero-width spaces, directions of
    writing) and with full-width letters as plain ones; and where each character was, and the
    end."""
    if text.isascii():
        return text, list(range(len(text) + 1))
    seen = [i for i, c in enumerate(text) if unicodedata.category(c) != "Cf"]
    return "".join(text[i] for i in seen).translate(vocabulary.NARROW), [*seen, len(text)]


def _goes_on(plain: str, start: int, after: str) -> re.Match[str] | None:
    """The sentence at `start`, if it goes on with the clause, which ended with `after`."""
    lead = vocabulary.GOES_ON.match(plain, start)
    opens = vocabulary.OPENS.match(plain, lead.end() if lead else start)
    sentence = vocabulary.SENTENCE.match(plain, opens.end() if opens else start)
    if sentence is None:
        return None
    body = sentence["body"].lower()
    words = re.findall(r"[\w'’-]+", body)
    # A sentence of its own may well be of the scene.
    speaks_on = _speaks_on if lead or ";" in after else _is_asked_for
    return sentence if _is_only_how(body) or speaks_on(words, lead[0] if lead else "") else None


def _is_asked_for(words: list[str], _: str) -> bool:
    """Whether words that nothing leads begin with a command, or forbid one."""
    never = ["do", "not"] if words[:2] == ["do", "not"] else words[:1]
    if never and never[-1] in ("not", "don't", "don’t", "never"):
        return bool(vocabulary.COMMANDS.match(" ".join(words[len(never) :])))
    manner = itertools.takewhile(vocabulary.HOW_ELSE.fullmatch, words)
    command = vocabulary.COMMANDS.match(" ".join(words[len(list(manner)) :]))
    return command is not None and not vocabulary.SEEN_MOVING.match(command[0])


def _speaks_on(words: list[str], lead: str) -> bool:
    """Whether words behind such a lead begin with something that is asked of the camera."""
    fillers = itertools.takewhile(
        lambda word: word in vocabulary.FILLERS or word == "it" or vocabulary.SPEED.fullmatch(word),
        words,
    )
    words = words[len(list(fillers)) :]
    changes = bool(words and vocabulary.CHANGES.fullmatch(words[0]))
    if changes and vocabulary.SCENES_OPEN.search(lead):  # "View up the street."
        changes = words[0] not in ("up", "down", "left", "right", "half")
    return bool(vocabulary.COMMANDS.match(" ".join(words))) or changes or _asks(words)


def _with_it(lead: str, body: str) -> str:
    """The sentence with the "it" that led it, which may be what the camera sees."""
    if vocabulary.ENDS_IN_IT.search(lead):
        return "it " + re.sub(r"^\s*(?:then|next|also|now)\b", "", body, flags=re.IGNORECASE)
    return body


def _aside(body: str) -> re.Match[str] | None:
    """What parts a command from the scene within a sentence, if anything does."""
    hits = list(vocabulary.COMMANDS.finditer(body))
    marks = vocabulary.ASIDE.finditer(body, hits[-1].end()) if hits else iter(())
    for mark in itertools.islice(marks, 8):  # each looks at all of the rest
        rest = body[mark.end() :]
        words = _words(rest)
        how = vocabulary.HOW.match(rest) or vocabulary.HOW_AT_LAST.match(rest)
        if how or not words or _is_scene(words[:1]) or _asks(words):
            continue
        if not any(map(vocabulary.CHANGES.fullmatch, words)):
            return mark
    return None


def _is_strange(word: str, first: bool) -> bool:
    """Whether a word before a command, the first of a part or another, may change what it says."""
    if word.endswith("ly"):
        return bool(vocabulary.NO_HOW.fullmatch(word))
    return not first or word not in vocabulary.LEADS


def _is_only_how(part: str) -> bool:
    """Whether a part says how far or how fast, and nothing else."""
    said = vocabulary.SPEED.search(part) or vocabulary.DEGREES.search(part)
    return bool(said) and not _words(vocabulary.DEGREES.sub(" ", part))


def _strays(plain: str) -> tuple[str, ...]:
    """A camera that is asked to move where no clause is read; it would stand still."""
    stray = vocabulary.STRAY.search(plain)
    return (f"... {' '.join(stray[0].lower().split())}",) if stray else ()


def _clause(body: str) -> tuple[tuple[Move, ...], tuple[str, ...]]:
    """Moves, and phrases that they do not honour."""
    found: list[Move] = []
    apart: list[list[str]] = []  # words of parts without a command
    wrong: list[list[str]] = []
    shows = False  # what "it" may be
    for part in _parts(body):
        if shows and vocabulary.IT_MOVES.match(part):
            wrong.append(part.split())
            continue
        shows = shows or bool(vocabulary.SHOWS.search(part))
        hits = list(vocabulary.COMMANDS.finditer(part))
        if not hits:
            apart.append(_words(part))
        for index, hit in enumerate(hits):
            end = hits[index + 1].start() if index + 1 < len(hits) else len(part)
            before, after = part[: hit.start()] if index == 0 else "", part[hit.end() : end]
            before += " ".join(["", *vocabulary.HOW.findall(hit[0])])  # "pans slowly left"
            move, near, refused = _move(str(hit.lastgroup), before, after)
            joins = before if end == len(part) else f"{before} {after}"  # this one to the others
            near.append(re.findall(r"\b(?:while|whilst|as|before|after)\b", joins))
            changed = [words for words in near if any(map(vocabulary.CHANGES.fullmatch, words))]
            start = hits[index - 1].end() if index else 0
            lead = _words(vocabulary.DEGREES.sub(" ", part[start : hit.start()]))
            if any(_is_strange(word, first=not index) for word in lead):
                changed.append(lead)
            wrong += changed + refused
            if not changed:
                found.append(move)
    wrong += [words for words in apart if _asks(words)]
    if found or wrong:
        wrong += [words for words in apart if words and not _is_scene(words)]
    return tuple(found), tuple(dict.fromkeys(" ".join(words) for words in wrong))


def _parts(body: str) -> Iterator[str]:
    """The clause between commas and "then"; what says only how far or how fast goes with the
    command before it, or with the one after it when it comes first."""
    held: list[str] = []
    waiting = True  # for a command: what is held says only how, if anything
    for part in vocabulary.SEPARATOR.split(body):
        only_how = not _words(vocabulary.DEGREES.sub(" ", part))
        if not waiting and not only_how:
            yield ", ".join(held)
            held, waiting = [], True
        held.append(part)
        waiting = waiting and only_how
    yield ", ".join(held)


def _move(name: str, before: str, after: str) -> tuple[Move, list[list[str]], list[list[str]]]:
    """The command with its angle and speed; the words beside it; what it cannot honour of them."""
    refused: list[list[str]] = []
    angles = list(vocabulary.DEGREES.finditer(f"{before};{after}"))
    degrees = float(angles[0][1]) if len(angles) == 1 else None
    if angles and not (degrees and name in TURNS and degrees <= 360 and _turns_by(after)):
        degrees = None
        refused += [angle[0].removeprefix("by ").split() for angle in angles]
    refused += [match[0].split() for match in vocabulary.MANNER.finditer(after)]
    if name in ("move_up", "move_down") and (ahead := vocabulary.AHEAD.match(after)):
        refused.append([*name.split("_"), ahead[0].strip()])
    before, after = vocabulary.DEGREES.sub(" ", before), vocabulary.DEGREES.sub(" ", after)
    place = vocabulary.PLACE.search(after)
    near, scene = (after[: place.start()], after[place.start() :]) if place else (after, "")
    # In what the camera sees, "slow" is a river; "slowly" is the camera.
    adverbs = re.findall(r"[a-z]+ly", vocabulary.SEEN_SPEED.sub(" ", scene))
    said = f"{before} {vocabulary.SEEN_SPEED.sub(' ', near)} {' '.join(adverbs)}"
    speeds = list(dict.fromkeys(str(match.lastgroup) for match in vocabulary.SPEED.finditer(said)))
    if len(speeds) > 1:
        refused.append(speeds)
    pieces = [_words(before), _words(near), _words(scene)]
    refused += [words for words in pieces if _asks(words)]
    move = Move(name, degrees, speeds[0] if len(speeds) == 1 else "")
    return move, pieces[:2], refused


def _turns_by(after: str) -> bool:
    """Whether angles behind a command are the movement's, and not those of a place."""
    place = vocabulary.PLACE.search(after)
    for angle in vocabulary.DEGREES.finditer(after):
        said, rest = after[: angle.start()], after[angle.end() :]
        rest = vocabulary.TO_SHOW.sub("", rest)
        if place is None or angle.start() < place.start() or angle[0].startswith("by"):
            continue
        if vocabulary.TO_TURN_BY.search(said) or re.match(r"\s*arc\b", rest):
            continue
        if vocabulary.OF_A_PLACE.search(said) or vocabulary.HOW.sub("", rest).strip(" ,"):
            return False
    return True


def _words(part: str) -> list[str]:
    words = re.findall(r"[-−–+]?[^\W_][\w'’°º%.-]*|[°º]", vocabulary.SPEED.sub(" ", part))
    return [word for word in words if word not in vocabulary.FILLERS]


def _is_scene(words: Sequence[str]) -> bool:
    """Whether a part without a command says only where: "past a crane"."""
    return words[0] in vocabulary.PREPOSITIONS and (
        bool(vocabulary.PLACE.fullmatch(words[0]))
        or not any(map(vocabulary.CHANGES.fullmatch, words))
    )


def _asks(words: Sequence[str]) -> bool:
    """Whether words ask for a movement, or for an angle that no command beside them can take."""
    if not words:
        return False
    first, *rest = words
    if first in vocabulary.THINGS:
        return not rest or rest[0] in vocabulary.DIRECTIONS
    if any(word.startswith("deg") or set(word) & set("°º") for word in words):
        return True
    if vocabulary.VERBS.fullmatch(first) or vocabulary.INFLECTED.fullmatch(first):
        return True
    if not vocabulary.PLACE.fullmatch(first) and any(map(vocabulary.CAMERAS_OWN.fullmatch, words)):
        return True
    return len(words) == 2 and rest[0] in ("left", "right", "up", "down")
