"""Strict loading: every way in which files and network can disagree is an error that names the
place."""

import json

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
