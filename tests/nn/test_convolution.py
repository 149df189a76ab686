"""The convolution that TPUs run, its arithmetic checked on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from worldr1_jax.models.wan import vae_layers as wan_vae_layers
from worldr1_jax.nn import convolution

LAYOUTS = {2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@pytest.mark.parametrize("axes, stride", [(2, 1), (2, 2), (3, 1)])
def test_three_products_of_halves_have_16_bits(axes, stride):
    """Against float64: a thousandth of the error of bfloat16, for values of all sizes."""
    rng = np.random.default_rng(axes)
    x = rng.normal(size=(2, *(6, 7, 5)[:axes], 24)) * np.exp(3 * rng.normal(size=24))
    kernel = rng.normal(size=(3,) * axes + (24, 8))
    convolve = lambda x, k, **options: lax.conv_general_dilated(  # noqa: E731
        x, k, (stride,) * axes, "SAME", dimension_numbers=LAYOUTS[axes], **options
    )
    with jax.enable_x64(True):
        want = np.asarray(convolve(jnp.asarray(x), jnp.asarray(kernel)))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    factors = jax.jit(convolution.three_products)(x, kernel)
    assert all(factor.dtype == jnp.bfloat16 for factor in factors)
    got = convolve(*(f.astype(jnp.float32) for f in factors))
    rounded = convolve(*(jnp.asarray(a, jnp.bfloat16).astype(jnp.float32) for a in (x, kernel)))
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < 3e-5 and error < np.abs(rounded - want).max() / np.abs(want).max() / 100


def test_gradients_are_not_rounded(monkeypatch):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 6, 5, 8)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 8, 4)).astype(np.float32)

    def gradients():
        loss = lambda x, k: jnp.sum(  # noqa: E731
            jnp.sin(convolution.convolve(x, k, (1, 1), "SAME", dimension_numbers=LAYOUTS[2]))
        )
        return jax.grad(loss, argnums=(0, 1))(x, kernel)

    want = gradients()
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    for a, b in zip(gradients(), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_on_tpus_time_is_an_axis_of_the_convolution(stride, monkeypatch):
    """The TPU's form of the VAE's layer, run here: the sum over taps."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 6, 5, 4)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 4, 6)).astype(np.float32)
    want = wan_vae_layers.temporal_conv(x, kernel, stride)
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    got = wan_vae_layers.temporal_conv(x, kernel, stride)
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())
