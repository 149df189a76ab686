"""Watches a run for what a curve of rewards does not show, and ends it before it is spoilt.

The stronger the learner, the sooner it finds what a reward cannot see: videos of a prompt that are
all alike, or a policy that has left what it knew. Both show in numbers that need no judge.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from worldr1_jax.fields import in_range

FIRST = 5  # updates whose mean diversity is the start's
CONSTANT = 0.5  # share of groups without spread beyond which a reward teaches nothing


@dataclasses.dataclass(frozen=True)
class Watch:
    """When a run is ended; the fields are `watch` of the config.

    Attributes:
      diversity: least share of the first updates' diversity, the distance of a prompt's latents;
        0: any.
      kl: largest mean KL to the base policy, for algorithms that measure one; 0: any.
      patience: updates over which diversity and KL are averaged.
      idle: updates in a row from which nothing could be learnt. The policy is not spoilt by them:
        once what failed is mended, the same command goes on.
    """

    diversity: float = 0.75
    kl: float = 0.0
    patience: int = 10
    idle: int = 8

    def __post_init__(self) -> None:
        in_range(
            self, diversity=(0, 1), kl=(0, 1e9), patience=(1, 10**6), idle=(1, 10**6)
        )  # fmt: skip


class Watcher:
    """Applies a `Watch`, update after update.

    Attributes:
      history: recent scalars, the start's diversity, and why the policy is spoilt, if it is; what a
        resume has to restore.
    """

    def __init__(self, watch: Watch, history: Mapping[str, Any] | None = None):
        self._watch = watch
        empty: dict[str, Any] = {
            "first": [], "diversity": [], "kl": [], "idle": 0, "constant": {}, "spoilt": ""
        }  # fmt: skip
        self.history = empty | dict(history or {})

    def update(self, scalars: Mapping[str, float]) -> str:
        """Takes the scalars of an update; a sentence that says why the run has to end, or ""."""
        h, watch = self.history, self._watch
        for name in ("diversity", "kl"):
            value = scalars.get(name, math.nan)
            if math.isfinite(value):
                h[name] = [*h[name], value][-watch.patience :]
                if name == "diversity" and len(h["first"]) < FIRST:
                    h["first"] = [*h["first"], value]
        h["idle"] = 0 if scalars.get("learnt", 1.0) else h["idle"] + 1
        if h["idle"] >= watch.idle:
            return (
                f"nothing could be learnt from {h['idle']} updates in a row: masked "
                f"{scalars.get('masked', 0):.0f} videos, skipped {scalars.get('skipped', 0):.0f} "
                "steps of the last one"
            )
        h["spoilt"] = self._diversity() or self._kl()
        return h["spoilt"]

    def warning(self, scalars: Mapping[str, float]) -> str:
        """A sentence on the first update at which a reward had no spread in most groups, or ""."""
        for name, share in scalars.items():
            reward = name.removeprefix("constant_")
            if reward == name or not share > CONSTANT or reward in self.history["constant"]:
                continue
            self.history["constant"] = {**self.history["constant"], reward: 1}
            return (
                f"the reward {reward} is the same for all videos of {share:.0%} of this update's "
                "prompts, which therefore teach nothing of it"
            )
        return ""

    def _diversity(self) -> str:
        h, watch = self.history, self._watch
        if len(h["first"]) < FIRST or len(h["diversity"]) < watch.patience:
            return ""
        start, now = _mean(h["first"]), _mean(h["diversity"])
        if now >= watch.diversity * start:
            return ""
        return (
            f"the videos of a prompt have become alike: their latents differ by {now:.3g} over the "
            f"last {watch.patience} updates, {start:.3g} at the start (watch.diversity)"
        )

    def _kl(self) -> str:
        found, watch = self.history["kl"], self._watch
        if not watch.kl or len(found) < watch.patience or _mean(found) <= watch.kl:
            return ""
        return (
            f"the policy has left its band: KL {_mean(found):.3g} over the last {watch.patience} "
            f"updates, and watch.kl is {watch.kl:g}"
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
