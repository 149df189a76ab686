"""Files that are whole or not there, and strangers' files: local, regular, of bounded size.

Whatever the system says about a path becomes a ValueError that names it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]

MIB = 2**20
# "gs://bucket", and the "gs:/bucket" that pathlib makes of it, which would be a local folder.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_SHOWN = 120  # characters of a stranger's text that a message quotes


def local(path: PathLike) -> Path:
    """The path; raises ValueError for the URL of a bucket, of which a local folder would be made
    without a word."""
    text = os.fspath(path)
    if _URL.match(text):
        raise ValueError(
            f"{text} is a URL; it must be a folder or file here, such as of a bucket that is "
            "mounted by gcsfuse"
        )
    return Path(path)


@contextlib.contextmanager
def named(path: PathLike, doing: str = "read") -> Iterator[None]:
    """Turns what the system says about a path into one ValueError: "PATH cannot be read: ..."."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or short(str(error))
        raise ValueError(f"{short(str(path))} cannot be {doing}: {reason}") from error


@contextlib.contextmanager
def stored(path: PathLike) -> Iterator[None]:
    """The same for what tensorstore says, in pages, when it cannot write below a path."""
    try:
        yield
    except (ValueError, OSError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        reason = os.strerror(int(code[1])) if code else short(str(error).split("\n")[0])
        raise ValueError(f"{short(str(path))} cannot be written: {reason}") from error


def make_folder(path: PathLike) -> Path:
    """Makes a folder and those above it, and returns it; ValueError where that cannot be."""
    folder = local(path)
    with named(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_writable(path: PathLike) -> Path:
    """Makes a folder (see `make_folder`) and returns it; ValueError where no file can be made in
    it, which is better known before an hour's work than after it."""
    folder = make_folder(path)
    with named(folder, "written to"), tempfile.TemporaryFile(dir=folder):
        return folder


def write_atomically(path: PathLike, content: bytes) -> None:
    """Writes a file so that at every moment it is the old one or the new one, never a part."""
    path = local(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with named(path, "written"):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # what went wrong above is what counts
                temporary.unlink(missing_ok=True)


def check_regular(path: PathLike) -> None:
    """Raises ValueError unless this is a regular file: a pipe or a device could keep a reader
    waiting for ever."""
    local(path)
    if not os.path.isfile(path):  # also where the system does not take the name
        state = "is no regular file" if os.path.lexists(path) else "does not exist"
        raise ValueError(f"{short(str(path))} {state}")


def visible(folder: Path, pattern: str) -> list[Path]:
    """Regular files of a folder by a glob pattern, sorted. Hidden ones are none, nor are those of
    hidden folders: macOS leaves "._model.safetensors", which holds no weights, beside what it
    copies, and downloads leave ".cache", which says when they were made."""
    with named(folder):
        return sorted(
            path for path in folder.glob(pattern)
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )  # fmt: skip


def read_bytes(path: PathLike, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; ValueError for any other."""
    check_regular(path)
    with named(path), open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} is larger than the {most // MIB} MiB that such a file may have")
    return content


def read_json(path: PathLike, most: int = 16 * MIB) -> dict[str, Any]:
    """The JSON object in a file; errors as for `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, most), str(path))


def parse_json(content: bytes | str, source: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: text that is not UTF-8 or not JSON, is nested too deeply to be read, has a number
        that is not finite, or is no object; the sentence begins with `source`.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        values = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(f"{source} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON: {short(str(error))}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} has to be a JSON object of fields")
    return values


def short(text: str) -> str:
    """A stranger's text as a message may quote it: of characters that can be printed, and where it
    is long, without its middle, for the end of a path is what names it."""
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 3]}...{text[3 - 2 * _SHOWN // 3 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is larger than any number")
    return value
