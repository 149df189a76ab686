"""Strict loading: every way in which files and network can disagree is an error that names the
place."""

import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.weights import convert

TABLE = (
    ("a.weight", "a.kernel", "linear"),
    ("a.bias", "a.bias", "copy"),
    ("b.{i}.weight", "blocks.kernel", "linear"),
    ("b.{i}.bias", "blocks.bias", "copy"),
    ("c.{j}.weight", "items.{j}.kernel", "linear"),
    ("c.{j}.bias", "items.{j}.bias", "copy"),
)
REPEATS = {"i": 3, "j": 2}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(3, 4, rngs=rngs)
        self.items = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        stack = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(4, 5, rngs=rngs)))
        self.blocks = stack(rngs)


@pytest.fixture
def folder(tmp_path):
    convert.save(
        Net(nnx.Rngs(0)), tmp_path, TABLE, REPEATS, {"size": 3}, filename="model.safetensors"
    )
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_round_trip_fills_an_abstract_network(folder):
    assert load_file(folder / "model.safetensors")["b.1.weight"].shape == (5, 4)  # torch's order
    net = convert.load(nnx.eval_shape(lambda: Net(nnx.Rngs(1))), folder, TABLE, REPEATS)
    want = Net(nnx.Rngs(0))
    assert np.array_equal(net.blocks.kernel[...], want.blocks.kernel[...])
    assert np.array_equal(net.items[1].kernel[...], want.items[1].kernel[...])
    assert convert.read_config(folder) == {"size": 3}


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_floats_of_sixteen_bits_or_more_are_cast_once(folder, stored, dtype):
    want = load_file(folder / "model.safetensors")["b.1.weight"].T.astype(stored)
    change(folder, lambda t: t.update({k: v.astype(stored) for k, v in t.items()}))
    net = convert.load(Net(nnx.Rngs(1)), folder, TABLE, REPEATS, dtype=dtype)
    assert net.blocks.kernel.dtype == dtype
    np.testing.assert_array_equal(net.blocks.kernel[...][1], want.astype(dtype))


