"""Flags of XLA, which ends the process at one that it does not know, and drops some from version to
version."""

import importlib.util
import mmap
import os
from pathlib import Path


def add(flag: str, value: str) -> None:
    """Adds to XLA_FLAGS what its user has not set. Call it before jax is used.

    Only where the library has the flag, and where no accelerator's library, with an XLA of its own,
    would read it.
    """
    others = ("libtpu", "jax_plugins")
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(importlib.util.find_spec, others)):
        return
    given = os.environ.get("XLA_FLAGS", "")
    if flag not in given and known(flag):
        os.environ["XLA_FLAGS"] = f"{given} --{flag}={value}".strip()


def known(flag: str) -> bool:
    """Whether the installed jaxlib has this flag: its library holds the name as a C string. That of
    a flag which was removed may stay in it otherwise, reserved in a protocol buffer."""
    spec = importlib.util.find_spec("jaxlib")
    for folder in spec.submodule_search_locations or () if spec else ():
        library = Path(folder) / "libjax_common.so"
        if library.is_file():
            with (
                library.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
            ):
                return text.find(b"\0" + flag.encode() + b"\0") >= 0
    return False
