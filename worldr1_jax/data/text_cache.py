"""Prompt embeddings on disk, so that training never holds the text encoder.

`launch/encode_prompts.py` writes a folder once:

  embeddings.array_record   one record a prompt: its hash (32 bytes), then the bytes of [n D],
                            n <= N tokens, row-major
  index.json                dtype, N and D, what the cache depends on, and the prompts' hashes in
                            record order

index.json is written last and in one piece: a folder without it is no cache. The hashes in the
records are for copies: one that stopped between the files leaves those of two caches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401 (makes numpy know "bfloat16" by name)
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Float, Int

from worldr1_jax import files
from worldr1_jax.weights.convert import is_finite

RECORDS, INDEX = "embeddings.array_record", "index.json"
_DOCUMENTS = (".md", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16  # of a large file, read for the fingerprint

_DTYPES = ("float32", "float16", "bfloat16")
_MOST_INDEX = 256 * files.MIB  # three million prompts
_MOST_SIDE = 2**16  # tokens, or numbers of a token
_AT_ONCE = 64  # embeddings that are read to be checked

# prompts -> embeddings [B N D] and tokens that each has
Encode = Callable[[Sequence[str]], tuple[Float[np.ndarray, "B N D"], Int[np.ndarray, " B"]]]


def fingerprint(paths: Iterable[str | Path], *settings: object) -> str:
    """Hash of what lies at some paths (files, and every file below folders but hidden ones and
    documents), and of settings. Of what embeddings depend on, it is that of tokenizer and text
    encoder, and of the padded length and the dtype.

    Files up to 4 MiB count whole; of larger ones, name, size and 64 pieces of 64 KiB evenly spaced,
    so that the check costs seconds on UMT5-XXL's 11 GB. Other weights differ in every piece; a file
    changed in one place only may pass.

    Raises:
      ValueError: a path that is missing, or a folder without a file.
    """
    digest = hashlib.sha256(json.dumps([str(value) for value in settings]).encode())
    for path in map(Path, paths):
        alone = os.path.isfile(path)
        folder = path.parent if alone else path
        found = [path] if alone else files.visible(path, "**/*")
        found = [file for file in found if alone or file.suffix not in _DOCUMENTS]
        if not found:
            raise ValueError(f"{path} holds no file of weights, nor of a tokenizer")
        for file in found:
            with files.named(file), open(file, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                digest.update(f"{file.relative_to(folder)} {size}\n".encode("utf-8", "replace"))
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

    Raises:
      ValueError: an embedding that is not finite, or a folder that cannot be written to.
    """
    folder, unique = files.make_folder(folder), list(dict.fromkeys(prompts))
    with files.named(folder, "written"):
        (folder / INDEX).unlink(missing_ok=True)
        (folder / RECORDS).touch()
    writer = ArrayRecordWriter(str(folder / RECORDS), "group_size:1")
    width, dtype = 0, ""
    for first in range(0, len(unique), batch):
        chosen = unique[first : first + batch]
        text, lengths = encode(chosen + [chosen[-1]] * (batch - len(chosen)))
        for prompt, row, length in zip(chosen, text, lengths, strict=False):
            _check_finite(prompt, row[:length])
            with _named(folder / RECORDS):
                writer.write(_digest(prompt) + np.ascontiguousarray(row[:length]).tobytes())
        width, dtype = text.shape[-1], str(text.dtype)
        progress(first + len(chosen))
    with _named(folder / RECORDS):
        writer.close()
    index = {
        "made_by": made_by, "tokens": tokens, "width": width, "dtype": dtype,
        "prompts": _hashes(unique),
    }  # fmt: skip
    files.write_atomically(folder / INDEX, json.dumps(index).encode())
    return len(unique)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what the writer says of a disk that is full into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be written: {files.short(str(error))}") from error


