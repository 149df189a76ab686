"""Which rewards there are and how they count: from names, sections and functions, all checked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from worldr1_jax.fields import is_number
from worldr1_jax.files import short
from worldr1_jax.rewards.base import CAMERAS, GAUSSIANS, REWARDS, Reward, find
from worldr1_jax.rewards.function import Function, HostFunction
from worldr1_jax.rewards.reconstruct import Reconstruct
from worldr1_jax.weights import needed
from worldr1_jax.weights.needed import Needed

RECONSTRUCT = "reconstruct"  # the 3D network's name among the networks of rewards
MOST = 1e6  # largest weight
GENERAL = "general"  # R_gen: whatever `general` names, as one part
RESERVED = (GENERAL, "reward", "total")  # sums of rewards
Named = str | Function | Reward


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which rewards there are, and how they count.

    Attributes:
      rewards: by name.
      weights: of each in the sum; one of weight 0 is a measurement.
      general: share of each reward that is part of R_gen; sums to 1, or is empty.
      reconstruct: how they look at a video in 3D.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    general: Mapping[str, float]
    reconstruct: Reconstruct

    def needs(self, names: Sequence[str] | None = None) -> str:
        """The most that these, or all, need of the 3D network."""
        chosen = self.rewards if names is None else names
        wanted = {self.rewards[name].needs for name in chosen}
        return next((need for need in (GAUSSIANS, CAMERAS) if need in wanted), "")

    def members(self, name: str) -> tuple[str, ...]:
        """The rewards that a name of the config means."""
        if name == GENERAL:
            return tuple(self.general)
        return (name,)

    def meant(self, names: Iterable[str]) -> tuple[str, ...]:
        """The rewards that names of the config mean, as far as they are there."""
        found = (member for name in names for member in self.members(name))
        return tuple(member for member in found if member in self.rewards)

    def counted(self) -> tuple[str, ...]:
        """Rewards that count."""
        return tuple(name for name, weight in self.weights.items() if weight)

    def measured(self) -> tuple[str, ...]:
        """Rewards that do not count."""
        return tuple(name for name, weight in self.weights.items() if not weight)

    def reported(self) -> tuple[str, ...]:
        """Parts that count, R_gen as one."""
        alone = tuple(name for name in self.counted() if name not in self.general)
        return (*alone, GENERAL) if self.general else alone

    def spatial(self) -> tuple[str, ...]:
        """S_recon and S_traj, as far as they are measured: what a report sums as "total_3d",
        whatever a run learnt from."""
        return tuple(name for name in ("recon", "trajectory") if name in self.rewards)

    def needed(self) -> tuple[Needed, ...]:
        """Files of weights of all rewards."""
        look = self.reconstruct.needed() if self.needs() else ()
        return (*look, *(one for reward in self.rewards.values() for one in reward.needed()))

    def check_frames(self, frames: int) -> None:
        """Raises ValueError for videos of which rewards see too few frames."""
        look = self.reconstruct
        seen = -(-frames // look.frame_stride)
        if self.needs() and seen < 2:
            raise ValueError(
                f"rewards.reconstruct.frame_stride is {look.frame_stride}: of {frames} frames the "
                f"3D network sees {seen}, and a camera path needs 2"
            )
        if "meta_view" in self.rewards and look.gaussian_frames == 1:
            raise ValueError(
                "rewards.reconstruct.gaussian_frames is 1: S_meta compares the Gaussians of two "
                "halves of a video"
            )

    def check(self) -> None:
        """Raises ValueError for files that are missing, all at once, before weights are read."""
        needed.check(self.needed())
        if self.needs():
            self.reconstruct.check(self.needs())
        for reward in self.rewards.values():
            reward.check()


def choose(
    weights: Mapping[Named, float | None],
    *,
    general: str | Mapping[str, float] = "hps",
    reconstruct: Mapping[str, Any] | Reconstruct | None = None,
    **sections: Mapping[str, Any],
) -> Choice:
    """The rewards that `weights` names, but for those of weight None; arguments are `build`'s.

    Raises:
      ValueError: an unknown reward, section or field, a value out of its range, or no reward that
        counts.
    """
    look = reconstruct
    if not isinstance(look, Reconstruct):
        look = _made(Reconstruct, RECONSTRUCT, look or {})
    rewards: dict[str, Reward] = {}
    counts: dict[str, float] = {}
    shares: dict[str, float] = {}
    for named, weight in weights.items():
        if weight is None:
            continue
        if not is_number(weight, -MOST, MOST):
            raise ValueError(
                f"rewards.weights.{named} is {short(repr(weight))}: it has to be a number in "
                f"[{-MOST:g}, {MOST:g}]"
            )
        if named == GENERAL:
            shares = _shares(general)
            for name, share in shares.items():  # which may be weighed by themselves, too
                rewards[name] = _made(find(name), name, sections.get(name, {}))
                counts[name] = counts.get(name, 0.0) + weight * share
            continue
        name, reward = _resolved(named, sections)
        if name in RESERVED or (name in rewards and not (named == name and name in shares)):
            raise ValueError(
                f"two rewards, or a reward and a sum, are called '{name}': give yours another "
                "__name__"
            )
        rewards[name] = reward
        counts[name] = counts.get(name, 0.0) + weight
    for name in sections:
        find(name)  # its fields are checked even where it does not count
        _made(find(name), name, sections[name])
    if not any(counts.values()):
        raise ValueError("rewards.weights are all 0: at least one reward has to count")
    return Choice(rewards, counts, shares, look)


def _shares(general: str | Mapping[str, float]) -> dict[str, float]:
    """Of R_gen's rewards, normalised to 1."""
    chosen = {general: 1.0} if isinstance(general, str) else dict(general)
    right = all(is_number(share, 0, MOST) for share in chosen.values())
    chosen = {name: share for name, share in chosen.items() if share}
    total = sum(chosen.values()) if right else 0.0
    if not right or not chosen:
        raise ValueError(
            f"rewards.general is {dict(general) if not isinstance(general, str) else general!r}: "
            f"it names rewards with weights in [0, {MOST:g}], one of them positive"
        )
    return {name: share / total for name, share in chosen.items()}


def _resolved(named: Named, sections: dict[str, Mapping[str, Any]]) -> tuple[str, Reward]:
    if isinstance(named, str):
        return named, _made(find(named), named, sections.get(named, {}))
    if isinstance(named, Reward):
        return _name_of(type(named)), named
    if not callable(named):
        raise ValueError(
            f"rewards.weights names {short(repr(named))}: it has to be a name, a Reward or a "
            "function"
        )
    name = getattr(named, "__name__", type(named).__name__)
    return name, HostFunction(named, name)


def _name_of(kind: type[Reward]) -> str:
    """Of a reward that is given as an object: as REWARDS has it, or its class's, in snake case."""
    path = f"{kind.__module__}:{kind.__name__}"
    known = {where: name for name, where in REWARDS.items()}
    return known.get(path) or re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def _made(owner: type, name: str, section: Mapping[str, Any]) -> Any:
    """A dataclass from its section of the config; what is wrong with it is said with the section's
    name."""
    known = [field.name for field in dataclasses.fields(owner)]
    strange = [key for key in section if key not in known]
    if strange:
        raise ValueError(
            f"rewards.{name} has no field '{strange[0]}': it has {', '.join(known) or 'none'}"
        )
    try:
        return owner(**section)
    except ValueError as error:
        raise ValueError(f"rewards.{name}.{error}") from error
