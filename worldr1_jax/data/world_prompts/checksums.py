"""The text of each split against checksums.json: another text is another version."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from worldr1_jax.data.world_prompts import generate
from worldr1_jax.data.world_prompts.generate import Record

CHECKSUMS = Path(__file__).with_name("checksums.json")


def checksum(records: Sequence[Record]) -> str:
    """SHA-256 of a split: each record as a line of JSON, in order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(dataclasses.asdict(record), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def verify(made: dict[str, tuple[Record, ...]], checksums: Path = CHECKSUMS) -> None:
    """Raises ValueError when the text is not that of its version."""
    known = json.loads(checksums.read_text("utf-8"))
    found = {"version": generate.VERSION} | {split: checksum(made[split]) for split in made}
    changed = [name for name in found if known.get(name) != found[name]]
    if changed:
        raise ValueError(
            f"world prompts {generate.VERSION} differ from {checksums.name} in "
            f"{', '.join(changed)}: the text has changed, so give it another VERSION in "
            "generate.py and the checksums that the flag --checksums writes"
        )