class TextCache:
    """Looks embeddings up.

    Args:
      folder: what `write` made.
      made_by: `fingerprint` of the encoder and tokenizer that the run names.

    Raises:
      ValueError: no complete cache there, or one of another encoder, tokenizer or length.
    """

    def __init__(self, folder: str | Path, *, made_by: str):
        folder = files.local(folder)
        if not os.path.isfile(folder / INDEX) or not os.path.isfile(folder / RECORDS):
            raise ValueError(
                f"policy.text_cache {files.short(str(folder))} is no complete cache: write it with "
                "launch/encode_prompts.py"
            )
        index = files.read_json(folder / INDEX, _MOST_INDEX)
        if index.get("made_by") != made_by:
            raise ValueError(
                f"policy.text_cache {folder} is stale: its text encoder, tokenizer or text_tokens "
                "are not the config's; write it again with launch/encode_prompts.py"
            )
        self._folder = folder
        try:
            self._shape = (operator.index(index["tokens"]), operator.index(index["width"]))
            self._dtype = np.dtype(index["dtype"])
            self._place = {digest: i for i, digest in enumerate(index["prompts"])}
            sound = self._dtype.name in _DTYPES and min(self._shape) > 0
            sound = sound and max(self._shape) <= _MOST_SIDE
        except (KeyError, TypeError) as error:
            raise ValueError(self._damaged("its index lacks what a cache's says")) from error
        if not sound:
            raise ValueError(self._damaged(f"rows of {self._dtype} {self._shape} are none"))
        try:
            self._reader = ArrayRecordReader(str(folder / RECORDS))
            count = self._reader.num_records()
        except (RuntimeError, ValueError) as error:
            raise ValueError(self._damaged(f"{RECORDS} cannot be read")) from error
        if count != len(self._place):
            raise ValueError(
                f"policy.text_cache {folder} holds {count} records for {len(self._place)} prompts: "
                "write it again with launch/encode_prompts.py"
            )

    def check(self, prompts: Sequence[str]) -> None:
        """Reads every prompt's embedding once (seconds for thousands).

        Raises:
          ValueError: prompts that are not in the cache, with a count and an example, or an
            embedding that is damaged or not finite.
        """
        self._check_present(prompts)
        unique = list(dict.fromkeys(prompts))
        for first in range(0, len(unique), _AT_ONCE):
            self._rows(unique[first : first + _AT_ONCE])

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "B N D"]:
        """Embeddings in the dtype in which they were written, zero beyond each prompt's end.

        Raises:
          ValueError: as `check`.
        """
        self._check_present(prompts)
        rows = self._rows(list(dict.fromkeys(prompts)))
        out = np.zeros((len(prompts), *self._shape), self._dtype)
        for place, prompt in zip(out, prompts, strict=True):
            place[: len(rows[prompt])] = rows[prompt]
        return out

    def _check_present(self, prompts: Sequence[str]) -> None:
        pairs = zip(prompts, _hashes(prompts), strict=True)
        missing = [prompt for prompt, digest in pairs if digest not in self._place]
        if missing:
            raise ValueError(
                f"policy.text_cache {self._folder} lacks {len(missing)} of the prompts, such as "
                f"'{files.short(missing[0])}': write it again with launch/encode_prompts.py"
            )

    def _rows(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The embedding of each prompt, as long as it was written."""
        digests = [_digest(prompt) for prompt in prompts]
        places = [self._place[digest.hex()] for digest in digests]
        try:
            records = self._reader.read(places)
        except (RuntimeError, ValueError) as error:
            raise ValueError(self._damaged(f"{RECORDS} cannot be read")) from error
        tokens, width = self._shape
        row = width * self._dtype.itemsize
        rows = {}
        for prompt, digest, record in zip(prompts, digests, records, strict=True):
            example, size = files.short(prompt), len(record) - len(digest)
            if not record.startswith(digest):
                reason = f"the record of '{example}' is another's, or of an earlier version"
                raise ValueError(self._damaged(reason))
            if size % row or size > tokens * row:
                raise ValueError(self._damaged(f"'{example}' has {size} bytes"))
            found = np.frombuffer(record, self._dtype, offset=len(digest))
            rows[prompt] = found.reshape(-1, width)
            _check_finite(prompt, rows[prompt])
        return rows

    def _damaged(self, reason: str) -> str:
        return (
            f"policy.text_cache {self._folder} is damaged ({reason}): write it again with "
            "launch/encode_prompts.py"
        )


def _check_finite(prompt: str, row: np.ndarray) -> None:
    if not is_finite(np.ascontiguousarray(row)):
        raise ValueError(
            f"the text embedding of '{files.short(prompt)}' holds numbers that are not finite"
        )


def _digest(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).digest()


def _hashes(prompts: Sequence[str]) -> list[str]:
    return [_digest(prompt).hex() for prompt in prompts]
