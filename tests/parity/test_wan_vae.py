"""The Wan2.1 VAE against diffusers' AutoencoderKLWan, on tiny random weights in float32."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from tests.goldens.make_wan_vae import FIELDS, make_reference, make_video, run_reference
from worldr1_jax.models.wan import vae as wan_vae

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STATISTICS = {
    "z_dim": 4,
    "latents_mean": [0.1, -0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 0.5, 0.7],
}
CONFIGS = {
    "patches": FIELDS,
    "wan": {**STATISTICS, "base_dim": 6, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    "late": {
        **STATISTICS,
        "base_dim": 8,
        "decoder_base_dim": 12,
        "dim_mult": [2, 1, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [True, True],
        "dropout": 0.1,
    },
    "level_one_stays": {
        **FIELDS,
        "base_dim": 10,
        "dim_mult": [1, 2, 3, 4],
        "temperal_downsample": [True, False, True],
    },
}
CASES = [("patches", frames) for frames in (1, 5, 9, 13, 17)]
CASES += [("wan", 1), ("wan", 9), ("wan", 17), ("late", 5), ("late", 13), ("level_one_stays", 9)]
SEEDS = (0, 1, 2)


@pytest.mark.parametrize(("name", "frames"), CASES)
def test_matches_diffusers(name, frames, tmp_path):
    fields = CONFIGS[name]
    config = wan_vae.Config.from_dict(fields)
    size = config.spatial_compression
    graph = nnx.graphdef(wan_vae.WanVAE(config, nnx.Rngs(0)))
    encode = jax.jit(lambda state, video: nnx.merge(graph, state).encode_moments(video))
    decode = jax.jit(lambda state, latents: nnx.merge(graph, state).decode(latents))
    for seed in SEEDS:
        reference = make_reference(fields, seed)
        reference.save_pretrained(tmp_path)
        video = make_video((2, frames, 2 * size, 3 * size), seed)
        mean, logvar, decoded = run_reference(reference, video)
        state = nnx.state(wan_vae.load(tmp_path))
        got_mean, got_logvar = encode(state, video)
        normalised = (mean - np.float32(config.latents_mean)) / np.float32(config.latents_std)
        got_decoded = decode(state, normalised)
        # float32 sums in another order: 1e-5 of the spread is seen.
        for got, expected in ((got_mean, mean), (got_logvar, logvar), (got_decoded, decoded)):
            assert got.shape == expected.shape
            assert np.abs(np.asarray(got) - expected).max() <= 1e-4 * expected.std()


def test_diffusers_reads_what_we_save(tmp_path):
    config = wan_vae.Config.from_dict(FIELDS)
    model = wan_vae.WanVAE(config, nnx.Rngs(3))
    wan_vae.save(model, tmp_path)
    reference = diffusers.AutoencoderKLWan.from_pretrained(tmp_path)
    video = make_video((1, 5, 16, 16), seed=0)
    mean, _, _ = run_reference(reference, video)
    got, _ = model.encode_moments(video)
    assert np.abs(np.asarray(got) - mean).max() <= 1e-4 * mean.std()
