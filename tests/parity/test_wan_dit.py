"""Wan2.1 DiT against diffusers' WanTransformer3DModel, on tiny random weights in float32."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.goldens.make_wan_dit import make_inputs, make_reference, run_reference
from worldr1_jax.models.wan import dit as wan_dit

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

BASE = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
}
CASES = {  # overrides, latent size (frames, height, width), text length
    "base": ({}, (5, 6, 10), 9),
    "no_cross_norm": ({"cross_attn_norm": False, "eps": 1e-5}, (1, 4, 4), 3),
    "patches_of_time": ({"patch_size": (3, 1, 2), "out_channels": 6}, (9, 3, 8), 5),
    "wan_head": (
        {"attention_head_dim": 128, "num_attention_heads": 2, "num_layers": 2},
        (7, 8, 6),
        17,
    ),
    "odd_split": ({"attention_head_dim": 20, "freq_dim": 64, "ffn_dim": 50}, (3, 2, 14), 1),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_matches_diffusers(case, seed, tmp_path):
    overrides, size, length = CASES[case]
    fields = {**BASE, **overrides}
    reference = make_reference(fields, seed)
    reference.save_pretrained(tmp_path)
    inputs = make_inputs(fields, size, length, seed)
    expected = run_reference(reference, *inputs)
    got = wan_dit.load(tmp_path)(*map(jnp.asarray, inputs))
    # float32 sums in another order; 1e-4 of the spread leaves a factor of ten or so
    assert np.abs(np.asarray(got) - expected).max() <= 1e-4 * expected.std()


def test_saved_folder_is_read_by_diffusers(tmp_path):
    reference = make_reference(BASE, 3)
    reference.save_pretrained(tmp_path / "theirs")
    wan_dit.save(wan_dit.load(tmp_path / "theirs"), tmp_path / "ours")
    read = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours").state_dict()
    assert set(read) == set(reference.state_dict())
    for key, value in reference.state_dict().items():
        assert torch.equal(read[key], value), key


def test_bfloat16_stays_near_diffusers(tmp_path):
    """bfloat16 keeps 8 bits; three layers of it stay within a few percent of the spread."""
    reference = make_reference(BASE, 4)
    reference.save_pretrained(tmp_path)
    inputs = make_inputs(BASE, (5, 6, 10), 9, 4)
    expected = run_reference(reference, *inputs)
    got = np.asarray(wan_dit.load(tmp_path, dtype=jnp.bfloat16)(*map(jnp.asarray, inputs)))
    assert got.dtype == np.float32
    assert np.sqrt(np.mean((got - expected) ** 2)) <= 0.03 * expected.std()


def test_reads_the_original_layout(tmp_path):
    """Names of Wan-Video's own release, as diffusers' converter maps them."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    reference = make_reference(BASE, 6)
    reference.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    config = wan_dit.Config.from_dict(json.loads((tmp_path / "theirs/config.json").read_text()))
    names = {
        ours.format(i=i): original.format(i=i)
        for (ours, *_), (original, *_) in zip(
            wan_dit.table(config), wan_dit.table(config, "wan"), strict=True
        )
        for i in range(config.num_layers)
    }
    original = {names[key]: value for key, value in theirs.items()}
    back = convert_wan_transformer_to_diffusers({k: torch.tensor(v) for k, v in original.items()})
    assert set(back) == set(theirs)
    for key, value in back.items():
        np.testing.assert_array_equal(value.numpy(), theirs[key])

    (tmp_path / "wan").mkdir()
    save_file(original, tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    wan_config = {
        "_class_name": "WanModel",
        "dim": 48,
        "eps": 1e-6,
        "ffn_dim": 64,
        "freq_dim": 32,
        "in_dim": 4,
        "model_type": "t2v",
        "num_heads": 3,
        "num_layers": 3,
        "out_dim": 4,
        "text_dim": 24,
        "text_len": 512,
    }
    (tmp_path / "wan" / "config.json").write_text(json.dumps(wan_config))
    inputs = make_inputs(BASE, (5, 6, 10), 9, 6)
    got = np.asarray(wan_dit.load(tmp_path / "wan")(*map(jnp.asarray, inputs)))
    expected = run_reference(reference, *inputs)
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()
