"""What a program costs, counted from its jaxpr, before and without compiling it.

XLA's own cost analysis counts the body of a scan once, however long the scan is; here it is
multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def matmul_flops(function: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products and convolutions in `function()`, over all
    devices: two for each multiplication with its addition.

    Of a `cond`, the dearer branch counts, but the definition's where platforms have their own ways
    to one result; the body of a `while` counts once, for nobody knows how often it runs. A Pallas
    kernel's body counts for every block of its grid, those that it skips too. Elementwise work is
    not counted.
    """
    return jaxpr_flops(jax.make_jaxpr(function)().jaxpr)


def jaxpr_flops(jaxpr: Any) -> float:
    """`matmul_flops` of what is traced already."""
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
    inner = [jaxpr_flops(sub) for sub in sub_jaxprs(params)]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    if params.get("branches_platforms"):  # of lax.platform_dependent, whose last is any platform's
        return inner[-1]
    if name == "cond":
        return max(inner)
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        times = params["mesh"].size  # its shapes are those of one device's part
    return times * sum(inner)


def sub_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "jaxpr"):
                item = item.jaxpr
            if hasattr(item, "eqns"):
                yield item
