"""Imports point down the house, and never in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "worldr1_jax"
# From the roof to the ground: a part may import those of its own floor and of the floors below.
FLOORS = (
    ("launch",),
    ("plan", "train"),
    ("settings", "preflight"),
    ("nano", "evaluation"),
    ("episode",),
    ("policies", "rewards"),
    ("algorithms", "models", "workdir"),
    ("rollout", "splat", "data", "nn", "weights", "media"),
    ("camera", "mesh", "types", "geometry", "files", "fields", "timing"),
)
FLOOR = {part: level for level, parts in enumerate(FLOORS) for part in parts}
FACES = ("__init__", "__main__")  # of the whole package, which stand beside the house


def modules() -> dict[str, Path]:
    """Every module of the package and of launch/ by its dotted name."""
    found = {}
    for folder in (ROOT / PACKAGE, ROOT / "launch"):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """Modules of ours that a module names in an import, anywhere in it, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import: write the whole name"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {w if w in MODULES else str(node.module) for w in whole}
    return found & MODULES.keys()


ARROWS = {name: imported(name) - {name} for name in MODULES}


def part(name: str) -> str:
    """The part of the house that a module belongs to; "" for the package's own face."""
    words = name.split(".")
    return words[0] if words[0] != PACKAGE else (*words, "__init__")[1]


def test_every_module_has_a_floor():
    parts = {part(name) for name in MODULES} - set(FACES)
    assert parts == FLOOR.keys(), "a new part: give it a floor, and HOUSE's order in CONTRIBUTING"


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=lambda i: "-".join(FLOORS[i]))
def test_no_arrow_points_up(floor):
    wrong = [
        f"{name} imports {other}"
        for name, others in sorted(ARROWS.items())
        if FLOOR.get(part(name)) == floor
        for other in sorted(others)
        if FLOOR.get(part(other), floor) < floor
    ]
    assert not wrong, "\n".join(wrong)


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Some circle, first and last the same; empty where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows.get(name, ())):
            found = walk(other, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def test_no_modules_import_each_other_in_a_circle():
    """A package's face counts as its own module: `from worldr1_jax.rewards import recon`, where
    recon is a module, is an arrow to that module."""
    assert not circle(ARROWS), " -> ".join(circle(ARROWS))


def test_no_parts_import_each_other_in_a_circle():
    """Two folders of one floor that import each other are one folder."""
    between: dict[str, set[str]] = {}
    for name, others in ARROWS.items():
        here = between.setdefault(part(name), set())
        here |= {part(other) for other in others} - {part(name), *FACES}
    assert not circle(between), " -> ".join(circle(between))


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
