"""Reads tensors from torch's .pth files (a zip archive with a pickle) without running any of it.

The pickle can name nothing but what a table of tensors is made of: OrderedDict, the function that
puts a tensor together, and names of dtypes. Here each of these is a value that cannot be changed
or a function that only notes shapes; anything else is refused by name. Tensors are views into the
mapped file. The interface is that of `safetensors.safe_open`: keys, get_slice, get_tensor.

Facts of the format: torch.save and torch/_utils.py (_rebuild_tensor_v2, _rebuild_tensor_v3).
"""

from __future__ import annotations

import collections
import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SUFFIXES = (".pth", ".pt")

# Names of dtypes as safetensors has them -> what numpy calls them.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# Dtypes without a storage class of their own are named beside an untyped one, in bytes.
_UNTYPED = "bytes"
_NAMED_DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


class _Storage(NamedTuple):
    """A record of the archive: its name, the dtype (or _UNTYPED) and the number of elements."""

    record: str
    dtype: str
    count: int


class _Tensor(NamedTuple):
    """A tensor in a record; offset and strides in elements."""

    record: str
    dtype: str
    nbytes: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Rebuild:
    """Stands for torch's functions that rebuild a tensor. No attributes, so none can be set."""

    __slots__ = ()

    def __call__(self, *args: Any) -> _Tensor:
        storage, offset, shape, strides = args[:4]
        # v2: ..., requires_grad, backward_hooks; v3: and then the dtype.
        dtype = args[6] if len(args) > 6 else getattr(storage, "dtype", None)
        if not (
            isinstance(storage, _Storage)
            and dtype in DTYPES
            and storage.dtype in (_UNTYPED, dtype)
            and _are_counts((offset,))
            and _are_counts(shape)
            and _are_counts(strides)
            and len(shape) == len(strides)
        ):
            raise ValueError("a tensor is not described by a storage, an offset, a shape, strides")
        itemsize = 1 if storage.dtype == _UNTYPED else DTYPES[dtype].itemsize
        return _Tensor(storage.record, dtype, storage.count * itemsize, offset, shape, strides)


_REBUILD = _Rebuild()
_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _REBUILD,
    ("torch._utils", "_rebuild_tensor_v3"): _REBUILD,
    ("torch.storage", "UntypedStorage"): _UNTYPED,
    **{("torch", name): dtype for name, dtype in (_STORAGES | _NAMED_DTYPES).items()},
}


