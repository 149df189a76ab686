"""Opens published weights: .safetensors files, shards with an index, and torch's .pth, .pt and
.bin files.

Names, shapes and dtypes come from the headers; a tensor's bytes are read when `Tensor.read` asks
for a part of it, through the mapped file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from worldr1_jax import files
from worldr1_jax.weights import torch_zip

INDEX_SUFFIX = ".safetensors.index.json"

# Pages of a mapped file that were read stay in the process's memory until the file is unmapped.
# After this many bytes of tensors it is mapped anew (40 microseconds), so that loading does not
# hold the file beside the arrays. Larger than most tensors, small beside any model that matters.
_WINDOW = 64 * 2**20


class _Mapping:
    """The one file that is mapped at a time, of all the files of a model."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._handle: Any = None
        self._seen = 0

    def handle(self, path: Path, nbytes: int) -> Any:
        """The open file, of which at most `nbytes` more are about to be read."""
        if path != self._path or self._seen > _WINDOW:
            self._path = self._handle = None  # unmapped before anything else is mapped
            self._handle, self._path, self._seen = _open(path), path, 0
        self._seen += nbytes
        return self._handle


class Tensor:
    """A tensor in a file.

    Attributes:
      path: the file.
      key: the publisher's name.
      shape: in the publisher's axis order.
      dtype: as safetensors names it: F32, BF16, F8_E4M3, I64, ...
    """

    def __init__(self, mapping: _Mapping, path: Path, key: str):
        header = mapping.handle(path, 0).get_slice(key)
        self._mapping, self.path, self.key = mapping, path, key
        self.shape: tuple[int, ...] = tuple(header.get_shape())
        self.dtype: str = header.get_dtype()

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index`, one slice an axis, in the file's dtype; it may be a view of the file,
        so copy what is to be kept."""
        if not math.prod(self.shape):  # of which safetensors slices none
            return np.empty(self.shape, torch_zip.DTYPES[self.dtype])[index]
        if self.dtype.startswith("F8"):
            return _read_fp8(self.path, self.key, torch_zip.DTYPES[self.dtype])[index]
        itemsize = torch_zip.DTYPES[self.dtype].itemsize
        rows = range(*index[0].indices(self.shape[0])) if index else range(1)
        # A part of a row maps the whole row.
        handle = self._mapping.handle(self.path, len(rows) * math.prod(self.shape[1:]) * itemsize)
        return handle.get_slice(self.key)[index] if index else handle.get_tensor(self.key)


class Rows:
    """`count` rows of a tensor from row `first`, as a tensor of their own (see Tensor)."""

    def __init__(self, tensor: Tensor, key: str, first: int, count: int):
        self._tensor, self._first, self.key = tensor, first, key
        self.shape = (count, *tensor.shape[1:])
        self.dtype, self.path = tensor.dtype, tensor.path

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """As Tensor.read."""
        start, stop, _ = index[0].indices(self.shape[0])
        rows = slice(self._first + start, self._first + stop)
        return self._tensor.read((rows, *index[1:]))


def open_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a file or of a folder's shards, by name.

    Args:
      path: a .safetensors file, one of torch's (torch_zip.SUFFIXES), an index
        (*.safetensors.index.json), or a folder with one index or one .safetensors file.

    Raises:
      ValueError: a missing, truncated or unreadable file; an index and files that do not agree, as
        when a name is in two files.
    """
    path = Path(path)
    found_files, listed = _files(path)
    tensors: dict[str, Tensor] = {}
    mapping = _Mapping()
    for file in found_files:
        names = list(mapping.handle(file, 0).keys())
        found = {key: Tensor(mapping, file, key) for key in names}
        if listed is not None:
            _compare_index(path, file.name, listed, found)
        tensors |= found
    return tensors


def _open(path: Path) -> Any:
    files.check_regular(path)
    if path.suffix in torch_zip.SUFFIXES:
        with files.named(path):
            return torch_zip.TorchZip(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is neither a .safetensors file nor one of torch's, "
            f"{', '.join(torch_zip.SUFFIXES)}"
        )
    return open_safetensors(path)


def open_safetensors(path: Path) -> Any:
    """The open file, of which nothing but the header is read; ValueError when it is broken."""
    files.check_regular(path)
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors (truncated or not such a file): "
            f"{files.short(str(error))}"
        ) from error


def _read_fp8(path: Path, key: str, dtype: np.dtype) -> np.ndarray:
    """A tensor of 8-bit floats, which safetensors itself cannot give to numpy. The header has been
    checked when the file was opened."""
    with files.named(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[key]
        first, last = entry["data_offsets"]
        file.seek(8 + length + first)
        return np.frombuffer(file.read(last - first), dtype).reshape(entry["shape"])


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files to read, and key -> file name when an index says so."""
    if not os.path.isdir(path):
        files.check_regular(path)
        return _shards(path) if path.name.endswith(INDEX_SUFFIX) else ([path], None)
    indexes = files.visible(path, f"*{INDEX_SUFFIX}")
    if len(indexes) > 1:
        raise ValueError(f"{path} has more than one weight index: {_names(indexes)}")
    return _shards(indexes[0]) if indexes else ([only_file(path)], None)


def only_file(folder: Path) -> Path:
    """The one .safetensors file of a folder; ValueError where there are more or none."""
    found = files.visible(folder, "*.safetensors")
    if not found:
        raise ValueError(f"{folder} holds no .safetensors file; other kinds are not read")
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {len(found)} .safetensors files but no index; name the one to read"
        )
    return found[0]


def _shards(index: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        listed = files.read_json(index)["weight_map"]
        names = sorted(set(listed.values()))
        outside = [name for name in names if Path(name).name != name]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: it needs a weight_map") from error
    if outside:
        name = files.short(outside[0])
        raise ValueError(f"{index} names the shard '{name}', which is not a file beside it")
    missing = [name for name in names if not os.path.isfile(index.parent / name)]
    if missing:
        name = files.short(missing[0])
        raise ValueError(f"{index.parent} lacks the shard {name}, which {index.name} names")
    return [index.parent / name for name in names], listed


def _compare_index(path: Path, name: str, listed: dict[str, str], found: Collection[str]) -> None:
    here = {key for key, file in listed.items() if file == name}
    for keys, text in (
        (here - set(found), "is in the index, but not in the shard"),
        (set(found) - here, "is not in the index, but in the shard"),
    ):
        if keys:
            raise ValueError(f"{path}: the key '{min(keys)}' {text} {name}")


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)
