"""Convolution that is as exact on TPUs as the publishers' networks are on GPUs.

By default a TPU rounds float32 inputs of a product to bfloat16, with 8 bits of mantissa. GPUs'
TF32, on which the published VAE and heads run, has 10. Here each input is the sum of two bfloat16
numbers, and three of the four products of these are added up in float32, which gives 16 bits. XLA
does the same when asked for Precision.HIGH, as three convolutions, which take it several times as
long to compile: the VAE at 480x832x81 was not done after 12 minutes, and takes 4 as it is. One
convolution over three times the channels also fills the matrix unit better where channels are few.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def convolve(x: Array, kernel: Array, strides: Any, padding: Any, **options: Any) -> Array:
    """`lax.conv_general_dilated` with the features of x last and the kernel's as [..., in, out].

    For float32 without groups, see above. It can be a flax.nnx.Conv's `conv_general_dilated`.
    """
    if x.dtype != jnp.float32 or options.get("feature_group_count", 1) != 1:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    def whole(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    @jax.custom_vjp
    def in_parts(x: Array, kernel: Array) -> Array:
        parts = options | {"precision": None, "preferred_element_type": jnp.float32}
        return lax.conv_general_dilated(*three_products(x, kernel), strides, padding, **parts)

    def backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        # Its own would round the cotangent to bfloat16.
        exact = options | {"precision": lax.Precision.HIGH}
        convolution = partial(
            lax.conv_general_dilated, window_strides=strides, padding=padding, **exact
        )
        _, pull = jax.vjp(convolution, *saved)
        return pull(cotangent)

    in_parts.defvjp(lambda *both: (in_parts(*both), both), backward)
    return lax.platform_dependent(x, kernel, tpu=in_parts, default=whole)


def three_products(x: Array, kernel: Array) -> tuple[Array, Array]:
    """bfloat16 factors with three times the input features, whose product in float32 is that of the
    float32 factors, but for the product of what either leaves beyond its first 8 bits."""
    (high, low), (kernel_high, kernel_low) = _halves(x), _halves(kernel)
    return (
        jnp.concatenate([high, high, low], axis=-1),
        jnp.concatenate([kernel_high, kernel_low, kernel_high], axis=-2),
    )


def _halves(x: Array) -> tuple[Array, Array]:
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # which XLA does not undo
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)
