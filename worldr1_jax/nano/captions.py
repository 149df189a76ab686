"""The language of the nano world: what a scene holds, the sentence that asks for it, and prompt
sets.

A `Spec` is what a caption says and nothing more; `world.build` adds what it leaves open (exact
places and sizes). Scenes whose sentence hashes to the held-out tenth are never shown in pretraining
or in reinforcement learning.
"""

from __future__ import annotations

import dataclasses
import re
import zlib

import numpy as np

from worldr1_jax.camera import commands
from worldr1_jax.data.prompts import PromptSets
from worldr1_jax.nano.palette import PALETTE as COLORS

SHAPES = ("sphere", "box", "cylinder")
SIZES = {
    "sphere": ("", "small", "large"),
    "box": ("", "small", "tall"),
    "cylinder": ("", "small", "tall"),
}
RELATIONS = ("left of", "right of", "in front of")
FLOORS = ("checkered", "striped", "tiled", "wooden")
PLACES = (
    "in a brick room",
    "in a striped room",
    "in a dotted room",
    "under a blue sky",
    "under a sunset sky",
)
MOTIONS = ("", "moving left", "moving right", "coming closer", "going away", "bouncing")
HELD_OUT_SHARE = 10  # one scene in so many


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: its colour, shape, size adjective ("" for medium) and motion ("" for still)."""

    color: str
    shape: str
    size: str = ""
    motion: str = ""

    def text(self) -> str:
        words = [w for w in (self.size, self.color, self.shape) if w]
        article = "An" if words[0][0] in "aeiou" else "A"
        return " ".join([article, *words, *([self.motion] if self.motion else [])])


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a caption says: one or two things, how they stand, the floor, the place, the camera's
    commands."""

    things: tuple[Thing, ...]
    relation: str
    floor: str
    place: str
    commands: tuple[str, ...]

    @property
    def is_dynamic(self) -> bool:
        return any(thing.motion for thing in self.things)

    def scene_text(self) -> str:
        """The sentence about the scene, e.g. 'A red sphere left of a tall blue box on a tiled floor
        in a brick room.'"""
        first = self.things[0].text()
        if len(self.things) == 2:
            second = self.things[1].text()
            first = f"{first} {self.relation} {second[0].lower()}{second[1:]}"
        return f"{first} on a {self.floor} floor {self.place}."

    def text(self) -> str:
        """The whole caption: the camera's clause, if any, then the scene."""
        return commands.replaced(self.scene_text(), self.commands)

    @property
    def is_held_out(self) -> bool:
        return zlib.crc32(self.scene_text().encode()) % HELD_OUT_SHARE == 0


def sample_spec(rng: np.random.Generator, *, dynamic: bool = False) -> Spec:
    """Draws a spec: uniform over colours, shapes, floors, places; one to two things; zero to three
    commands.

    Dynamic specs have one moving thing and a fixed camera, so that what moves is the world.
    """
    count = int(rng.integers(1, 3))
    colors = rng.choice(list(COLORS), size=count, replace=False)
    things = []
    for i in range(count):
        shape = str(rng.choice(SHAPES))
        motion = str(rng.choice(MOTIONS[1:])) if dynamic and i == 0 else ""
        things.append(Thing(str(colors[i]), shape, str(rng.choice(SIZES[shape])), motion))
    relation = str(rng.choice(RELATIONS)) if count == 2 else ""
    return Spec(
        tuple(things), relation, str(rng.choice(FLOORS)), str(rng.choice(PLACES)),
        ("fixed",) if dynamic else sample_commands(rng),
    )  # fmt: skip


def sample_commands(rng: np.random.Generator) -> tuple[str, ...]:
    """One command mostly, sometimes a sequence of two, rarely a fixed camera or a caption that asks
    for none."""
    kind = rng.random()
    if kind < 0.05:
        return ()
    if kind < 0.12:
        return ("fixed",)
    moving = [name for name in commands.PUBLISHED if name != "fixed"]
    return tuple(str(c) for c in rng.choice(moving, size=2 if kind > 0.8 else 1, replace=False))


def sample_held_out(rng: np.random.Generator, held_out: bool, *, dynamic: bool = False) -> Spec:
    """Draws until the spec is in (or out of) the held-out share."""
    while True:
        spec = sample_spec(rng, dynamic=dynamic)
        if spec.is_held_out == held_out:
            return spec


def parse(prompt: str) -> tuple[Thing, ...]:
    """The things that a nano caption names, in order; words it does not know are passed over."""
    words = prompt.lower().replace(".", " ").replace(",", " ").split()
    things = []
    for i, word in enumerate(words):
        if word in SHAPES and i and words[i - 1] in COLORS:
            size = words[i - 2] if i > 1 and words[i - 2] in SIZES[word] else ""
            things.append(Thing(words[i - 1], word, size))
    return tuple(things)


def altered(scene: str, rng: np.random.Generator) -> str:
    """The sentence about a scene with one thing in it wrong: a colour, a shape, the side, the floor
    or the place."""
    groups = (
        *(tuple(f"{color} {shape}" for color in COLORS) for shape in SHAPES),
        *(tuple(f"{color} {shape}" for shape in SHAPES) for color in COLORS),
        RELATIONS[:2],
        tuple(f"{floor} floor" for floor in FLOORS),
        PLACES,
    )
    said = [(phrase, group) for group in groups for phrase in group if phrase in scene]
    phrase, group = said[rng.integers(len(said))]
    other = str(rng.choice([other for other in group if other not in scene]))
    changed = scene.replace(phrase, other, 1)
    return re.sub(r"\b(a)n? (?=(\w))", _article, changed, flags=re.IGNORECASE)


def _article(match: re.Match[str]) -> str:
    return match[1] + ("n " if match[2] in "aeiou" else " ")


def prompt_sets(seed: int = 0, train: int = 600, dynamic: int = 100, test: int = 128) -> PromptSets:
    """Prompts for reinforcement learning and for the held-out report; test scenes are held out of
    everything else.

    Test prompts all ask for a camera movement, so that each of them can be won or lost.
    """
    rng = np.random.default_rng(seed)

    def draw(count: int, held_out: bool, is_dynamic: bool) -> tuple[str, ...]:
        found: dict[str, None] = {}
        while len(found) < count:
            spec = sample_held_out(rng, held_out, dynamic=is_dynamic)
            moves = any(name != "fixed" for name in spec.commands)
            if is_dynamic or moves:
                found[spec.text()] = None
        return tuple(found)

    return PromptSets(
        draw(train, False, False), draw(dynamic, False, True), draw(test, True, False)
    )
