"""Writes torch's .pth archives without torch, opcode by opcode, for tests of what reads them."""

import io
import struct
import zipfile

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def table(tensors: dict[str, np.ndarray], ordered: bool = False) -> bytes:
    """The table of tensors as torch.save writes it (protocol 2), each in a record of its own."""
    out = [b"\x80\x02", b"ccollections\nOrderedDict\n)R" if ordered else b"}", b"("]
    for record, (key, value) in enumerate(tensors.items()):
        out += [text(key), b"ctorch._utils\n_rebuild_tensor_v2\n((", text("storage")]
        out += [f"ctorch\n{STORAGES[value.dtype.name]}\n".encode(), text(str(record)), text("cpu")]
        out += [number(value.size), b"tQ", number(0)]
        strides = [s // value.itemsize for s in value.strides]
        for counts in (value.shape, strides):
            out += [b"(", *map(number, counts), b"t"]
        out += [b"\x89ccollections\nOrderedDict\n)RtR"]
    out += [b"u", b"}(" + text("_metadata") + b"Nub" if ordered else b"", b"."]
    return b"".join(out)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def pack(records: dict[str, bytes], **options) -> bytes:
    """A zip archive of these records below "archive/"."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def pth(tensors: dict[str, np.ndarray], ordered: bool = False) -> bytes:
    """The bytes of a .pth file of these tensors."""
    data = {f"data/{i}": np.asarray(v).tobytes() for i, v in enumerate(tensors.values())}
    return pack({"data.pkl": table(tensors, ordered), "byteorder": b"little", **data})


def checkpoint(tensors: dict[str, np.ndarray]) -> bytes:
    """The bytes of a .pt file as trainers write it: the tensors under "state_dict", beside an
    epoch, a loss and a name."""
    head = b"\x80\x02}(" + text("epoch") + number(3) + text("name") + text("tiny")
    head += text("loss") + b"G" + struct.pack(">d", 0.1)
    nested = table(tensors).removeprefix(b"\x80\x02").removesuffix(b".")
    data = {f"data/{i}": np.ascontiguousarray(v).tobytes() for i, v in enumerate(tensors.values())}
    records = {"data.pkl": head + text("state_dict") + nested + b"u.", "byteorder": b"little"}
    return pack({**records, **data})