class _Unpickler(pickle.Unpickler):
    """Admits what _ADMITTED names. All of it is immutable, so that BUILD has nothing to change."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise ValueError(f"its pickle asks for {module}.{name}, which is not part of a tensor")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(record), str(), int(count)) if count >= 0:
                return _Storage(record, dtype, count)
        raise ValueError("its pickle refers to something that is not a storage")


class TorchZip:
    """An open .pth file.

    Raises:
      ValueError: a file that is truncated, of torch's older format, compressed, or big-endian; a
        pickle that holds or asks for anything but named tensors; a tensor outside of its record.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        try:
            with zipfile.ZipFile(self._path) as archive:
                self._tensors, records = self._read(archive)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path} cannot be read as a .pth file: it is truncated, or of torch's format "
                f"before 1.6 ({error})"
            ) from error
        with open(self._path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        names = {tensor.record for tensor in self._tensors.values()}
        self._starts = {name: self._start(records[name]) for name in names}

    def keys(self) -> list[str]:
        """Names of the tensors, in the file's order."""
        return list(self._tensors)

    def get_slice(self, key: str) -> TensorSlice:
        """A tensor that is not read yet."""
        return TensorSlice(self, key)

    def get_tensor(self, key: str) -> np.ndarray:
        """A read-only view of the mapped file."""
        tensor = self._tensors[key]
        dtype = DTYPES[tensor.dtype]
        if not math.prod(tensor.shape):
            return np.empty(tensor.shape, dtype)
        return np.ndarray(
            tensor.shape,
            dtype,
            buffer=self._map,
            offset=self._starts[tensor.record] + tensor.offset * dtype.itemsize,
            strides=[stride * dtype.itemsize for stride in tensor.strides],
        )

    def _read(
        self, archive: zipfile.ZipFile
    ) -> tuple[dict[str, _Tensor], dict[str, zipfile.ZipInfo]]:
        """The table of tensors, and the archive's records by the names that it uses."""
        entries = {info.filename: info for info in archive.infolist()}
        roots = [n.removesuffix("data.pkl") for n in entries if n.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1 or len(entries) != len(archive.infolist()):
            raise ValueError(f"{self._path} is a zip archive, but not one that torch.save wrote")
        packed = [n for n, info in entries.items() if info.compress_type or info.flag_bits & 1]
        if packed:
            raise ValueError(
                f"{self._path}: the record {packed[0]} is compressed or encrypted; torch's are not"
            )
        order = entries.get(f"{roots[0]}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise ValueError(f"{self._path} was written on a big-endian machine: save it anew")
        tensors = self._unpickle(archive.read(f"{roots[0]}data.pkl"))
        data = f"{roots[0]}data/"
        records = {n.removeprefix(data): i for n, i in entries.items() if n.startswith(data)}
        for key, tensor in tensors.items():
            self._check(key, tensor, records.get(tensor.record))
        return tensors, records

    def _unpickle(self, data: bytes) -> dict[str, _Tensor]:
        try:
            # A memo index far beyond the file would make the unpickler allocate that much.
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name.endswith("PUT") and argument > len(data):
                    raise ValueError("its pickle has a memo larger than itself")
            root = _Unpickler(io.BytesIO(data)).load()
        except (
            pickle.UnpicklingError, ValueError, TypeError, AttributeError, LookupError, EOFError,
            OverflowError, struct.error,
        ) as error:  # fmt: skip
            raise ValueError(f"{self._path} is refused: {error}") from error
        # dict.items, because an OrderedDict may carry attributes, even one called items.
        tensors = dict(dict.items(root)) if isinstance(root, dict) else {}
        wrong = [k for k, v in tensors.items() if not (isinstance(k, str) and type(v) is _Tensor)]
        if wrong or not tensors:
            what = f"'{wrong[0]}' is no tensor" if wrong else "it is no table of tensors"
            raise ValueError(f"{self._path} has to hold named tensors and nothing else, but {what}")
        return tensors

    def _check(self, key: str, tensor: _Tensor, record: zipfile.ZipInfo | None) -> None:
        if record is None:
            raise ValueError(f"{self._path} lacks the record of the tensor '{key}'")
        if record.file_size != tensor.nbytes:
            raise ValueError(
                f"{self._path}: the record of '{key}' has {record.file_size} bytes, not the "
                f"{tensor.nbytes} that its storage needs"
            )
        if not math.prod(tensor.shape):
            return
        pairs = zip(tensor.shape, tensor.strides, strict=True)
        last = tensor.offset + sum((size - 1) * stride for size, stride in pairs)
        if (last + 1) * DTYPES[tensor.dtype].itemsize > tensor.nbytes:
            raise ValueError(f"{self._path}: the tensor '{key}' reaches beyond its storage")

    def _start(self, record: zipfile.ZipInfo) -> int:
        """Where a record's bytes begin: after its own header, whose length only it knows."""
        start = record.header_offset
        header = self._map[start : start + 30]
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError(f"{self._path} has no record where {record.filename} should be")
        name, extra = struct.unpack("<HH", header[26:])
        start += 30 + name + extra
        if start + record.file_size > len(self._map):
            raise ValueError(f"{self._path} ends within the record {record.filename}")
        return start


class TensorSlice:
    """A tensor of a TorchZip: its shape and dtype, and any part of it."""

    def __init__(self, archive: TorchZip, key: str):
        self._archive, self._key = archive, key

    def get_shape(self) -> list[int]:
        """The shape."""
        return list(self._archive._tensors[self._key].shape)

    def get_dtype(self) -> str:
        """The dtype's name as in safetensors, such as BF16."""
        return self._archive._tensors[self._key].dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._archive.get_tensor(self._key)[index]


def _are_counts(values: Any) -> bool:
    """Whether this is a tuple of integers that are not negative."""
    return type(values) is tuple and all(type(v) is int and v >= 0 for v in values)
