"""Layers the transformers share: linear (with room for LoRA), norms, MLP, embedding, layer scan.

A layer of `stack=(L,)` keeps the weights of L equal layers on the leading axis of every leaf;
`scan_layers` runs them one after another, so that the program does not grow with depth.
Matmuls run in the dtype of their input; norms compute in float32 and return float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Stack = tuple[int, ...]
Block = TypeVar("Block", bound=nnx.Module)
Carry = TypeVar("Carry")

REMAT_POLICIES = ("none", "dots", "attention", "full", "whole")
SAVED = "attention"  # the name that what a kernel of attention found goes by
_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
}


def normal(std: float) -> Initializer:
    """Normal values of the given standard deviation; takes (key, shape, dtype)."""
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape)).astype(dtype)


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform in +-sqrt(6 / (in + out)); in and out are the last two axes, not those of a stack."""
    bound = math.sqrt(6.0 / (shape[-2] + shape[-1]))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound).astype(dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros; the key is not used."""
    del key
    return jnp.zeros(shape, dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias`, plus a low-rank term once `lora.add` has been called.

    Leaves: kernel [*stack, in, out], bias [*stack, out] or None; with LoRA also
    lora_a [*stack, in, r] and lora_b [*stack, r, out].
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        rngs: nnx.Rngs,
        stack: Stack = (),
        bias: bool = True,
        init: Initializer = xavier_uniform,
        param_dtype: Any = jnp.float32,
    ):
        shape = (*stack, features_in, features_out)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        bias_value = nnx.Param(jnp.zeros((*stack, features_out), param_dtype)) if bias else None
        self.bias = nnx.data(bias_value)
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0

    def __call__(
        self, x: Float[Array, "... i"], adapters: bool = True, *, heads: int = 0, axes: int = 1
    ) -> Float[Array, "... o"]:
        """Runs in x.dtype.

        Args:
          x: features on its last `axes` axes.
          adapters: False leaves the low-rank term out.
          heads: other than 0, the result is [... heads o / heads]. As the product's own shape: a
            reshape after it (or before one of two axes) would cost TPUs a transposition.
        """
        kernel = self.kernel[...]
        out = (heads, kernel.shape[-1] // heads) if heads else kernel.shape[-1:]
        before = x.shape[: x.ndim - axes]
        if axes == 1 and not heads:
            x = as_matrix(x)
        y = _product(x, kernel, axes, out)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype).reshape(out)
        if adapters and self.lora_a is not None and self.lora_b is not None:
            # A and B rest in float32 so that small updates are not lost; only their use is rounded.
            a, b = self.lora_a[...], self.lora_b[...]
            low = _product(x, a, axes, a.shape[-1:]) * jnp.asarray(self.lora_scale, x.dtype)
            y = y + _product(low, b, 1, out)
        return y.reshape(*before, *out)


def _product(x: jax.Array, matrix: jax.Array, axes: int, out: tuple[int, ...]) -> jax.Array:
    """x, whose last `axes` axes are the matrix's rows, times the matrix, its columns as `out`."""
    shape = (*x.shape[x.ndim - axes :], *out)
    return jnp.tensordot(x, matrix.astype(x.dtype).reshape(shape), axes)


class Mlp(nnx.Module):
    """linear_2(activation(linear_1(x)))."""

    def __init__(
        self,
        features: tuple[int, int, int],
        activation: Callable[[jax.Array], jax.Array],
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        self.activation = activation
        self.linear_1 = Linear(features[0], features[1], rngs=rngs, **kwargs)
        self.linear_2 = Linear(features[1], features[2], rngs=rngs, **kwargs)

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """Runs in x.dtype."""
        return self.linear_2(self.activation(self.linear_1(x)))


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the last axis, in float32; scale and bias when `affine`."""

    def __init__(self, features: int, *, eps: float, affine: bool, stack: Stack = ()):
        self.eps = eps
        shape = (*stack, features)
        self.scale = nnx.data(nnx.Param(jnp.ones(shape)) if affine else None)
        self.bias = nnx.data(nnx.Param(jnp.zeros(shape)) if affine else None)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Returns float32, whatever the dtype of x."""
        shape, x = x.shape, as_matrix(x).astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        if self.scale is not None and self.bias is not None:
            x = x * self.scale[...] + self.bias[...]
        return x.reshape(shape)


class RMSNorm(nnx.Module):
    """Unit mean square over the features, times a learned scale, in float32."""

    def __init__(self, features: int, *, eps: float, stack: Stack = ()):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((*stack, features)))

    def __call__(self, x: Float[Array, "... d"], *, axes: int = 1) -> Float[Array, "... d"]:
        """Returns float32, whatever the dtype of x, whose last `axes` axes hold the features."""
        shape, over = x.shape, tuple(range(-axes, 0))
        x = (as_matrix(x) if axes == 1 else x).astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(over, keepdims=True) + self.eps)
        return (x * self.scale[...].reshape(x.shape[-axes:])).reshape(shape)


