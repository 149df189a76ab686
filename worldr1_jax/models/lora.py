"""Low-rank adapters (LoRA): y = x W + (alpha / rank) x A B, on the linear layers of a network.

A and B are float32 `nnx.LoRAParam` leaves beside the kernel they adapt, stacked as it is:
`nnx.split(model, nnx.LoRAParam, ...)` separates what is trained from what is frozen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from worldr1_jax.models.layers import Linear

# q, k, v and output of self- and cross-attention: the layers that World-R1 adapts.
ATTENTION = (r".*attn[12]\.to_(q|k|v|out)",)


def add(
    model: nnx.Module,
    rank: int,
    alpha: float,
    rngs: nnx.Rngs,
    *,
    targets: Sequence[str] = ATTENTION,
) -> nnx.Module:
    """Adds adapters to `model` in place and returns it; its answers do not change (B is zero).

    Args:
      model: a network of layers.Linear; abstract leaves (nnx.eval_shape) are fine.
      rank: inner dimension r >= 1.
      alpha: the low-rank term is scaled by alpha / rank.
      rngs: its `params` stream gives A, uniform in +-1/sqrt(fan in) as in peft.
      targets: regular expressions of the paths of the layers to adapt, e.g. r".*attn1\\.to_q".

    Raises:
      ValueError: rank below 1, a target that no layer matches, or a layer that is already adapted.
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank is {rank}; it has to be at least 1")
    linears = dict(_linears(model))
    for target in targets:
        if not any(re.fullmatch(target, path) for path in linears):
            raise ValueError(f"the LoRA target '{target}' matches no linear layer of the network")
    for path, linear in linears.items():
        if not any(re.fullmatch(target, path) for target in targets):
            continue
        if linear.lora_a is not None:
            raise ValueError(f"'{path}' already has LoRA; merge it before adding another")
        *stack, fan_in, fan_out = linear.kernel.shape
        bound = 1 / math.sqrt(fan_in)
        a = jax.random.uniform(rngs.params(), (*stack, fan_in, rank), minval=-bound, maxval=bound)
        linear.lora_a = nnx.LoRAParam(a)
        linear.lora_b = nnx.LoRAParam(jnp.zeros((*stack, rank, fan_out)))
        linear.lora_scale = alpha / rank
    return model


def merge(model: nnx.Module) -> nnx.Module:
    """Folds the adapters into the kernels in place, removes them, and returns `model`.

    The sum is computed in float32 and rounded to the kernel's dtype.
    """
    for _, linear in _linears(model):
        if linear.lora_a is None or linear.lora_b is None:
            continue
        kernel = linear.kernel[...]
        with jax.default_matmul_precision("float32"):
            delta = linear.lora_scale * (linear.lora_a[...] @ linear.lora_b[...])
        linear.kernel[...] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
        linear.lora_a, linear.lora_b, linear.lora_scale = nnx.data(None), nnx.data(None), 0.0
    return model


def _linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear layer with its path, in a fixed order."""
    found = [
        (".".join(map(str, path)), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    ]
    yield from sorted(found, key=lambda item: item[0])
