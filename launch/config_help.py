"""The fields of a config file with their values and the comments that stand beside them in it."""

import ast
import difflib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

COLUMN, WIDTH = 46, 120  # of the help: where comments begin and end


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field, sections opened."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class Comment(NamedTuple):
    """What a config file says of a field, and the value that stands there, if it is a literal."""

    text: str
    value: Any = None

    def of(self, value: Any) -> str:
        """The text; of another value than the file's, without the mark of its source."""
        same = self.value is None or value == self.value
        return self.text if same else re.sub(r"[ ;]*\[\w+\]$", "", self.text)


def comments(path: str | Path) -> dict[str, Comment]:
    """Field -> what the file says of it, in its order; nothing of the file is run.

    A field is an assignment to attributes of a name, `c.sample.steps = 50`, or of a name for a
    section, `g = c.algorithm`, also in a loop over names of sections, `c.rewards[name] = r = ...`;
    a section that is a dict has its fields, too. A comment stands on the field's own lines,
    or else on those right above it. Of several assignments the first one with a comment counts:
    later ones change values for a variant.
    """
    with tokenize.open(path) as file:  # in the encoding that its first lines name
        source = file.read()
    notes, alone = _notes(source)
    found: dict[str, Comment] = {}
    sections: dict[str, list[str]] = {}
    nodes = sorted(
        (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign | ast.For)),
        key=lambda node: node.lineno,
    )
    loops: dict[str, list[Any]] = {}
    for node in nodes:
        if isinstance(node, ast.For):
            loops |= _turns(node)
            continue
        sections |= _sections(node, loops)
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        text = " ".join(notes[line] for line in lines if line in notes)
        first = node.lineno
        while not text and first - 1 in alone:
            first -= 1
        text = text or " ".join(notes[line] for line in range(first, node.lineno))
        for target in node.targets:
            for name, value in _assignments(target, node.value, sections):
                if name not in found or not found[name].text:
                    found[name] = Comment(text, value)
    return found


def key(name: str, said: Mapping[str, Comment]) -> str:
    """Where `comments` has what is said of a field: under its name, or its section's; or ""."""
    candidates = (name, name.rpartition(".")[0])
    return next((found for found in candidates if found in said and said[found].text), "")


def attributes(kind: type) -> dict[str, str]:
    """Field -> what the "Attributes:" of a class and those that it is made of say of it."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        _, _, listed = inspect.cleandoc(vars(one).get("__doc__") or "").partition("Attributes:\n")
        names: list[str] = []
        for row in listed.partition("\n\n")[0].splitlines():
            if entry := re.match(r" *(\w+(?:, \w+)*): (.*)", row):
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2])
            else:
                found |= {name: f"{found[name]} {row.strip()}" for name in names}
    return {name: text.removesuffix(".") for name, text in found.items()}


def describe(path: str | Path, config: Any, meanings: Mapping[str, str]) -> str:
    """A flag a line, in the order of the file: its name, its value, and what it means, by
    `meanings` or else by its comment."""
    said = comments(path)
    places = {name: place for place, name in enumerate(said)}

    def place(field: tuple[str, Any]) -> int:
        name = field[0]  # or that of its section, where that is first given values as a whole
        known = (name, key(name, said), name.rpartition(".")[0])
        return min(places.get(one, len(places)) for one in known)

    def meaning(name: str, value: Any) -> str:
        found = key(name, said)
        return meanings.get(name) or (said[found].of(value) if found else "")

    return "\n".join(
        line(f"--config.{name}={value}", meaning(name, value))
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


def _turns(loop: ast.For) -> Iterator[tuple[str, list[Any]]]:
    """(name, what it is in each turn) of a loop over literals."""
    turns = _literal(loop.iter) or ()
    if not isinstance(loop.target, ast.Tuple):
        yield ast.unparse(loop.target), list(turns)
        return
    for place, name in enumerate(loop.target.elts):
        yield ast.unparse(name), [turn[place] for turn in turns]


def _sections(node: ast.Assign, loops: Mapping[str, list[Any]]) -> dict[str, list[str]]:
    """Names that an assignment makes for sections -> their fields' prefixes."""
    names = [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node.value, ast.Attribute):
        return {name: [ast.unparse(node.value).partition(".")[2] + "."] for name in names}
    for target in node.targets:
        if isinstance(target, ast.Subscript):
            section = ast.unparse(target.value).partition(".")[2]
            turns = loops.get(ast.unparse(target.slice), [])
            return {name: [f"{section}.{turn}." for turn in turns] for name in names}
    return {}


def _assignments(
    target: ast.expr, value: ast.expr, sections: Mapping[str, list[str]]
) -> Iterator[tuple[str, Any]]:
    """(dotted name from the config's root, its value if that is a literal) of an assignment."""
    if isinstance(target, ast.Tuple):
        values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
        for part, one in zip(target.elts, values, strict=True):
            yield from _assignments(part, one, sections)
    elif isinstance(target, ast.Attribute):
        root, _, rest = ast.unparse(target).partition(".")
        for name in (prefix + rest for prefix in sections.get(root, [""])):
            yield name, _literal(value)
            for part in value.args if isinstance(value, ast.Call) else []:
                if isinstance(part, ast.Dict):
                    for field, one in zip(part.keys, part.values, strict=True):
                        yield f"{name}.{_literal(field)}", _literal(one)


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
