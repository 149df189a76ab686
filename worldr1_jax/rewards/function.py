"""A plain function as a reward: any judge that a user has, in Python, in torch, or behind a
network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from worldr1_jax.files import short
from worldr1_jax.rewards.base import Reward

# (videos [B F H W 3] in [0, 1], B prompts, camtoworld [B F 4 4]) -> [B], on the host
Function = Callable[[Any, Sequence[str], Any], Any]


@dataclasses.dataclass(frozen=True)
class HostFunction(Reward):
    """Calls `function` on the host with the videos of a turn.

    Of several processes the first calls it and tells the others, so that a judge that answers two
    calls differently cannot make hosts disagree. Whatever it raises ends the run: what should only
    mask a video is NaN. So is the score of a video that is not finite, whatever the judge says.
    """

    function: Function
    name: str

    def call(
        self,
        videos: Float[np.ndarray, "B F H W 3"],
        prompts: Sequence[str],
        camtoworld: Float[np.ndarray, "B F 4 4"],
    ) -> Float[np.ndarray, " B"]:
        """The scores.

        Raises:
          ValueError: an answer that is not one number a video.
        """
        count = len(prompts)
        values = np.full(count, np.nan, np.float32)
        if jax.process_index() == 0:
            answer = self._numbers(self.function(videos, prompts, camtoworld))
            if answer.shape != (count,):
                raise ValueError(
                    f"the reward {self.name} gave numbers of the shape {answer.shape} for {count} "
                    f"videos: it has to give ({count},)"
                )
            sound = np.isfinite(videos).all(axis=(1, 2, 3, 4))
            values = np.where(sound, answer, np.float32(np.nan))
        if jax.process_count() == 1:
            return values
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.broadcast_one_to_all(values))

    def _numbers(self, answer: Any) -> np.ndarray:
        """What a function gave, in float32, NaN where it is masked: neither texts nor dates, which
        numpy would count."""
        try:
            plain = np.ma.asanyarray(answer)
            if plain.dtype.kind not in "biuO" and not jnp.issubdtype(plain.dtype, jnp.floating):
                raise TypeError(f"they are {plain.dtype}")
            return plain.astype(np.float32).filled(np.nan)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # torch has the third
            reason = short(str(error).split("\n")[0].rstrip("."))
            raise ValueError(
                f"the reward {self.name} gave what are no numbers for numpy: {reason}"
            ) from error
