"""Shapes that annotations promise, enforced while tests run: the type checker that conftest.py
hands to jaxtyping's import hook.

Only what holds arrays is checked, and numpy's arrays count as JAX's, for the functions take both.
What else an annotation says is mypy's business, and tests play pipelines and scorers with small
stand-ins. Fields of dataclasses are left alone: a tree of arrays may hold their places or shapes.
"""

import functools
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jax
import jaxtyping
import numpy as np

Either = jax.Array | np.ndarray
check_with = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

# Functions of users that refuse a wrong shape themselves, in a sentence that tests hold them to:
# the checker would speak first. What they return is checked as of all others.
OWN_WORDS = {
    "evaluation.epipolar.errors",
    "evaluation.statistics.paired_bootstrap_ci95",
    "rewards.combine.combine",
    "rewards.meta_view.agreement",
    "rewards.recon.s_recon",
    "rewards.reconstruct.reconstruct",
    "rewards.released.s_traj",
    "rewards.scorer.Scorer.__call__",
    "rewards.scorer.Scorer.score",
    "rewards.trajectory.errors",
    "rewards.trajectory.s_traj",
    "rewards.trajectory.s_traj_segments",
    "rollout.sample.sample",
    "splat.render.render",
}


def check(function: Callable) -> Callable:
    """The function with its array arguments, or its result, checked at every call.

    jaxtyping gives two made ones for each function, one for the arguments and one for the result.
    """
    hints = function.__annotations__
    if function.__name__ == "__init__":
        return function
    if f"{function.__module__}.{function.__qualname__}".removeprefix("worldr1_jax.") in OWN_WORDS:
        hints = {"return": hints.get("return")}
    kept = {name: _lenient(hint) for name, hint in hints.items() if _holds_arrays(hint)}
    if not kept:
        return function
    function.__annotations__ = kept
    return check_with(function)


def _holds_arrays(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    if hint is jaxtyping.PRNGKeyArray:  # one key, or an array of them
        return False
    return any(_holds_arrays(part) for part in typing.get_args(hint))


@functools.cache
def _either(hint: Any) -> Any:
    """Such an array of JAX or of numpy. Sums, such as T+1, count as any size: a checker knows T
    only where another array has said it before."""
    sizes = " ".join("_" if re.search(r"[+-]", size) else size for size in hint.dim_str.split())
    kind = Either if hint.array_type is jax.Array else hint.array_type
    return hint.dtype[kind, sizes]


def _lenient(hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return _either(hint)
    parts = typing.get_args(hint)
    if not parts or typing.get_origin(hint) in (Callable, typing.Annotated):
        return hint
    changed = tuple(_lenient(part) for part in parts)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return functools.reduce(lambda a, b: a | b, changed)
    return typing.get_origin(hint)[changed]
