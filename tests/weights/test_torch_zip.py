"""torch's .pth files without torch: what is read, and everything that is refused."""

import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.torch_archive import number, pack, pth, table, text
from worldr1_jax.weights.safetensors import open_tensors
from worldr1_jax.weights.torch_zip import TorchZip

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a.bias": np.array([1.5, -2, 3], ml_dtypes.bfloat16),
    "scalar": np.array(0.25, np.float16),
}


def written(folder, content):
    path = folder / "weights.pth"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ordered", [False, True])
def test_tensors_come_back_bit_for_bit(tmp_path, ordered):
    tensors = open_tensors(written(tmp_path, pth(TENSORS, ordered)))
    assert list(tensors) == list(TENSORS)
    for key, want in TENSORS.items():
        got = tensors[key].read(tuple(slice(0, n) for n in want.shape))
        assert got.dtype == want.dtype and tensors[key].shape == want.shape
        np.testing.assert_array_equal(got, want)
    assert [t.dtype for t in tensors.values()] == ["F32", "BF16", "F16"]
    part = tensors["a.weight"].read((slice(1, 3), slice(0, 2)))
    np.testing.assert_array_equal(part, [[4, 5], [8, 9]])


def test_a_transposed_tensor_keeps_its_strides(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    records = {"data.pkl": table({"w": value}), "data/0": value.T.tobytes()}
    got = TorchZip(written(tmp_path, pack(records))).get_tensor("w")
    np.testing.assert_array_equal(got, value)


def reduce(module, name, argument):
    """An object that calls a function when it is unpickled."""
    return b"\x80\x02c" + module + b"\n" + name + b"\n" + text(argument) + b"\x85R."


ONE = {"w": np.zeros(4, np.float32)}
DATA = {"data/0": bytes(16)}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"data.pkl": reduce(b"posix", b"system", "true")}, "asks for posix.system"),
        ({"data.pkl": reduce(b"builtins", b"eval", "1")}, "asks for builtins.eval"),
        ({"data.pkl": reduce(b"collections", b"OrderedDict", "x")}, "neither a dict nor a tensor"),
        ({"data.pkl": b"\x80\x02]."}, "opcode EMPTY_LIST"),
        ({"data.pkl": b"\x80\x02}"}, "is refused"),
        ({"data.pkl": b"\x80\x02}0."}, "opcode POP"),
        ({"data.pkl": b"\x80\x02u."}, "a mark is missing"),
        ({"data.pkl": b"\x80\x02h\x07."}, "is refused"),
        ({"data.pkl": b"\x80\x02}."}, "it is no table of tensors"),
        ({"data.pkl": b"\x80\x02}" + text("w") + number(3) + b"s."}, "'w' is no tensor"),
        ({"data.pkl": table(ONE)}, "lacks the record of the tensor 'w'"),
        ({"data.pkl": table(ONE), "data/0": bytes(12)}, "has 12 bytes, not the 16"),
        ({"data.pkl": table(ONE), "byteorder": b"big", **DATA}, "big-endian"),
        ({"weights": b""}, "not one that torch.save wrote"),
        (
            {"data.pkl": b"\x80\x02}" + b"(" * 200_000 + b"t" * 200_000 + b"."},
            "nests tuples deeper",
        ),
        ({"data.pkl": b"\x80\x02}" + b"(" * 200_000 + b"."}, "it is no table of tensors"),
        ({"data.pkl": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s."}, "nests tuples deeper"),
        ({"data.pkl": b"\x80\x02})K\x01s."}, "a key that is no text"),
        ({"data.pkl": bytes(2**24 + 1)}, "has a table of 16777217 bytes"),
    ],
)
def test_what_is_no_table_of_tensors_is_refused(tmp_path, records, message):
    with pytest.raises(ValueError, match=message) as error:
        TorchZip(written(tmp_path, pack(records)))
    assert "weights.pth" in str(error.value)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    long = table(ONE).replace(number(4) + b"t\x28", number(5) + b"t\x28")
    assert long != table(ONE)
    with pytest.raises(ValueError, match="reaches beyond its storage"):
        TorchZip(written(tmp_path, pack({"data.pkl": long, **DATA})))


def test_truncated_old_and_compressed_files_are_refused(tmp_path):
    whole = pth(TENSORS)
    for content in (whole[: len(whole) // 2], b"", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
        with pytest.raises(ValueError, match=r"of torch.s format before 1\.6"):
            TorchZip(written(tmp_path, content))
    packed = pack({"data.pkl": table(ONE), **DATA}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        TorchZip(written(tmp_path, packed))
