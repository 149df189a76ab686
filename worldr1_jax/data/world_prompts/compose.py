"""One scene -> one short and one long prompt: which clauses, in what order, joined how."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

from worldr1_jax.data.world_prompts import phrasing
from worldr1_jax.data.world_prompts.material import Nucleus
from worldr1_jax.data.world_prompts.measure import words

T = TypeVar("T")
Clause = tuple[str, str]  # layer ("s", "f", ... or "p" for layout) and text with its verb marks

LONG_WORDS = (60, 120)  # of a long prompt, without its camera clause

# Layers of a long prompt in order; "S" is the first subject, which carries the place.
_ORDERS = (
    "Ssfmbtl", "Sftsmbl", "Stfmsbl", "Slfsmbt", "Sbmsftl", "Smsbftl", "Slsbmft", "Stlsfmb",
    "lSsfmbt", "lSfmtbs", "lSbmsft", "bSsfmtl", "bmSfstl", "fSsmbtl", "fmSsbtl", "mSfsbtl",
)  # fmt: skip
_OPENERS = {
    "f": (
        "in the foreground", "close to the lens", "at the front", "in the near corner",
        "down in front", "low in the frame", "just ahead", "on the near side", "up close",
        "near at hand", "at the lower edge", "within reach", "at the very front",
    ),
    "m": (
        "in the middle distance", "a little way in", "farther in", "past that", "midway",
        "at mid-depth", "some way back", "halfway in", "at the centre", "behind", "one step back",
        "between near and far", "further on", "to one side",
    ),
    "b": (
        "in the distance", "beyond", "at the back", "far off", "behind everything", "farthest away",
        "at the limit of sight", "on the last plane", "to close the view", "past all this",
        "at the far end", "in the background",
    ),
}  # fmt: skip
# "while in the distance a sledge ..." reads without a comma, "while behind a sledge" does not.
_ENDS_CLEARLY = ("ground", "corner", "distance", "centre", "end", "edge")
_CROWDED = "lens"  # a clause that says where it is needs no opener


class Dice:
    """Seeded choices that are the same on every platform and Python: only random() is used."""

    def __init__(self, *key: object):
        digest = hashlib.sha256(repr(key).encode()).digest()
        self._random = random.Random(int.from_bytes(digest, "big"))

    def below(self, count: int) -> int:
        return int(self._random.random() * count)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def one(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(len(left))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        place = self._random.random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            place -= weight
            if place < 0:
                return item
        return items[-1]


def short(nucleus: Nucleus, dice: Dice) -> str:
    """One sentence: subject, place and one or two details."""
    at = phrasing.choose(nucleus.place, dice.below)
    head = dice.weighted("smfb", (0.62, 0.2, 0.1, 0.08))
    subject = _draw(nucleus, head, dice)
    layers = [layer for layer in dice.shuffled("sfmbl") if layer != head]
    if head != "s" and dice.chance(0.5):  # then the subject proper comes second
        layers = ["s", *(layer for layer in layers if layer != "s")]
    details = [_draw(nucleus, layer, dice) for layer in layers]
    detail = details[0]
    loose = [phrasing.participial(text) for _, text in details]
    with_ = [text for text in loose if text]
    main = phrasing.finite(subject[1])
    fronted = f"{at}, {main}"
    plain = f"{main} {at}" if len(main.split()) < 9 else fronted
    other = phrasing.finite(detail[1])
    light = phrasing.finite(_draw(nucleus, "l", dice)[1])
    bare = phrasing.participial(subject[1])
    forms = [
        f"{fronted}, {with_[0]}",
        f"{fronted}, with {with_[0]}",
        f"{fronted} while {other}",
        f"{fronted}; {other}",
        f"{fronted}, and {other}",
        f"{at}, {light} as {main}",
        f"{plain} while {light}",
        f"{plain} as {light}",
        f"{plain}, {with_[0]}",
        f"{plain}, with {with_[-1]}",
        f"{at}, {with_[0]}, {main}" if detail[0] == "l" else f"{at}, with {with_[0]}, {main}",
        f"{fronted}, {with_[0]} and {with_[-1]}" if len(with_) > 1 else f"{fronted}; {other}",
        f"{bare} {at}, {with_[0]}" if bare and len(main.split()) < 9 else f"{fronted}, {with_[0]}",
        f"{at}: {main}, {with_[0]}",
    ]
    return phrasing.sentence(dice.one(forms))


def long(nucleus: Nucleus, layout: Sequence[str], dice: Dice) -> str:
    """Several sentences: subject and place, three planes, material, light.

    Returns "" when the text that came out is not of `LONG_WORDS` words; then draw again.
    """
    clauses = _choose_clauses(nucleus, layout, dice)
    writer = _Writer(phrasing.choose(nucleus.place, dice.below), dice)
    while clauses:
        count = dice.weighted((1, 2, 3), (0.3, 0.5, 0.2))
        layers = [layer for layer, _ in clauses]
        if "p" in layers[:count]:  # a remark on layout stands by itself
            count = max(1, layers.index("p"))
        taken, clauses = clauses[:count], clauses[count:]
        writer.write(taken)
    text = " ".join(writer.sentences)
    return text if LONG_WORDS[0] <= len(words(text)) <= LONG_WORDS[1] else ""


def _draw(nucleus: Nucleus, layer: str, dice: Dice) -> Clause:
    return layer, phrasing.choose(dice.one(nucleus.lines[layer]), dice.below)


def _choose_clauses(nucleus: Nucleus, layout: Sequence[str], dice: Dice) -> list[Clause]:
    """One clause of each layer that matters, then more until the prompt is long enough."""
    pool = {
        layer: [(layer, phrasing.choose(line, dice.below)) for line in dice.shuffled(lines)]
        for layer, lines in nucleus.lines.items()
    }
    pool["p"] = [("p", phrasing.choose(dice.one(layout), dice.below))]
    chosen = [pool[layer].pop(0) for layer in "sfmbl"]
    first = chosen[0]
    target = dice.below(32) + 62
    layers = "fmbt" + ("p" if dice.chance(0.5) else "") + ("s" if dice.chance(0.7) else "")
    more = dice.shuffled([c for layer in layers for c in pool[layer]])
    while more and _words(chosen) + len(nucleus.place.split()) < target:
        chosen.append(more.pop())
    order = dice.one(_ORDERS)
    ordered: list[Clause] = []
    for layer in order:
        if layer == "S":
            ordered.append(("S", first[1]))
        else:
            ordered += [c for c in chosen if c[0] == layer and c is not first]
    for clause in chosen:
        if clause[0] == "p":  # never first: a scene opens with a thing
            ordered.insert(1 + dice.below(len(ordered)), clause)
    return ordered


def _words(clauses: Sequence[Clause]) -> int:
    return sum(len(text.split()) for _, text in clauses)


class _Writer:
    """Joins clauses to sentences without using an opener or a join twice in one prompt."""

    def __init__(self, place: str, dice: Dice):
        self.sentences: list[str] = []
        self._place, self._dice = place, dice
        self._joins: list[str] = []
        self._placed: set[str] = set()  # layers and openers that were used

    def write(self, clauses: Sequence[Clause]) -> None:
        head, *rest = clauses
        text = self._main(head, alone=not rest)
        for clause in rest:
            text = self._join(text, clause)
        self.sentences.append(phrasing.sentence(text))

    def _main(self, clause: Clause, alone: bool) -> str:
        layer, marked = clause
        text = phrasing.finite(marked)
        if layer == "S":
            return self._with_place(marked)
        opener = self._opener(clause, 0.6)
        loose = phrasing.participial(marked)
        if alone and loose and layer in "sfmb" and not opener and self._dice.chance(0.2):
            return loose  # a sentence without a verb, as in a list of shots
        return f"{opener}, {text}" if opener else text

    def _with_place(self, marked: str) -> str:
        text, loose = phrasing.finite(marked), phrasing.participial(marked)
        brief = len(text.split()) < 8
        form = self._dice.below(16)
        if brief and form < 5:
            return f"{text} {self._place}"
        if brief and form == 5 and loose:
            return f"{loose} {self._place}"
        if form == 6:
            return f"{self._place}: {text}"
        return f"{self._place}, {text}"

    def _join(self, text: str, clause: Clause) -> str:
        layer, marked = clause
        if layer == "S":
            return f"{text}; {self._with_place(marked)}"
        plain, loose = phrasing.finite(marked), phrasing.participial(marked)
        forms = {"while": "{}, while {}", "semicolon": "{}; {}", "and": "{}, and {}"}
        if loose:
            forms |= {"with": "{}, with {}", "loose": "{}, {}"}
        left = [name for name in forms if name not in self._joins] or ["semicolon"]
        name = self._dice.one(left)
        self._joins.append(name)
        if name in ("with", "loose"):
            return forms[name].format(text, loose)
        opener = self._opener(clause, 0.45, of_place=name == "while")
        comma = "," if opener and name != "while" else ""
        return forms[name].format(text, f"{opener}{comma} {plain}".strip())

    def _opener(self, clause: Clause, probability: float, of_place: bool = False) -> str:
        """Where the clause is, said at most once a layer."""
        layer, text = clause
        if layer not in _OPENERS or layer in self._placed or _CROWDED in text:
            return ""
        if not self._dice.chance(probability):
            return ""
        self._placed.add(layer)
        openers = [o for o in _OPENERS[layer] if not of_place or o.endswith(_ENDS_CLEARLY)]
        return self._dice.one(openers)
