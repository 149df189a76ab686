"""Material -> the prompts of every split, from a seed, in seconds.

Each scene belongs to one split. Prompts of one scene are drawn again until no two of them are
near-duplicates; prompts of different scenes share no clause but those on layout.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence

from worldr1_jax.camera import commands
from worldr1_jax.data.prompts import PromptSets
from worldr1_jax.data.world_prompts import compose
from worldr1_jax.data.world_prompts.compose import Dice
from worldr1_jax.data.world_prompts.material import CAMERAS, CATEGORIES, Material, Nucleus, read
from worldr1_jax.data.world_prompts.measure import jaccard, shingles

VERSION = "1.0.0"  # changes with any text: the material, the grammar or the seed
SEED = 2604
COUNTS = {"train": 4200, "dynamic": 840, "test": 420}
_TEST_DYNAMIC = 70  # of the test prompts
_TEST_SHARE = 5  # one scene in so many, of each category
_ALIKE = 0.36  # Jaccard of word 3-shingles that two prompts of one scene may not reach
_TRIES = 400

_OPPOSITE = {"push_in": "pull_out"} | {
    f"{verb}_left": f"{verb}_right" for verb in ("move", "orbit", "pan")
}
_OPPOSITE |= {second: first for first, second in _OPPOSITE.items()}


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt.

    Attributes:
      prompt: camera clause and one sentence.
      prompt_long: the same camera clause and scene in 60 to 120 words.
      category: out of `material.CATEGORIES`.
      commands: movements in order, out of `commands.PUBLISHED`.
      is_dynamic: whether what is seen moves by itself.
      scene: the nucleus that it was made from; no scene is in two splits.
    """

    prompt: str
    prompt_long: str
    category: str
    commands: tuple[str, ...]
    is_dynamic: bool
    scene: str


@functools.cache
def records() -> dict[str, tuple[Record, ...]]:
    """The records of "train", "dynamic" and "test", always the same."""
    return generate(read(), SEED)


def prompt_sets(form: str = "long") -> PromptSets:
    """The prompts of all splits, in their "long" or "short" form."""
    made = records()
    field = {"long": "prompt_long", "short": "prompt"}[form]
    return PromptSets(**{s: tuple(getattr(r, field) for r in made[s]) for s in made})


def generate(
    material: Material, seed: int, counts: dict[str, int] | None = None
) -> dict[str, tuple[Record, ...]]:
    """Writes all prompts.

    Args:
      material: what `material.read` returns.
      seed: decides which scenes are held out and every word that is chosen.
      counts: prompts of each split; `COUNTS` when None.

    Raises:
      ValueError: a scene whose lines are too few for that many different prompts.
    """
    counts = counts or COUNTS
    scenes = _split(material.nuclei, seed)
    test_dynamic = counts["test"] * _TEST_DYNAMIC // COUNTS["test"]
    shares = {
        "train": [(scenes["train"], counts["train"])],
        "dynamic": [(scenes["dynamic"], counts["dynamic"])],
        "test": [
            (scenes["test"], counts["test"] - test_dynamic),
            (scenes["test_dynamic"], test_dynamic),
        ],
    }
    made: dict[str, tuple[Record, ...]] = {}
    for split, parts in shares.items():
        found: list[Record] = []
        camera = _CommandChooser()
        for nuclei, count in parts:
            for index, nucleus in enumerate(nuclei):
                share = (index + 1) * count // len(nuclei) - index * count // len(nuclei)
                found += _of_scene(nucleus, material.layout, share, seed, camera)
        made[split] = tuple(Dice(seed, split).shuffled(found))
    return made


def _split(nuclei: Sequence[Nucleus], seed: int) -> dict[str, list[Nucleus]]:
    scenes: dict[str, list[Nucleus]] = {}
    for category in CATEGORIES:
        own = Dice(seed, "split", category).shuffled([n for n in nuclei if n.category == category])
        held_out = math.ceil(len(own) / _TEST_SHARE)
        dynamic = category == "dynamic"
        scenes.setdefault("test_dynamic" if dynamic else "test", []).extend(own[:held_out])
        scenes.setdefault("dynamic" if dynamic else "train", []).extend(own[held_out:])
    return scenes


def _of_scene(
    nucleus: Nucleus,
    layout: dict[str, tuple[str, ...]],
    count: int,
    seed: int,
    camera: _CommandChooser,
) -> list[Record]:
    shorts: list[frozenset[str]] = []
    longs: list[frozenset[str]] = []
    own_layout = layout[nucleus.category]
    found = []
    for index in range(count):
        dice = Dice(seed, nucleus.name, index)
        brief = _unlike(functools.partial(compose.short, nucleus, dice), shorts, nucleus.name)
        full = _unlike(
            functools.partial(compose.long, nucleus, own_layout, dice), longs, nucleus.name
        )
        names = camera.choose(CAMERAS[nucleus.camera], dice)
        clause = commands.text(names)
        found.append(
            Record(
                f"{clause} {brief}", f"{clause} {full}", nucleus.category, names,
                nucleus.category == "dynamic", nucleus.name,
            )
        )  # fmt: skip
    return found


def _unlike(write: Callable[[], str], before: list[frozenset[str]], scene: str) -> str:
    """Writes until the text is like none of `before`, and adds it to them."""
    for _ in range(_TRIES):
        text = write()
        mine = shingles(text)
        if text and all(jaccard(mine, other) < _ALIKE for other in before):
            before.append(mine)
            return text
    raise ValueError(f"scene '{scene}' has too few lines for {len(before) + 1} different prompts")


class _CommandChooser:
    """Chooses commands so that, over a split, every movement is asked for about equally often."""

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()

    def choose(self, cannot: frozenset[str], dice: Dice) -> tuple[str, ...]:
        """One to three movements in order, none twice, none undoing the one before it.

        "fixed" stands alone, or last: the camera comes to rest.
        """
        length = dice.weighted((1, 2, 3), (0.45, 0.37, 0.18))
        names: list[str] = []
        for place in range(length):
            allowed = [
                name
                for name in commands.PUBLISHED
                if name not in cannot
                and name not in names
                and (not names or _OPPOSITE.get(name) != names[-1])
                and (name != "fixed" or place == length - 1)
            ]
            least = min(self._asked[name] for name in allowed)
            weights = [math.exp((least - self._asked[name]) / 3) for name in allowed]
            names.append(dice.weighted(allowed, weights))
            self._asked[names[-1]] += 1
        return tuple(names)