def test_shards_stream_to_their_devices(folder):
    """The parts of a stacked and transposed kernel, each on its device, from two files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    files = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(keys)}
    for name in set(files.values()):
        save_file({k: tensors[k] for k in keys if files[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    places = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))

    def shardings(leaf, shape):
        return places if leaf == "blocks.kernel" else None

    net = nnx.eval_shape(lambda: Net(nnx.Rngs(1)))
    convert.load(net, folder, TABLE, REPEATS, mesh=mesh, shardings=shardings)
    kernel = net.blocks.kernel.get_raw_value()
    assert kernel.sharding == places and kernel.addressable_shards[0].data.shape == (3, 1, 5)
    np.testing.assert_array_equal(kernel, np.stack([tensors[f"b.{i}.weight"].T for i in range(3)]))
    assert net.a.bias.get_raw_value().sharding == NamedSharding(mesh, PartitionSpec())


def test_an_index_and_shards_that_disagree_are_refused(folder):
    keys = list(load_file(folder / "model.safetensors"))
    index = folder / "model.safetensors.index.json"

    def refused(weight_map, message):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            convert.load(Net(nnx.Rngs(1)), folder, TABLE, REPEATS)

    whole = dict.fromkeys(keys, "model.safetensors")
    refused({**whole, "z": "model.safetensors"}, "'z' is in the index, but not in the shard")
    refused({k: whole[k] for k in keys[1:]}, f"'{keys[0]}' is not in the index")
    refused({**whole, "z": "../x.safetensors"}, r"names the shard '\.\./x\.safetensors'")
    refused([], "is no index of shards")
    (folder / "second.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    refused({**whole, keys[0]: "second.safetensors"}, f"'{keys[0]}' is not in the index, but in")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "1 unknown keys, such as 'extra'"),
        (lambda t: t.pop("b.2.bias"), "lacks the key 'b.2.bias'"),
        (lambda t: t.update({"a.weight": np.zeros((4, 9), np.float32)}), "'a.weight' has shape"),
        (lambda t: t.update({"a.bias": np.zeros(4, np.int8)}), "stored as int8"),
        (
            lambda t: t.update({"a.weight": t["a.weight"].astype(ml_dtypes.float8_e4m3fn)}),
            "'a.weight' is stored as F8_E4M3, not as a float of 16 bits or more: give",
        ),
    ],
)
def test_wrong_files_are_refused(folder, edit, message):
    change(folder, edit)
    with pytest.raises(ValueError, match=message):
        convert.load(Net(nnx.Rngs(1)), folder, TABLE, REPEATS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("key", ["a.bias", "a.weight", "b.1.weight", "c.1.bias"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_number_that_is_not_finite_is_named(folder, key, value, dtype):
    """1e300, which is a double, in a leaf of 32 or 16 bits."""

    def edit(tensors):
        tensors[key] = tensors[key].astype(np.float64)
        tensors[key].flat[-1] = value

    change(folder, edit)
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: '{key}' holds numbers that are not"
    ):
        convert.load(Net(nnx.Rngs(1)), folder, TABLE, REPEATS, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_is_finite_sees_the_last_number(dtype):
    values = np.full(2**18 + 3, -3.0, dtype)
    values[0] = np.finfo(np.float16).max
    assert convert.is_finite(values) and convert.is_finite(values.reshape(1, -1)[:, :0])
    values[-1] = np.inf
    assert not convert.is_finite(values)
    values[-1] = np.nan
    assert not convert.is_finite(values)


def test_hidden_files_are_none_and_pipes_are_not_waited_for(folder):
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7")  # as macOS leaves beside a copy
    convert.load(Net(nnx.Rngs(1)), folder, TABLE, REPEATS)
    (folder / "model.safetensors").rename(folder / "x")
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        convert.load(Net(nnx.Rngs(1)), folder, TABLE, REPEATS)
    with pytest.raises(ValueError, match="is no regular file"):
        convert.load(Net(nnx.Rngs(1)), folder / "model.safetensors", TABLE, REPEATS)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ValueError, match="is no regular file"):
        convert.read_config(folder)


def test_more_blocks_than_tensors_are_refused_before_they_are_counted(folder):
    with pytest.raises(ValueError, match="has 12 tensors, too few for the 10000000 blocks of its"):
        convert.load(Net(nnx.Rngs(1)), folder, TABLE, {"i": 10**7, "j": 2})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'{"a":' * 100_000, "is not valid JSON: it is nested too deeply"),
        (b"[]", "has to be a JSON object of fields"),
        (b'{"a": NaN}', "is not valid JSON: NaN is no number"),
        (b'{"a": 1e999}', "is not valid JSON: 1e999 is larger"),
        (b"\xff\xfe{}", "is not valid JSON: .*utf-8"),
        (b"", "is not valid JSON"),
        (b" " * (2**24 + 1), "is larger than the 16 MiB"),
    ],
)
def test_a_config_that_is_no_object_of_fields_is_named(folder, content, message):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        convert.read_config(folder)
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"index\.json {message}"):
        convert.load(Net(nnx.Rngs(1)), folder, TABLE, REPEATS)


def test_truncated_missing_and_unindexed_files_are_refused(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        convert.load(Net(nnx.Rngs(1)), folder, TABLE, REPEATS)
    file.unlink()
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        convert.load(Net(nnx.Rngs(1)), folder, TABLE, REPEATS)
    index = {"weight_map": {"a.weight": "part-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks the shard part-1"):
        convert.load(Net(nnx.Rngs(1)), folder, TABLE, REPEATS)


def test_an_unfilled_leaf_and_a_doubled_key_are_refused(folder):
    with pytest.raises(ValueError, match=r"unknown keys, such as 'a\.bias'"):
        convert.load(Net(nnx.Rngs(1)), folder, TABLE[:1] + TABLE[2:], REPEATS)
    with pytest.raises(ValueError, match=r"no key of .* fills the leaf 'a\.bias'"):
        convert.load(Net(nnx.Rngs(1)), folder, TABLE[:1] + TABLE[2:], REPEATS, ignore=(r"a\.bias",))
    with pytest.raises(ValueError, match=r"matches the key 'a\.bias' twice"):
        convert.load(Net(nnx.Rngs(1)), folder, (*TABLE, TABLE[1]), REPEATS)