class Embedding(nnx.Module):
    """A table of vectors; leaf: embedding [*stack, entries, features]."""

    def __init__(
        self,
        entries: int,
        features: int,
        *,
        rngs: nnx.Rngs,
        init: Initializer,
        stack: Stack = (),
        param_dtype: Any = jnp.float32,
    ):
        self.embedding = nnx.Param(init(rngs.params(), (*stack, entries, features), param_dtype))

    def __call__(self, ids: Int[Array, ...]) -> Float[Array, "... d"]:
        """The rows of the table at `ids`, which have to be in [0, entries)."""
        return jnp.take(self.embedding[...], ids, axis=0)


def as_matrix(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """All tokens as the rows of one matrix [n d]; x itself where a mesh may divide them.

    For gradients on a CPU: with axes before that of the tokens, XLA copies a transposed operand for
    each gradient of a kernel (1.4x the time at 4,096 x 1,536 x 8,960).
    """
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.size == 1
    return x.reshape(-1, x.shape[-1]) if whole and x.ndim > 2 else x


def times_row(x: Float[Array, "B N d"], row: Float[Array, "B 1 d"]) -> Float[Array, "B N d"]:
    """`x * row`. One video goes without its axis, with which XLA's CPU backend takes 40 times as
    long for the gradient of the row, a sum over tokens."""
    return (x[0] * row[0])[None] if x.shape[0] == 1 else x * row


def scan_layers(
    blocks: Block,
    x: Carry,
    call: Callable[[Block, Carry], Carry],
    *,
    remat: str = "none",
) -> Carry:
    """Runs the L layers that `blocks` stacks: x = call(layer 0, x), x = call(layer 1, x), ...

    Args:
      blocks: a module whose every leaf has the layers as its leading axis.
      x: what flows from layer to layer, an array or a tree; shapes and dtypes stay the same.
      call: one layer. Whatever else it needs, it closes over.
      remat: what the backward pass recomputes: "none", "full" (all but the inputs of each layer),
        "attention" (as "full", but what kernels of long attention found is kept, which is as large
        as the inputs; cuDNN's and "xla" keep nothing), "dots" (all but the inputs and the results
        of matmuls with weights) or "whole" (all but the input of the first layer, and then as
        "full": one forward more, and of several calls before one backward pass, such as guidance's
        two, only one keeps its layers' inputs at a time).

    Raises:
      ValueError: an unknown remat policy.
    """
    check_remat(remat)
    graphdef, stacked = nnx.split(blocks)

    def body(carry: Carry, layer: nnx.State) -> tuple[Carry, None]:
        return call(nnx.merge(graphdef, layer), carry), None

    # prevent_cse guards against undoing the remat outside of loops; inside a scan it only costs.
    if remat in ("full", "whole"):
        body = jax.checkpoint(body, prevent_cse=False)
    elif remat in _POLICIES:
        body = jax.checkpoint(body, prevent_cse=False, policy=_POLICIES[remat])

    def run(x: Carry) -> Carry:
        return jax.lax.scan(body, x, stacked)[0]

    return jax.checkpoint(run)(x) if remat == "whole" else run(x)


# Arrays of the residual stream's size that a layer keeps for the backward pass, by remat policy.
HELD = {"none": 25, "dots": 11, "attention": 2, "full": 1, "whole": 1}


def check_remat(remat: str) -> None:
    """Raises ValueError when `remat` is not one of REMAT_POLICIES."""
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat is '{remat}'; it has to be one of {', '.join(REMAT_POLICIES)}")
