"""Reads prompt files, and says everything that is wrong with them at once."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

SPLITS = ("train", "dynamic", "test")
_BLANK = "blank prompt"

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
        lines = self._lines.setdefault((file, complaint), [])
        if line is not None:
            lines.append(line)

    def __bool__(self) -> bool:
        return bool(self._lines)

    def raise_if_any(self, path: Path) -> None:
        if not self:
            return
        found = "; ".join(
            f"{file}: {complaint}{_line_ranges(lines)}"
            for (file, complaint), lines in self._lines.items()
        )
        raise ValueError(
            f"prompts at {path} cannot be used ({found}); every prompt file must be UTF-8 text "
            "with at least one prompt, one a line, and no blank lines."
        )


def read(path: str | os.PathLike[str], complaint: Complaint = lambda text: "") -> PromptSets:
    """Reads a folder of prompt files, or one file.

    Args:
      path: a folder with train.txt, dynamic.txt and test.txt; or one .txt file, all of it
        `train`; or one .jsonl file of {"prompt": str, "split": "train" | "dynamic" | "test"},
        where "split" may be left out and then means "train". Text files hold one prompt a line.
      complaint: says what else is wrong with a prompt, such as `camera.commands.complaint`.

    Returns:
      The prompts of each split in file order, with outer white space removed.

    Raises:
      ValueError: a path or file that is missing or empty, bytes that are not UTF-8, a blank
        prompt or one to which `complaint` objects; one sentence names every file and line at fault.
    """
    path = Path(path)
    problems = _Problems()
    sets: dict[str, list[str]] = {split: [] for split in SPLITS}
    if path.is_dir():
        for split in SPLITS:
            sets[split] = _read_text(path / f"{split}.txt", complaint, problems)
    elif path.suffix == ".jsonl":
        _read_jsonl(path, sets, complaint, problems)
    elif path.suffix == ".txt":
        sets["train"] = _read_text(path, complaint, problems)
    elif path.exists():
        problems.add(path.name, "neither a folder nor a .txt or .jsonl file")
    else:
        problems.add(path.name, "missing")
    problems.raise_if_any(path)
    return PromptSets(**{split: tuple(prompts) for split, prompts in sets.items()})


def write(folder: str | os.PathLike[str], prompts: PromptSets) -> None:
    """Writes the folder that `read` reads: one prompt a line, one file a split."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = "".join(f"{prompt}\n" for prompt in getattr(prompts, split))
        Path(folder, f"{split}.txt").write_text(lines, encoding="utf-8")


def _read_text(path: Path, complaint: Complaint, problems: _Problems) -> list[str]:
    prompts = []
    for number, line in _lines(path, problems):
        text = line.strip()
        wrong = complaint(text) if text else _BLANK
        if wrong:
            problems.add(path.name, wrong, number)
        prompts.append(text)
    return prompts


def _read_jsonl(
    path: Path, sets: dict[str, list[str]], complaint: Complaint, problems: _Problems
) -> None:
    for number, text in _lines(path, problems):
        wrong, split, prompt = _parse_record(text)
        wrong = wrong or complaint(prompt)
        if wrong:
            problems.add(path.name, wrong, number)
        else:
            sets[split].append(prompt)
    if not sets["train"] and not problems:
        problems.add(path.name, 'no prompt of the split "train"')


def _parse_record(text: str) -> tuple[str, str, str]:
    """One line of a .jsonl file -> (complaint or "", split, prompt)."""
    if not text.strip():
        return _BLANK, "", ""
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        return "not JSON", "", ""
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        return 'no text under "prompt"', "", ""
    split = record.get("split", "train")
    if split not in SPLITS:
        return f'"split" is not one of {", ".join(SPLITS)}', "", ""
    prompt = record["prompt"].strip()
    return ("" if prompt else _BLANK), split, prompt


def _lines(path: Path, problems: _Problems) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text) of the lines that are UTF-8, and notes the others.

    Lines end at newlines only: a prompt may hold characters, such as U+2028, at which
    str.splitlines would also cut.
    """
    if not path.is_file():
        problems.add(path.name, "missing")
        return
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # Windows editors add this mark
    if not content.strip():
        problems.add(path.name, "empty")
        return
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            problems.add(path.name, "not UTF-8", number)
        else:
            yield number, text


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
