"""Reads prompt files, and says everything that is wrong with them at once.

One reader for all: training, encoding, `launch/generate.py --prompts` and `launch/score.py --list`.
Lines end at line feeds and carriage returns alone: a prompt may hold characters, such as U+2028,
at which str.splitlines would also cut. Blank lines and marks of byte order are no prompts.
"""

import dataclasses
import difflib
import functools
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from worldr1_jax import files

SPLITS = ("train", "dynamic", "test")
_MOST_BYTES = 256 * files.MIB
_INVISIBLE = " \t\r\n\ufeff\u200b\u2060"  # around a prompt: no part of it
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # in no text, but in UTF-16 read as UTF-8

# A prompt -> what is wrong with it, or "".
Complaint = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class PromptSets:
    """Prompts by use: `train` (every reward), `dynamic` (3D rewards off), `test` (held out)."""

    train: tuple[str, ...]
    dynamic: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


class _Problems:
    """What is wrong with some files: each complaint with its lines, in the order found."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], list[int]] = {}

    def add(self, file: str, complaint: str, line: int | None = None) -> None:
        lines = self._lines.setdefault((files.short(file), complaint), [])
        if line is not None:
            lines.append(line)

    def __bool__(self) -> bool:
        return bool(self._lines)

    def raise_if_any(self, source: str) -> None:
        if not self:
            return
        found = [
            f"{file}: {complaint}{_line_ranges(lines)}"
            for (file, complaint), lines in self._lines.items()
        ]
        more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
        raise ValueError(
            f"prompts at {source} cannot be used ({'; '.join(found[:20])}{more}); every prompt "
            "file must be UTF-8 text with at least one prompt, one a line"
        )


def read(path: str | os.PathLike[str], complaint: Complaint = lambda text: "") -> PromptSets:
    """Reads a folder of prompt files, or one file.

    Args:
      path: a folder with train.txt and, where they are wanted, dynamic.txt and test.txt; or one
        .txt file, all of it `train`; or one .jsonl file of {"prompt": str, "split": "train" |
        "dynamic" | "test"}, where "split" may be left out and then means "train". Text files hold
        one prompt a line.
      complaint: says what else is wrong with a prompt, such as `camera.commands.complaint`.

    Returns:
      The prompts of each split in file order, with outer white space removed; () for a split
      without a file.

    Raises:
      ValueError: a path or file that is missing or empty, bytes that are not UTF-8, half of a
        surrogate pair, control characters, a test prompt that is learnt from as well, or a
        prompt to which `complaint` objects; one sentence names every file and line at fault.
    """
    path = files.local(path)
    problems = _Problems()
    sets: dict[str, list[str]] = {split: [] for split in SPLITS}
    if os.path.isdir(path):
        for split in SPLITS:
            file = path / f"{split}.txt"
            if split == "train" or os.path.lexists(file):
                sets[split] = _texts(_content(file, problems), file.name, complaint, problems)
    elif path.suffix == ".jsonl":
        _read_jsonl(path, sets, complaint, problems)
    elif path.suffix == ".txt":
        sets["train"] = _texts(_content(path, problems), path.name, complaint, problems)
    elif os.path.exists(path):
        problems.add(path.name, "neither a folder nor a .txt or .jsonl file")
    else:
        problems.add(path.name, "missing")
    if both := sorted({*sets["train"], *sets["dynamic"]} & set(sets["test"])):
        example = files.short(both[0])
        problems.add("test", f"what is learnt from is not held out, such as '{example}'")
    problems.raise_if_any(files.short(str(path)))
    return PromptSets(**{split: tuple(prompts) for split, prompts in sets.items()})


def texts(content: bytes, name: str, complaint: Complaint = lambda text: "") -> list[str]:
    """The prompts of a text, one a line, whatever it came from; errors as for `read`."""
    problems = _Problems()
    found = _texts(content, name, complaint, problems)
    problems.raise_if_any(name)
    return found


def read_content(path: str | os.PathLike[str]) -> bytes:
    """What is in a prompt file; ValueError where it cannot be read or is too large to be one."""
    return files.read_bytes(path, _MOST_BYTES)


def check_texts(prompts: Sequence[str]) -> None:
    """Raises ValueError, naming the first prompt that has control characters or cannot be written
    as UTF-8; the latter come from command lines, of which each byte that is no text becomes half of
    a surrogate pair."""
    for number, prompt in enumerate(prompts, start=1):
        if wrong := prompt and _fault(f"x{prompt}", "prompt"):
            raise ValueError(f"prompt {number}, '{files.short(prompt)}', has {wrong}")


def records(path: str | os.PathLike[str], fields: Sequence[str]) -> list[dict[str, str]]:
    """The `fields` of each line of a .jsonl file, all of them texts; errors as for `read`. A split,
    where a line has one, is one of SPLITS."""
    path, problems = files.local(path), _Problems()
    found = []
    for number, values in _parsed(_content(path, problems), path.name, problems):
        wrong = next(filter(None, (_fault(values.get(name), name) for name in fields)), "")
        if wrong := wrong or _split_fault(values):
            problems.add(path.name, wrong, number)
        else:
            found.append({name: values[name].strip(_INVISIBLE) for name in fields})
    problems.raise_if_any(str(path))
    return found


def write(folder: str | os.PathLike[str], prompts: PromptSets) -> None:
    """Writes the folder that `read` reads: one prompt a line, one file a split that has any."""
    for split in SPLITS:
        path = files.local(folder) / f"{split}.txt"
        if lines := "".join(f"{prompt}\n" for prompt in getattr(prompts, split)):
            files.write_atomically(path, lines.encode())
        else:
            path.unlink(missing_ok=True)


def _texts(
    content: bytes | None, name: str, complaint: Complaint, problems: _Problems
) -> list[str]:
    prompts = []
    for number, text in _lines(content, name, problems):
        wrong = _fault(text, "prompt") or _record(text) or complaint(text)
        if wrong:
            problems.add(name, wrong, number)
        prompts.append(text)
    return prompts


def _read_jsonl(
    path: Path, sets: dict[str, list[str]], complaint: Complaint, problems: _Problems
) -> None:
    for number, values in _parsed(_content(path, problems), path.name, problems):
        prompt = values.get("prompt", "")
        wrong = _fault(prompt, "prompt") or _split_fault(values)
        if wrong := wrong or complaint(prompt.strip(_INVISIBLE)):
            problems.add(path.name, wrong, number)
        else:
            sets[values.get("split", "train")].append(prompt.strip(_INVISIBLE))
    if not sets["train"] and not problems:
        problems.add(path.name, 'no prompt of the split "train"')


def _fault(text: object, field: str) -> str:
    """What is wrong with a value as text, or ""."""
    if not isinstance(text, str) or not text:
        return f'no text under "{field}"'
    try:
        text.encode()
    except UnicodeEncodeError:
        return f'half of a surrogate pair in "{field}"'
    if _is_blank(text):
        return f"blank {field}"
    return f'control characters in "{field}"' if _CONTROL.search(text) else ""


def _is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space of any script, and what has no width."""
    return all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cf") or c in "\t\n\r" for c in text)


