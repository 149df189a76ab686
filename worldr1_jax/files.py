"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

PathLike = str | os.PathLike[str]


def write_atomically(path: PathLike, content: bytes) -> None:
    """Writes a file so that at every moment it is the old one or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
