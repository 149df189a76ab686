"""Group-relative advantages, of a sum of rewards or of each reward by itself.

With K videos of a prompt, a reward R, and the mean over the prompt's group,

    sum:   A = (R - mean R) / (std + eps),  R = sum_n w_n R_n
    each:  A = (Z - mean Z) / (std Z + eps) over the batch,  Z = sum_n w_n (R_n - mean R_n) / std_n
           with max(std_n, floor) in the Z above, and std_n in the Z that it is divided by

The sum is GRPO's: the reward with the largest spread decides what is learnt. GDPO (arXiv
2601.05242) weighs each reward in units of its own spread, so that weights say what they seem to.
Trap: where a reward is all but noise, so is what it is divided by. std_n over the batch, or the
floor under it, keeps such a group's noise small; where no reward differs by more than rounding
does, nothing is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from worldr1_jax.fields import in_range, one_of
from worldr1_jax.mesh import arrays
from worldr1_jax.types import Scores

EPS = 1e-4  # added to every std
FLAT = 1e-6  # spread of rewards that are the same but for float32's rounding: they teach nothing
REWARDS = ("sum", "each")
STDS = ("group", "batch", "global")


@dataclass(frozen=True)
class Advantage:
    """How rewards become advantages.

    Attributes:
      rewards: "sum" or "each", see the head of this file.
      std: "group": standard deviation (population) within each group; "batch": of all deviations
        from their group's mean; "global": of all rewards around their common mean, as in Flow-GRPO.
      floor: least std of each reward that is standardised, in its own units; 0 or more.
      clip: largest absolute advantage, > 0.
    """

    rewards: str = "sum"
    std: str = "group"
    floor: float = 0.0
    clip: float = 5.0

    def __post_init__(self):
        one_of(self, rewards=REWARDS, std=STDS)
        in_range(self, floor=(0, 1e9), clip=(1e-9, 1e9))
        if self.floor and self.rewards == "sum":
            raise ValueError("floor is not 0, but rewards is 'sum': it is of each reward's std")


def make(
    mesh: jax.sharding.Mesh, group_size: int, weights: Mapping[str, float], settings: Advantage
) -> Callable[..., tuple[Float[Array, " B"], Bool[Array, " B"]]]:
    """The function (scores, off=()) -> (advantages, valid) of a run: one compiled program.

    Groups may lie over devices and hosts: every mean and std is over all of them. `valid` are the
    samples that could be compared, see `group_advantage`.

    Args:
      mesh: on which the scores lie.
      group_size: K, at least 2; divides B.
      weights: of the rewards, for advantages of each; those that are named in `off` do not count.
      settings: how rewards become advantages.
    """

    def compare(parts, valid):
        rewards, unit, std = parts["total"], None, settings.std
        if settings.rewards == "each":
            each = partial(
                each_standardised, {name: parts[name] for name in parts if name != "total"},
                weights, group_size, valid, std=settings.std,
            )  # fmt: skip
            # A second std of what the floor has made small would make it large again.
            rewards, unit, std = each(floor=settings.floor), each(), "batch"
        found = group_advantage(rewards, group_size, valid, std=std, clip=settings.clip, unit=unit)
        return found, comparable(valid, group_size).reshape(-1)

    program = jax.jit(compare, out_shardings=arrays.batched(mesh))

    def advantages(scores: Scores, off: Sequence[str] = ()):
        parts = {"total": scores.total}
        if settings.rewards == "each":
            counted = [name for name, weight in weights.items() if weight and name not in off]
            parts |= {name: scores.parts[name] for name in counted}
        with arrays.on(mesh):
            return program(parts, scores.valid)

    return advantages


def group_advantage(
    rewards: Float[Array, " B"],
    group_size: int,
    valid: Bool[Array, " B"] | None = None,
    *,
    std: str = "group",
    clip: float = 5.0,
    eps: float = EPS,
    unit: Float[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """`(reward - group mean) / (std + eps)`, clipped to `+-clip`.

    Args:
      rewards: any scale; members of a group are neighbours. Values of invalid samples are not read,
        and may be NaN.
      group_size: K, at least 2; divides B.
      valid: samples whose reward was measured; all when None. The others enter no mean and no std
        and get 0, as do all members of a group with fewer than 2 valid ones.
      std: one of STDS, see `Advantage`.
      clip: largest absolute advantage, > 0.
      eps: added to the std.
      unit: whose std it is, in place of the rewards'.

    Raises:
      ValueError: when group_size does not divide B or is below 2, or `std` is unknown.
    """
    valid = jnp.ones(rewards.shape[0], bool) if valid is None else valid
    mask = comparable(valid, group_size)
    deviation, spread = _spread(rewards, mask, std)
    if unit is not None:
        _, spread = _spread(unit, mask, std)
    return jnp.where(mask, jnp.clip(deviation / (spread + eps), -clip, clip), 0.0).reshape(-1)


def each_standardised(
    parts: Mapping[str, Float[Array, " B"]],
    weights: Mapping[str, float],
    group_size: int,
    valid: Bool[Array, " B"],
    *,
    std: str = "group",
    floor: float = 0.0,
    eps: float = EPS,
) -> Float[Array, " B"]:
    """Weighted sum of the rewards, each as its deviation from the group's mean in units of its std.

    Args:
      parts: the rewards that count, any scales.
      weights: of each; of others too, which are not read.
      group_size: as in `group_advantage`.
      valid: as in `group_advantage`.
      std: one of STDS.
      floor: least std of a reward.
      eps: added to the std.
    """
    mask, total = comparable(valid, group_size), jnp.zeros(())
    for name, rewards in parts.items():
        deviation, spread = _spread(rewards, mask, std)
        deviation = jnp.where(spread > FLAT, deviation, 0.0)
        total += weights[name] * deviation / (jnp.maximum(spread, floor) + eps)
    return jnp.asarray(total).reshape(-1)


def comparable(valid: Bool[Array, " B"], group_size: int) -> Bool[Array, "G K"]:
    """Valid samples of groups with 2 or more of them.

    Raises:
      ValueError: when group_size does not divide B or is below 2.
    """
    count = valid.shape[0]
    if group_size < 2 or count % group_size:
        raise ValueError(
            f"group_size is {group_size}; it must be at least 2 and divide the {count} samples"
        )
    mask = valid.reshape(-1, group_size)
    return mask & (mask.sum(1, keepdims=True) >= 2)


def _spread(rewards, mask, std):
    """Deviations from the group's mean `[G K]`, 0 where they do not count, and their std."""
    grouped = jnp.where(mask, rewards.reshape(mask.shape).astype(jnp.float32), 0.0)
    deviation = grouped - _masked_mean(grouped, mask, axis=1)
    if std == "group":
        return deviation, _masked_std(grouped, mask, axis=1)
    if std == "global":
        return deviation, _masked_std(grouped, mask, axis=None)
    if std == "batch":
        return deviation, jnp.sqrt(_masked_mean(deviation**2, mask, axis=None))
    raise ValueError(f"advantage std {std!r} is unknown: it is one of {', '.join(STDS)}")


def _masked_mean(x, mask, axis):
    total = jnp.where(mask, x, 0.0).sum(axis, keepdims=True)
    return total / jnp.maximum(mask.sum(axis, keepdims=True), 1)


def _masked_std(x, mask, axis):
    return jnp.sqrt(_masked_mean((x - _masked_mean(x, mask, axis)) ** 2, mask, axis))
