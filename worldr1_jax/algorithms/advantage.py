"""Group-relative advantages."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def group_advantage(
    rewards: Float[Array, " B"],
    group_size: int,
    valid: Bool[Array, " B"] | None = None,
    *,
    std: str = "group",
    clip: float = 5.0,
    eps: float = 1e-4,
) -> Float[Array, " B"]:
    """`(reward - group mean) / (std + eps)`, clipped to `+-clip`.

    Args:
      rewards: any scale; members of a group are neighbours. Values of invalid samples are not read,
        and may be NaN.
      group_size: K, at least 2; divides B.
      valid: samples whose reward was measured; all when None. The others enter no mean and no std
        and get 0, as do all members of a group with fewer than 2 valid ones.
      std: "group": standard deviation (population) within each group; "global": of all rewards that
        count, around their common mean, as in Flow-GRPO.
      clip: largest absolute advantage, > 0.
      eps: added to the std.

    Raises:
      ValueError: when group_size does not divide B or is below 2, or `std` is neither.
    """
    count = rewards.shape[0]
    if group_size < 2 or count % group_size:
        raise ValueError(
            f"group_size is {group_size}; it must be at least 2 and divide the {count} samples."
        )
    if std not in ("group", "global"):
        raise ValueError(f'advantage std {std!r} is unknown; it must be "group" or "global".')
    valid = jnp.ones(count, bool) if valid is None else valid
    mask = valid.reshape(-1, group_size)
    mask = mask & (mask.sum(1, keepdims=True) >= 2)
    grouped = jnp.where(mask, rewards.reshape(-1, group_size).astype(jnp.float32), 0.0)

    mean = _masked_mean(grouped, mask, axis=1)
    if std == "group":
        spread = _masked_std(grouped, mask, axis=1)
    else:
        spread = _masked_std(grouped, mask, axis=None)
    advantage = jnp.clip((grouped - mean) / (spread + eps), -clip, clip)
    return jnp.where(mask, advantage, 0.0).reshape(-1)


def _masked_mean(x, mask, axis):
    total = jnp.where(mask, x, 0.0).sum(axis, keepdims=True)
    return total / jnp.maximum(mask.sum(axis, keepdims=True), 1)


def _masked_std(x, mask, axis):
    return jnp.sqrt(_masked_mean((x - _masked_mean(x, mask, axis)) ** 2, mask, axis))
