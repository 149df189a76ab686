"""The fields of a config file with their values and the comments that stand beside them in it."""

import ast
import difflib
import fnmatch
import io
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

COLUMN, WIDTH = 46, 120  # of the help: where comments begin and end


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field, sections opened."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def comments(path: str | Path) -> dict[str, str]:
    """Field -> what the file says of it, or "", in its order; nothing of the file is run.

    A field is an assignment to attributes of a name, `c.sample.steps = 50`, or of a name for a
    section, `g = c.algorithm`; of one for several sections, `c.rewards[name] = judge = ...`, the
    field is "rewards.*.weights". Its comment stands on its own lines, or else on those right above
    it. Of several assignments the first one with a comment counts: later ones change values for a
    variant.
    """
    with tokenize.open(path) as file:  # in the encoding that its first lines name
        source = file.read()
    notes, alone = _notes(source)
    found: dict[str, str] = {}
    sections: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        sections |= _sections(node)
        names = [name for target in node.targets for name in _names(target, sections)]
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        text = " ".join(notes[line] for line in lines if line in notes)
        first = node.lineno
        while not text and first - 1 in alone:
            first -= 1
        text = text or " ".join(notes[line] for line in range(first, node.lineno))
        for name in names:
            found[name] = found.get(name) or text
    return found


def key(name: str, said: dict[str, str]) -> str:
    """Where `comments` has what is said of a field: under its name, under one that stands for it
    and others, or under its section's; or ""."""
    shared = [pattern for pattern in said if "*" in pattern and fnmatch.fnmatch(name, pattern)]
    candidates = (name, *shared, name.rpartition(".")[0])
    return next((found for found in candidates if said.get(found)), "")


def describe(path: str | Path, config: Any) -> str:
    """A flag a line, in the order of the file: its name, its value, and its comment."""
    said = comments(path)
    places = {name: place for place, name in enumerate(said)}

    def place(field: tuple[str, Any]) -> int:
        name = field[0]  # or that of its section, where that is first given values as a whole
        known = (name, key(name, said), name.rpartition(".")[0])
        return min(places.get(one, len(places)) for one in known)

    return "\n".join(
        line(f"--config.{name}={value}", said.get(key(name, said), ""))
        for name, value in sorted(fields(config), key=place)
    )


def line(flag: str, text: str) -> str:
    """The flag, and what is said of it in a column beside it."""
    rows = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    gap = "\n" + " " * COLUMN
    return f"  {flag:<{COLUMN - 4}}  {gap.join(rows)}".rstrip()


def nearest(word: str, config: Any, exact: bool = False) -> str:
    """The field that a wrong flag most likely means, such as sample.steps for steps; or "".

    Args:
      exact: only one whose last name is the word itself.
    """
    names = [name for name, _ in fields(config)]
    ends = {name.rpartition(".")[2]: name for name in reversed(names)}
    word = word.removeprefix("config.").replace("-", "_")
    if exact or word in ends:
        return ends.get(word, "")
    whole = difflib.get_close_matches(word, names, n=1, cutoff=0.8)
    end = difflib.get_close_matches(word.rpartition(".")[2], ends, n=1, cutoff=0.75)
    return whole[0] if whole else ends[end[0]] if end else ""


def _notes(source: str) -> tuple[dict[int, str], set[int]]:
    """Line -> its comment, and the lines that hold nothing else."""
    notes, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            notes[token.start[0]] = token.string.lstrip("# ").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    return notes, alone


def _sections(node: ast.Assign) -> dict[str, str]:
    """Names that an assignment makes for sections -> their fields' prefix."""
    names = [target.id for target in node.targets if isinstance(target, ast.Name)]
    several = [target for target in node.targets if isinstance(target, ast.Subscript)]
    if isinstance(node.value, ast.Attribute):
        return dict.fromkeys(names, ast.unparse(node.value).partition(".")[2] + ".")
    if several:
        return dict.fromkeys(names, ast.unparse(several[0].value).partition(".")[2] + ".*.")
    return {}


def _names(target: ast.expr, sections: dict[str, str]) -> Iterator[str]:
    """Dotted names, from the config's root, that an assignment's left side gives values to."""
    if isinstance(target, ast.Tuple):
        for part in target.elts:
            yield from _names(part, sections)
    elif isinstance(target, ast.Attribute):
        root, _, name = ast.unparse(target).partition(".")
        yield sections.get(root, "") + name
