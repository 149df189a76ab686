"""What the world prompts are held to: repeated word sequences, near-duplicates, vocabulary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from worldr1_jax.camera import commands

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def words(text: str) -> list[str]:
    """Lower-case words; numbers and punctuation left out."""
    return _WORD.findall(text.lower())


def shingles(text: str, size: int = 3) -> frozenset[str]:
    """All sequences of `size` words of a text."""
    found = words(text)
    return frozenset(" ".join(found[i : i + size]) for i in range(len(found) - size + 1))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Size of the intersection over that of the union; 0 for two empty sets."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared) if shared else 0.0


def most_repeated(texts: Sequence[str], size: int = 8) -> tuple[str, float]:
    """The sequence of `size` words that most texts hold, and the share of texts that do."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(shingles(text, size))
    sequence, count = max(counts.items(), key=lambda item: (item[1], item[0]))
    return sequence, count / len(texts)


def most_alike(texts: Sequence[str]) -> tuple[float, str, str]:
    """The largest Jaccard index of word 3-shingles over all pairs, exactly, and that pair."""
    sets = [shingles(text) for text in texts]
    holders: dict[str, list[int]] = {}
    best = (0.0, "", "")
    for here, mine in enumerate(sets):
        shared: Counter[int] = Counter()
        for shingle in mine:
            others = holders.setdefault(shingle, [])
            shared.update(others)
            others.append(here)
        for other, count in shared.items():
            index = count / (len(mine) + len(sets[other]) - count)
            best = max(best, (index, texts[other], texts[here]))
    return best


def vocabulary(texts: Iterable[str]) -> tuple[int, int]:
    """Distinct words, and distinct words once regular endings (s, es, ed, ing, er) are cut off."""
    distinct = {word for text in texts for word in words(text)}
    return len(distinct), len({_stem(word, distinct) for word in distinct})


def _stem(word: str, known: set[str]) -> str:
    """Cuts an ending where what is left, with or without a final e, is a word of the texts."""
    for ending in ("'s", "ing", "ed", "es", "er", "s", "ly"):
        if word.endswith(ending) and len(word) - len(ending) > 2:
            rest = word[: -len(ending)]
            undoubled = rest[:-1] if rest[-1] == rest[-2] else rest
            for base in (rest, rest + "e", undoubled):
                if base in known:
                    return base
    return word


def report(prompts: Sequence[str]) -> dict[str, object]:
    """All measures of a list of prompts; camera clauses are stripped where the name says so."""
    scenes = [commands.scene(prompt) for prompt in prompts]
    stripped, share = most_repeated(scenes)
    whole, whole_share = most_repeated(prompts)
    index, *_ = most_alike(scenes)
    distinct, stems = vocabulary(scenes)
    lengths = sorted(len(words(scene)) for scene in scenes)
    return {
        "prompts": len(prompts),
        "words_least": lengths[0],
        "words_median": lengths[len(lengths) // 2],
        "words_most": lengths[-1],
        "vocabulary": distinct,
        "vocabulary_stems": stems,
        "sequence_of_8": stripped,
        "sequence_of_8_share": share,
        "sequence_of_8_with_camera": whole,
        "sequence_of_8_with_camera_share": whole_share,
        "jaccard_most": index,
    }
