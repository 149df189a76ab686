"""Low-rank adapters (LoRA): y = x W + (alpha / rank) x A B, on the linear layers of a network.

A and B are float32 `nnx.LoRAParam` leaves beside the kernel they adapt, stacked as it is:
`nnx.split(model, nnx.LoRAParam, ...)` separates what is trained from what is frozen. Files of them
are read and written by lora_files.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float

from worldr1_jax.nn.layers import Linear

# q, k, v and output of self- and cross-attention, which World-R1 adapts; and of the latter alone,
# where the prompt enters.
ATTENTION = (r".*attn[12]\.to_(q|k|v|out)",)
LAYERS = {"attention": ATTENTION, "cross": (r".*attn2\.to_(q|k|v|out)",)}


class Adapter(NamedTuple):
    """The low-rank term of one linear layer: scale x A B, scale being alpha / rank."""

    a: Float[Array, "*stack i r"] | Float[np.ndarray, "*stack i r"]
    b: Float[Array, "*stack r o"] | Float[np.ndarray, "*stack r o"]
    scale: float


Adapters = Mapping[str, Adapter]  # path of the linear layer, such as "blocks.attn1.to_q" -> term


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
    layers = linears(model)
    for target in targets:
        if not any(re.fullmatch(target, path) for path in layers):
            raise ValueError(f"the LoRA target '{target}' matches no linear layer of the network")
    for path, linear in layers.items():
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


def adapters(model: nnx.Module) -> dict[str, Adapter]:
    """The adapters of a network by the path of their layer; {} when it has none."""
    return {
        path: Adapter(linear.lora_a[...], linear.lora_b[...], linear.lora_scale)
        for path, linear in linears(model).items()
        if linear.lora_a is not None and linear.lora_b is not None
    }


def from_state(state: Mapping[str, Any], alpha: float) -> dict[str, Adapter]:
    """Adapters from the trainer's nested dict of leaves: `TrainState.adapters` or its `ema`.

    Raises:
      ValueError: a leaf that is not half of an adapter, or a half without the other.
    """
    flat = traverse_util.flatten_dict(dict(state), sep=".")
    halves: dict[str, dict[str, Any]] = {}
    for path, leaf in flat.items():
        layer, _, half = path.rpartition(".")
        if half not in ("lora_a", "lora_b"):
            raise ValueError(f"'{path}' is no leaf of LoRA, which are called lora_a and lora_b")
        halves.setdefault(layer, {})[half] = leaf
    for layer, found in halves.items():
        if len(found) < 2:
            raise ValueError(f"'{layer}' has {next(iter(found))} alone, without its other half")
    return {
        layer: Adapter(found["lora_a"], found["lora_b"], alpha / found["lora_a"].shape[-1])
        for layer, found in halves.items()
    }


def joined(several: Sequence[tuple[Adapters, float]]) -> dict[str, Adapter]:
    """Adapters that do what all of these do together, each times its strength: halves side by side,
    scales and strengths in B, which is not finite where float32 does not hold it."""
    parts: dict[str, list[Adapter]] = {}
    for found, strength in several:
        for path, (a, b, scale) in found.items():
            with np.errstate(over="ignore", invalid="ignore"):  # of whoever gave the strength
                scaled = b * np.float32(scale * strength)
            parts.setdefault(path, []).append(Adapter(a, scaled, 1.0))
    return {
        path: Adapter(
            jnp.concatenate([adapter.a for adapter in found], axis=-1),
            jnp.concatenate([adapter.b for adapter in found], axis=-2),
            1.0,
        )
        for path, found in sorted(parts.items())
    }


def grown(fresh: Adapters, given: Adapters) -> dict[str, Adapter]:
    """`given` in the rank, scale and layers of `fresh`: the same function, all of which can be
    trained. Columns that `given` lacks keep the A of `fresh`, with B = 0.

    Raises:
      ValueError: `given` has a layer that `fresh` lacks, or a larger rank.
    """
    check_growth(given, {path: adapter.a.shape[-1] for path, adapter in fresh.items()}.get)
    out = {}
    for path, (a, b, scale) in fresh.items():
        start = given.get(path)
        if start is not None:
            rank = start.a.shape[-1]
            a = jnp.asarray(a).at[..., :rank].set(start.a)
            b = jnp.asarray(b).at[..., :rank, :].set(start.b * np.float32(start.scale / scale))
        out[path] = Adapter(a, b, scale)
    return out


def check_growth(given: Adapters, rank: Callable[[str], int | None]) -> None:
    """Raises ValueError where training of these ranks (None: a layer is not trained) cannot start
    from `given`."""
    for path, adapter in given.items():
        has, most = adapter.a.shape[-1], rank(path)
        if most is None:
            raise ValueError(
                f"the adapters to start from have '{path}', which is not trained: set "
                "policy.lora_layers=attention, or fold them into the weights first"
            )
        if has > most:
            raise ValueError(
                f"the adapters to start from have rank {has} on '{path}': policy.lora_rank is "
                f"{most}, and has to be as large"
            )


def attach(model: nnx.Module, found: Adapters) -> nnx.Module:
    """Gives the layers of `model` these adapters, in float32 and in place, and returns it.

    Raises:
      ValueError: a path that is no linear layer, a shape that does not fit its kernel, or a layer
        that is already adapted; the network is then as it was.
    """
    check(model, found)
    layers = linears(model)
    for path, (a, b, scale) in found.items():
        layers[path].lora_a = nnx.LoRAParam(jnp.asarray(a, jnp.float32))
        layers[path].lora_b = nnx.LoRAParam(jnp.asarray(b, jnp.float32))
        layers[path].lora_scale = scale
    return model


def check(model: nnx.Module, found: Adapters) -> None:
    """Raises ValueError as `attach` does; abstract leaves (nnx.eval_shape) are fine."""
    layers = linears(model)
    for path, (a, b, _) in found.items():
        if path not in layers:
            raise ValueError(f"'{path}' is no linear layer of the network")
        if layers[path].lora_a is not None:
            raise ValueError(f"'{path}' already has LoRA; merge it before adding another")
        *stack, fan_in, fan_out = layers[path].kernel.shape
        rank = a.shape[-1]
        if a.shape != (*stack, fan_in, rank) or b.shape != (*stack, rank, fan_out):
            raise ValueError(
                f"the adapter of '{path}' is {list(a.shape)} and {list(b.shape)}; its kernel "
                f"{[*stack, fan_in, fan_out]} needs {[*stack, fan_in, 'r']} and "
                f"{[*stack, 'r', fan_out]}"
            )


def detach(model: nnx.Module) -> nnx.Module:
    """Removes the adapters, in place, and returns `model`."""
    for linear in linears(model).values():
        linear.lora_a, linear.lora_b, linear.lora_scale = nnx.data(None), nnx.data(None), 0.0
    return model


def merge(model: nnx.Module) -> nnx.Module:
    """Folds the adapters into the kernels in place, removes them, and returns `model`.

    The sum is computed in float32 and rounded once, to the kernel's dtype.
    """
    for linear in linears(model).values():
        if linear.lora_a is None or linear.lora_b is None:
            continue
        linear.kernel[...] = _fold(
            linear.kernel[...], linear.lora_a[...], linear.lora_b[...], linear.lora_scale
        )
        linear.lora_a, linear.lora_b, linear.lora_scale = nnx.data(None), nnx.data(None), 0.0
    return model


@jax.jit
def _fold(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """One layer of a stack after the other: in float32 a whole stack of 14B's would be 11 GB."""

    def layer(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        kernel, a, b = parts
        delta = scale * jnp.matmul(a, b, precision="highest")
        return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)

    fold = layer
    for _ in range(kernel.ndim - 2):
        fold = partial(jax.lax.map, fold)
    return fold((kernel, a, b))


def linears(model: nnx.Module) -> dict[str, Linear]:
    """Every linear layer by its path, such as "blocks.attn1.to_q", in a fixed order."""
    found = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    return dict(sorted(found.items()))
