"""Reads the material of the world prompts: scene nuclei written for it, one block each.

    # on a shingle spit | open            the place, and the camera tag (a key of `CAMERAS`)
    s a {coble/trawler} | rusts on skids  a subject
    f lobster pots | lie tumbled          foreground;  m: middle ground;  b: background
    t iron | bleeds orange                material or texture
    l a squall | darkens the sea          light, weather or hour

Every line is a clause. The first bar parts its subject from its predicate, and each bar stands
before a verb, so that `phrasing` can also write it as a participle ("lobster pots lying tumbled").
Braces hold alternatives of which one is chosen. `layout/*.txt` has bare clauses, one a line, on how
a frame is composed; they belong to the category whose name the file bears.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "material"
CATEGORIES = ("natural", "urban", "interiors", "still", "fantasy", "styles", "dynamic")
LAYERS = {
    "s": "subject",
    "f": "foreground",
    "m": "middle ground",
    "b": "background",
    "t": "material",
    "l": "light",
}
_LEAST = {"s": 2, "f": 2, "m": 2, "b": 2, "t": 1, "l": 2}

# What the camera cannot do in a place, by tag.
CAMERAS: dict[str, frozenset[str]] = {
    "open": frozenset(),
    "room": frozenset({"orbit_left", "orbit_right"}),  # walls all round
    "hall": frozenset({"orbit_left", "orbit_right", "move_left", "move_right"}),  # walls beside
    "wall": frozenset({"orbit_left", "orbit_right"}),  # a flat subject has no far side
    "table": frozenset({"push_in"}),  # the camera is as close as it can be
}

_BRACES = re.compile(r"\{[^{}]*\}")


@dataclasses.dataclass(frozen=True)
class Nucleus:
    """One scene: a place, what the camera may do there, and its clauses by layer."""

    name: str  # file and place, e.g. "natural/coast: along a shingle spit"
    category: str
    place: str
    camera: str
    lines: dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Material:
    """All nuclei in file order, and the clauses on layout of each category."""

    nuclei: tuple[Nucleus, ...]
    layout: dict[str, tuple[str, ...]]


def read(folder: Path = FOLDER) -> Material:
    """Reads all files below `folder`.

    Raises:
      ValueError: naming each file and line that breaks the form above, all at once.
    """
    problems: list[str] = []
    nuclei: list[Nucleus] = []
    layout: dict[str, tuple[str, ...]] = {}
    for category in CATEGORIES:
        files = sorted((folder / category).glob("*.txt"))
        if not files:
            problems.append(f"{category} has no .txt file")
        for file in files:
            nuclei += _read_file(file, category, problems)
        layout[category] = _read_layout(folder / "layout" / f"{category}.txt", problems)
    places = [nucleus.name.partition(": ")[2] for nucleus in nuclei]
    problems += [f"'{p}' is the place of two scenes" for p in {*places} if places.count(p) > 1]
    if problems:
        raise ValueError(f"the material of the world prompts is malformed: {'; '.join(problems)}")
    return Material(tuple(nuclei), layout)


def _read_file(file: Path, category: str, problems: list[str]) -> list[Nucleus]:
    nuclei = []
    for block in re.split(r"\n(?=# )", "\n" + file.read_text("utf-8"))[1:]:
        head, *body = block.strip().split("\n")
        place, _, camera = head.removeprefix("# ").rpartition(" | ")
        where = f"{category}/{file.stem}: {place}"
        if camera not in CAMERAS or not place:
            problems.append(f"{where}: '{head}' is not '# place | {' or '.join(CAMERAS)}'")
        lines: dict[str, list[str]] = {layer: [] for layer in LAYERS}
        for line in filter(None, body):
            layer, _, clause = line.partition(" ")
            if layer not in LAYERS or not _is_clause(clause):
                problems.append(f"{where}: '{line}' is not 'layer subject | predicate'")
            else:
                lines[layer].append(clause)
        short = [name for name, least in _LEAST.items() if len(lines[name]) < least]
        if short:
            problems.append(f"{where}: too few lines of {', '.join(LAYERS[n] for n in short)}")
        clauses = {layer: tuple(found) for layer, found in lines.items()}
        nuclei.append(Nucleus(where, category, place, camera, clauses))
    return nuclei


def _read_layout(file: Path, problems: list[str]) -> tuple[str, ...]:
    if not file.is_file():
        problems.append(f"layout/{file.name} is missing")
        return ()
    clauses = tuple(filter(None, file.read_text("utf-8").split("\n")))
    problems += [f"layout/{file.name}: '{c}' is no clause" for c in clauses if not _is_clause(c)]
    return clauses


def _is_clause(text: str) -> bool:
    rest = _BRACES.sub("x", text)
    return " | " in text and not set("{}") & set(rest) and "/" not in rest and "." not in rest
