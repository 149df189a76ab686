"""LPIPS: the package's distances, strict loading, and inputs that are refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.goldens import make_lpips
from worldr1_jax.models import lpips

PACKAGE = (0.9441884756088257, 0.8712222576142)  # tests/goldens/make_lpips.py


def test_distances_are_the_packages(tmp_path):
    save_file(make_lpips.weights(), tmp_path / lpips.FILENAME)
    model = lpips.load(tmp_path)
    a, b = make_lpips.images()
    # float32 convolutions in another order of summation
    np.testing.assert_allclose(model(a, b), PACKAGE, rtol=1e-4)
    assert float(jnp.max(model(a, a))) == 0.0
    lpips.save(model, tmp_path / "again")
    np.testing.assert_array_equal(lpips.load(tmp_path / "again")(a, b), model(a, b))
    with pytest.raises(ValueError, match="31 px a side"):
        model(a[:, :20], b[:, :20])
    with pytest.raises(ValueError, match="two equal"):
        model(a, b[:1])


def test_loading_is_strict(tmp_path):
    tensors = make_lpips.weights()
    save_file(
        tensors | {"classifier.1.weight": np.zeros((2, 2), np.float32)}, tmp_path / "a.safetensors"
    )
    lpips.load(tmp_path / "a.safetensors")
    save_file(tensors | {"features.99.weight": np.zeros(2, np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"features\.99\.weight"):
        lpips.load(tmp_path / "b.safetensors")
    del tensors["lin3.model.1.weight"]
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"lin3\.model\.1\.weight"):
        lpips.load(tmp_path / "c.safetensors")
