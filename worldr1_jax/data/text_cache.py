"""Prompt embeddings on disk, so that training never holds the text encoder.

`launch/encode_prompts.py` writes a folder once:

  embeddings.array_record   one record a prompt: the bytes of [n D], n <= N tokens, row-major
  index.json                dtype, N and D, what the cache depends on, and the prompts' hashes in
                            record order

index.json is written last and in one piece: a folder without it is no cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401 (makes numpy know "bfloat16" by name)
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Float, Int

from worldr1_jax.files import write_atomically

RECORDS, INDEX = "embeddings.array_record", "index.json"
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16  # of a large file, read for the fingerprint

# prompts -> embeddings [B N D] and tokens that each has
Encode = Callable[[Sequence[str]], tuple[Float[np.ndarray, "B N D"], Int[np.ndarray, " B"]]]


def fingerprint(paths: Iterable[str | Path], *settings: object) -> str:
    """Hash of what embeddings depend on: tokenizer and text encoder (files, and every file below
    folders), and settings such as the padded length and the dtype.

    Files up to 4 MiB count whole; of larger ones, name, size and 64 pieces of 64 KiB evenly spaced,
    so that the check costs seconds on UMT5-XXL's 11 GB. Other weights differ in every piece; a file
    changed in one place only may pass.

    Raises:
      ValueError: a path that is missing, or a folder without a file.
    """
    digest = hashlib.sha256(json.dumps([str(value) for value in settings]).encode())
    for path in map(Path, paths):
        folder = path.parent if path.is_file() else path
        files = sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
        if not files:
            raise ValueError(f"{path} holds no file: text embeddings depend on what is in it")
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder)} {size}\n".encode())
            with open(file, "rb") as handle:
                if size <= _SAMPLES * _SAMPLE_BYTES:
                    digest.update(handle.read())
                    continue
                for place in np.linspace(0, size - _SAMPLE_BYTES, _SAMPLES).astype(int):
                    handle.seek(int(place))
                    digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def write(
    folder: str | Path,
    prompts: Sequence[str],
    encode: Encode,
    *,
    made_by: str,
    tokens: int,
    batch: int,
    progress: Callable[[int], object] = lambda done: None,
) -> int:
    """Encodes every different prompt once, `batch` at a time, and writes the cache.

    Args:
      encode: given exactly `batch` prompts (the last batch is filled up with repeats).
      made_by: `fingerprint` of what encodes.
      tokens: N, the padded length.
      progress: told the number of prompts that are done.

    Returns:
      The number of different prompts.
    """
    folder, unique = Path(folder), list(dict.fromkeys(prompts))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    writer = ArrayRecordWriter(str(folder / RECORDS), "group_size:1")
    width, dtype = 0, ""
    for first in range(0, len(unique), batch):
        chosen = unique[first : first + batch]
        text, lengths = encode(chosen + [chosen[-1]] * (batch - len(chosen)))
        for row, length in zip(text[: len(chosen)], lengths, strict=False):
            writer.write(np.ascontiguousarray(row[:length]).tobytes())
        width, dtype = text.shape[-1], str(text.dtype)
        progress(first + len(chosen))
    writer.close()
    index = {
        "made_by": made_by, "tokens": tokens, "width": width, "dtype": dtype,
        "prompts": _hashes(unique),
    }  # fmt: skip
    write_atomically(folder / INDEX, json.dumps(index).encode())
    return len(unique)


class TextCache:
    """Looks embeddings up.

    Args:
      folder: what `write` made.
      made_by: `fingerprint` of the encoder and tokenizer that the run names.

    Raises:
      ValueError: no complete cache there, or one of another encoder, tokenizer or length.
    """

    def __init__(self, folder: str | Path, *, made_by: str):
        folder = Path(folder)
        if not (folder / INDEX).is_file() or not (folder / RECORDS).is_file():
            raise ValueError(
                f"policy.text_cache {folder} is no complete cache: write it with "
                "launch/encode_prompts.py"
            )
        index = json.loads((folder / INDEX).read_text())
        if index["made_by"] != made_by:
            raise ValueError(
                f"policy.text_cache {folder} is stale: its text encoder, tokenizer or text_tokens "
                "are not the config's; write it again with launch/encode_prompts.py"
            )
        self._folder = folder
        self._shape = (int(index["tokens"]), int(index["width"]))
        self._dtype = np.dtype(index["dtype"])
        self._place = {digest: i for i, digest in enumerate(index["prompts"])}
        self._reader = ArrayRecordReader(str(folder / RECORDS))
        if self._reader.num_records() != len(self._place):
            raise ValueError(
                f"policy.text_cache {folder} holds {self._reader.num_records()} records for "
                f"{len(self._place)} prompts: write it again with launch/encode_prompts.py"
            )

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError, with a count and an example, when a prompt is not in the cache."""
        pairs = zip(prompts, _hashes(prompts), strict=True)
        missing = [prompt for prompt, digest in pairs if digest not in self._place]
        if missing:
            raise ValueError(
                f"policy.text_cache {self._folder} lacks {len(missing)} of the prompts, such as "
                f"'{missing[0]}': write it again with launch/encode_prompts.py"
            )

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "B N D"]:
        """Embeddings in the dtype in which they were written, zero beyond each prompt's end.

        Raises:
          ValueError: a prompt that is not in the cache.
        """
        self.check(prompts)
        unique = list(dict.fromkeys(_hashes(prompts)))
        records = self._reader.read([self._place[digest] for digest in unique])
        rows = {
            digest: np.frombuffer(record, self._dtype).reshape(-1, self._shape[1])
            for digest, record in zip(unique, records, strict=True)
        }
        out = np.zeros((len(prompts), *self._shape), self._dtype)
        for place, digest in zip(out, _hashes(prompts), strict=True):
            place[: len(rows[digest])] = rows[digest]
        return out


def _hashes(prompts: Sequence[str]) -> list[str]:
    return [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts]
