"""UMT5 encoder against transformers, on tiny random weights in float32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens.make_umt5 import make_inputs, make_reference, run_reference
from worldr1_jax.models import umt5

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE = {"vocab_size": 97, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 3, "num_heads": 3}
CASES = {
    "base": ({}, 0, 13),
    "wide_heads": ({"d_kv": 24, "num_heads": 4, "d_model": 40}, 1, 150),
    "buckets": (
        {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 40},
        2,
        77,
    ),
    "one_layer": ({"num_layers": 1, "layer_norm_epsilon": 1e-5}, 3, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    overrides, seed, length = CASES[case]
    fields = {**BASE, **overrides}
    reference = make_reference(fields, seed)
    reference.save_pretrained(tmp_path)
    ids, mask = make_inputs(fields, length, seed)
    expected = run_reference(reference, ids, mask)
    got = umt5.load(tmp_path)(jnp.asarray(ids), jnp.asarray(mask))
    # float32 sums in another order; 1e-4 of the spread leaves a factor of ten or more
    assert np.abs(np.asarray(got) - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("buckets,max_distance", [(32, 128), (16, 40), (64, 256)])
def test_every_bucket_matches_transformers(buckets, max_distance):
    """Up to 1024 tokens; rounding at powers of two decides some of them."""
    config = transformers.UMT5Config(
        **BASE,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
    )
    layer = transformers.UMT5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
    positions = torch.arange(1024)
    expected = layer._relative_position_bucket(positions[None, :] - positions[:, None])
    got = umt5.relative_buckets(1024, buckets, max_distance)
    np.testing.assert_array_equal(got, expected.numpy())


def test_saved_folder_is_read_by_transformers(tmp_path):
    reference = make_reference(BASE, 5)
    reference.save_pretrained(tmp_path / "theirs")
    umt5.save(umt5.load(tmp_path / "theirs"), tmp_path / "ours")
    read = transformers.UMT5EncoderModel.from_pretrained(tmp_path / "ours").state_dict()
    for key, value in reference.state_dict().items():
        assert torch.equal(read[key], value), key
