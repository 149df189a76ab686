"""English of the world prompts: clauses as sentences or participles, articles, capitals."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

_BRACES = re.compile(r"\{([^{}]*)\}")
_VERB = re.compile(r"\|\s*((?:barely|still|hardly|never|now) )?([\w'-]+)")
# "is" is dropped from a participial clause ("a pail half full"), but not before these: what the
# subject is, rather than how it is.
_KEEPS_IS = re.compile(
    r"\|\s*(?:is|are)\s+(?:an?|the|one|two|three|only|where|what|that|there|all|already|enough|now|"
    r"everywhere|longer|off|sold|\w+'s|their|its|arcs|bands|bare|bars|batiks|beads|blankets|blue|"
    r"camouflage|chevrons|chords|commas|dabs|day|dot|fake|flat|grain|grey tops|half cloud|ivory|"
    r"lichens|lids|lines|log-cabin|loops|oak|paper|planes|pure|rough gabbro|satin|scagliola|"
    r"scales|slabs|solid|stacks|thumb|toadstools|tooth|torn edge|turf|warm earth|washes|"
    r"white commas|white triangles)\b"
)
_PERFECT = re.compile(r"\|\s*(?:has|have)\s+(?!an?\b|the\b|no\b|two\b|\w+\s+of\b)")
_ARTICLE = re.compile(r"\b([Aa])n?(?= ([\w']+))")
_VOWEL_SOUND = re.compile(
    r"(?!uni|use|usu|ute|uti|eu|ewe|one\b|once|u\b)[aeiou]|hour|honest|heir|8|11\b|18\b"
)
_DOUBLED = frozenset({"begin", "overlap", "overtop", "undercut", "unpin", "unwrap", "zigzag"})


def choose(text: str, pick: Callable[[int], int]) -> str:
    """Replaces each {a/b/c} by one of its alternatives; pick(n) returns an index below n."""

    def one(match: re.Match[str]) -> str:
        options = match[1].split("/")
        return options[pick(len(options))]

    return _BRACES.sub(one, text)


@functools.lru_cache(maxsize=1 << 16)
def finite(clause: str) -> str:
    """Turns "pots | lie and |drip" into "pots lie and drip"."""
    return re.sub(r"\|\s*", "", clause)


@functools.lru_cache(maxsize=1 << 16)
def participial(clause: str) -> str | None:
    """Turns "pots | lie and |drip" into "pots lying and dripping", "a | is full" into "a full".

    None where English has no such form that reads well ("the sun is a coin", "a door has opened").
    """
    if _KEEPS_IS.search(clause) or _PERFECT.search(clause):
        return None
    text = _VERB.sub(lambda match: (match[1] or "") + _participle(match[2]), clause)
    return re.sub(r" {2,}", " ", text).strip()


def _participle(verb: str) -> str:
    if verb in ("is", "are"):
        return ""
    if verb in ("has", "have"):
        return "with"
    return present_participle(verb)


def present_participle(verb: str) -> str:
    """From the third person or the plural: "lies" or "lie" -> "lying", "drips" -> "dripping"."""
    base = _base(verb)
    if base.endswith("ie"):
        return base[:-2] + "ying"
    if base.endswith("e") and not base.endswith(("ee", "oe", "ye")):
        return base[:-1] + "ing"
    closed = re.search(r"(?:[^aeiou]|qu)[aeiouy][^aeiouwxy]$", base)
    vowels = len(re.findall(r"[aeiouy]+", base.replace("qu", "q")))
    if closed and (vowels == 1 or base.endswith("l") or base in _DOUBLED):
        return base + base[-1] + "ing"  # British: tunnelling
    return base + "ing"


def _base(verb: str) -> str:
    if not verb.endswith("s") or verb.endswith("ss"):
        return verb
    if verb.endswith("ies") and len(verb) > 4:
        return verb[:-3] + "y"
    if verb.endswith(("ches", "shes", "sses", "xes", "zzes", "goes", "does", "oes")):
        return verb[:-2]
    return verb[:-1]


def articles(text: str) -> str:
    """Makes "a" and "an" agree with the word that follows."""

    def one(match: re.Match[str]) -> str:
        return match[1] + ("n" if _VOWEL_SOUND.match(match[2].lower()) else "")

    return _ARTICLE.sub(one, text)


def sentence(text: str) -> str:
    """A capital first, a full stop last, articles that agree."""
    text = articles(text.strip())
    return text[0].upper() + text[1:] + "."
