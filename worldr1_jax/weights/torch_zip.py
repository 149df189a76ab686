"""Reads tensors from torch's .pth files (and .pt and .bin, which are the same): zip archives whose
table of tensors is written as pickle opcodes. The table may be an entry "state_dict" of another.

Nothing is unpickled. `_interpret` follows the few opcodes that a table of tensors needs, on a stack
of plain values; the names in it stand for entries of `_ADMITTED`, and no name is imported or
called. Anything else is refused, saying what it was. Tensors are views into the mapped file. The
interface is that of `safetensors.safe_open`: keys, get_slice, get_tensor.

Facts of the format: torch.save and torch/_utils.py (_rebuild_tensor_v2, _rebuild_tensor_v3).
"""

from __future__ import annotations

import math
import mmap
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from worldr1_jax.files import short

SUFFIXES = (".pth", ".pt", ".bin")
_NESTED = "state_dict"  # where checkpoints keep their tensors, beside numbers of their training

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
    """A record of the archive: its name, the dtype (or _UNTYPED) and how many elements it has."""

    record: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    """A tensor in a record; offset and strides in elements."""

    record: str
    dtype: str
    nbytes: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(NamedTuple):
    """A name that the table may hold: of a dtype, or of something that makes part of the table."""

    kind: str  # "dtype", "tensor" or "dict"
    value: str = ""


_ADMITTED: dict[str, _Name] = {
    "collections OrderedDict": _Name("dict"),
    "torch._utils _rebuild_tensor_v2": _Name("tensor"),
    "torch._utils _rebuild_tensor_v3": _Name("tensor"),
    "torch.storage UntypedStorage": _Name("dtype", _UNTYPED),
    **{f"torch {n}": _Name("dtype", dtype) for n, dtype in (_STORAGES | _NAMED_DTYPES).items()},
}
# Opcodes that push a value: what genops gives as the argument, or a constant.
_PUSH_ARGUMENT = {
    "BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"
}  # fmt: skip
_PUSH: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IDLE = {"PROTO", "FRAME"}
_MOST_BYTES = 2**24  # of a table: 100,000 tensors


def _interpret(data: bytes) -> Any:
    """The value that the opcodes put together: dicts, tuples, numbers, texts, tensors, storages.

    Raises:
      ValueError: an opcode or a name that a table of tensors does not need, or a broken stream.
    """
    stack: list[Any] = []
    marks: list[int] = []  # where on the stack they would lie
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "STOP":
            return stack.pop()
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _PUSH:
            stack.append(_PUSH[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _TUPLES:
            stack.append(_tuple(_take(stack, marks, _TUPLES[name])))
        elif name == "TUPLE":
            stack.append(_tuple(_take_to_mark(stack, marks)))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            if argument not in _ADMITTED:
                asked = short(argument.replace(" ", "."))
                raise ValueError(f"its table asks for {asked}, which is not part of a tensor")
            stack.append(_ADMITTED[argument])
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            callee, arguments = _take(stack, marks, 2)
            stack.append(_make(callee, arguments))
        elif name in ("SETITEM", "SETITEMS"):
            one = name == "SETITEM"
            items = _take(stack, marks, 2) if one else _take_to_mark(stack, marks)
            if not all(isinstance(key, str) for key in items[::2]):
                raise ValueError("its table has a key that is no text")
            _dict(stack[-1]).update(zip(items[::2], items[1::2], strict=True))
        elif name == "BUILD":
            stack.pop()  # attributes of an OrderedDict: versions of modules, which are no tensors
            _dict(stack[-1])
        elif name not in _IDLE:
            raise ValueError(f"its table has the opcode {name}, which tensors do not need")
    raise ValueError("its table ends without an end")


def _take(stack: list[Any], marks: list[int], count: int) -> list[Any]:
    """Pops the last `count` values, in the order in which they were pushed."""
    first = len(stack) - count
    if first < (marks[-1] if marks else 0):
        raise ValueError("its table is broken: values are missing")
    taken = stack[first:]
    del stack[first:]
    return taken


def _take_to_mark(stack: list[Any], marks: list[int]) -> list[Any]:
    if not marks or marks[-1] > len(stack):
        raise ValueError("its table is broken: a mark is missing")
    first = marks.pop()
    taken = stack[first:]
    del stack[first:]
    return taken


def _tuple(values: list[Any]) -> tuple[Any, ...]:
    """A tuple, in which no tuple may hold another: comparing deep ones would overflow the stack,
    and a table's arguments hold a shape and no more."""
    if any(type(part) is tuple for value in values if type(value) is tuple for part in value):
        raise ValueError("its table nests tuples deeper than tensors need")
    return tuple(values)


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError("its table changes something that is no dict")
    return value


def _storage(pid: Any) -> _Storage:
    match pid:
        case ("storage", _Name("dtype", dtype), str(record), str(), int(size)) if size >= 0:
            return _Storage(record, dtype, size)
    raise ValueError("its table refers to something that is not a storage")


def _make(callee: Any, arguments: Any) -> Any:
    """What a call in the table stands for: an empty dict, or a tensor."""
    if callee == _Name("dict") and arguments == ():
        return {}
    if callee != _Name("tensor") or not isinstance(arguments, tuple) or len(arguments) < 4:
        raise ValueError("its table calls something that makes neither a dict nor a tensor")
    storage, offset, shape, strides = arguments[:4]
    # v2: ..., requires_grad, backward_hooks; v3: and then the dtype.
    dtype = getattr(storage, "dtype", None)
    if len(arguments) > 6:
        dtype = arguments[6].value if isinstance(arguments[6], _Name) else None
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
    return _Tensor(storage.record, dtype, storage.size * itemsize, offset, shape, strides)


class TorchZip:
    """An open .pth file.

    Raises:
      ValueError: a file that is truncated, of torch's older format, compressed, or big-endian; a
        table that holds or asks for anything but named tensors; a tensor outside of its record.
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
        table = entries[f"{roots[0]}data.pkl"]
        if table.file_size > _MOST_BYTES:
            raise ValueError(
                f"{self._path} has a table of {table.file_size} bytes; those of tensors have at "
                f"most {_MOST_BYTES}"
            )
        tensors = self._table(archive.read(table))
        data = f"{roots[0]}data/"
        records = {n.removeprefix(data): i for n, i in entries.items() if n.startswith(data)}
        for key, tensor in tensors.items():
            self._check(key, tensor, records.get(tensor.record))
        return tensors, records

    def _table(self, data: bytes) -> dict[str, _Tensor]:
        try:
            tensors = _interpret(data)
        except (ValueError, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
            # genops has ValueError for a broken stream; the others are of a broken stack or memo
            raise ValueError(f"{self._path} is refused: {error}") from error
        tensors = tensors if isinstance(tensors, dict) else {}
        if isinstance(tensors.get(_NESTED), dict):
            tensors = tensors[_NESTED]
        wrong = [k for k, v in tensors.items() if not (isinstance(k, str) and type(v) is _Tensor)]
        if wrong or not tensors:
            what = f"'{short(wrong[0])}' is no tensor" if wrong else "it is no table of tensors"
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