def _record(text: str) -> str:
    """What is wrong with JSON as a prompt, whose marks would be read as words; or ""."""
    try:
        values = files.parse_json(text, "line") if text.startswith("{") else {}
    except ValueError:
        return ""
    return "a JSON record, which only a .jsonl file may hold" if values else ""


def _split_fault(values: Mapping[str, Any]) -> str:
    """What is wrong with the split of a record, which it need not have, or ""."""
    if "split" in values:
        known = values["split"] in SPLITS
        return "" if known else f'"split" is not one of {", ".join(SPLITS)}'
    for name in values:
        if _is_misspelt(name):
            return f'"{files.short(name)}" in place of "split"'
    return ""


@functools.lru_cache(maxsize=1024)
def _is_misspelt(name: str) -> bool:
    """Whether a field of a record is "split" by mistake."""
    near = difflib.SequenceMatcher(None, name.lower(), "split").ratio() >= 0.8
    return near and name != "splits"


def _content(path: Path, problems: _Problems) -> bytes | None:
    """Bytes of a file; None where there is none to be had, which is noted."""
    if not os.path.lexists(path):
        problems.add(path.name, "missing")
        return None
    try:
        return read_content(path)
    except ValueError as error:
        problems.add(path.name, str(error))
        return None


def _lines(content: bytes | None, name: str, problems: _Problems) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text) of the lines that hold any, and notes what cannot be
    read."""
    if content is None:
        return
    empty = True
    for number, line in enumerate(re.split(rb"\r\n?|\n", content), start=1):
        try:
            text = line.decode("utf-8").strip(_INVISIBLE)
        except UnicodeDecodeError:
            problems.add(name, "not UTF-8", number)
            text = ""
            empty = False
        if not _is_blank(text):
            empty = False
            yield number, text
    if empty:
        problems.add(name, "empty")


def _parsed(
    content: bytes | None, name: str, problems: _Problems
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, fields) of the lines that are JSON objects, and notes the others."""
    for number, text in _lines(content, name, problems):
        try:
            values = files.parse_json(text, "line")
        except ValueError:
            problems.add(name, "not JSON of an object", number)
        else:
            yield number, values


def _line_ranges(lines: list[int]) -> str:
    """[3, 7, 8, 9] -> " on lines 3, 7-9"; [3] -> " on line 3"; [] -> ""."""
    if not lines:
        return ""
    runs: list[list[int]] = []
    for line in sorted(lines):
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f" on line {text}" if len(lines) == 1 else f" on lines {text}"
