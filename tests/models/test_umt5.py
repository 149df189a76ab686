"""UMT5 encoder without torch: golden of transformers, mask, buckets by hand, errors, files."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests import goldens
from tests.goldens.make_umt5 import PATH
from worldr1_jax.models import umt5


@pytest.fixture(scope="module")
def golden():
    return goldens.read(PATH)


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """The golden's network, in the files that transformers' save_pretrained wrote."""
    return goldens.publish(golden, tmp_path_factory.mktemp("umt5"), "model.safetensors")


@pytest.fixture(scope="module")
def model(published):
    return umt5.load(published)


def test_golden_of_transformers(golden, model):
    got = model(jnp.asarray(golden["token_ids"]), jnp.asarray(golden["mask"]))
    expected = golden["embeddings"]
    assert got.dtype == jnp.float32
    # float32 sums in another order
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()


def test_padding_neither_acts_nor_remains(golden, model):
    ids, mask = jnp.asarray(golden["token_ids"]), jnp.asarray(golden["mask"])
    other = jnp.where(mask == 1, ids, (ids + 7) % 61)
    encode = nnx.jit(lambda model, ids: umt5.zero_padding(model(ids, mask), mask))
    a, b = encode(model, ids), encode(model, other)
    np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(a)[np.asarray(mask) == 0])
    short = model(ids[1:2, :10], mask[1:2, :10])  # the prompt of ten tokens, without its padding
    np.testing.assert_allclose(a[1:2, :10], short, atol=1e-5)  # float32 sums of other lengths


def test_buckets_by_hand():
    buckets = umt5.relative_buckets(300, 32, 128)
    # 16 buckets a side: 0..7 exact, then 8 + floor(8 log(d / 8) / log(16)), 15 from 128 on
    for distance, bucket in ((0, 0), (1, 1), (7, 7), (8, 8), (16, 10), (32, 12), (127, 15)):
        assert buckets[distance, 0] == bucket
        assert buckets[0, distance] == bucket + (16 if distance else 0)
    assert buckets[299, 0] == 15 and buckets[0, 299] == 31


def test_bfloat16_is_near_float32(golden, published):
    model = umt5.load(published, dtype=jnp.bfloat16)
    assert model.blocks.q.kernel.dtype == jnp.bfloat16
    assert model.norm_out.scale.dtype == jnp.float32
    got = model(jnp.asarray(golden["token_ids"]), jnp.asarray(golden["mask"]))
    # 8 bits of mantissa through two layers
    error = np.sqrt(np.mean((got - golden["embeddings"]) ** 2))
    assert error <= 0.03 * golden["embeddings"].std()


def test_saves_what_it_read(golden, model, published, tmp_path):
    umt5.save(model, tmp_path)
    theirs, ours = (load_file(p / "model.safetensors") for p in (published, tmp_path))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    assert umt5.Config.from_dict(json.loads((tmp_path / "config.json").read_text())) == model.config


def test_token_table_under_both_names(golden, model, published, tmp_path):
    """As files of transformers 4 may have it."""
    weights = load_file(published / "model.safetensors")
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].copy()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(str(golden["config"]))
    again = umt5.load(tmp_path)
    np.testing.assert_array_equal(
        again.token_embedding.embedding[...], model.token_embedding.embedding[...]
    )


def test_published_size_without_memory():
    model = nnx.eval_shape(lambda: umt5.UMT5Encoder(umt5.Config.xxl(), nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    # vocabulary + 24 x (attention + gated MLP + bias + two norms) + last norm
    layer = 4 * 4096 * 4096 + 3 * 4096 * 10240 + 32 * 64 + 2 * 4096
    assert sum(math.prod(x.shape) for x in leaves) == 256384 * 4096 + 24 * layer + 4096


def test_refusals(golden, model):
    values = json.loads(str(golden["config"]))
    with pytest.raises(ValueError, match="feed_forward_proj"):
        umt5.Config.from_dict({**values, "feed_forward_proj": "relu"})
    with pytest.raises(ValueError, match="model_type"):
        umt5.Config.from_dict({**values, "model_type": "t5"})
    del values["d_kv"]
    with pytest.raises(ValueError, match="lacks the field 'd_kv'"):
        umt5.Config.from_dict(values)
    with pytest.raises(ValueError, match="one shape"):
        model(jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 4), jnp.int32))
