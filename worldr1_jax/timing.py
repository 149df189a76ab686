"""What to change when a device's memory is exhausted, instead of the compiler's pages."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Stage -> settings that lower its memory, the cheapest in time first: those with which the same run
# goes on, and those that make another run.
SETTINGS = {
    "rollout": ("sample.videos_at_once=1, mesh.context=2 or more", "groups smaller"),
    "decode": (
        "policy.chunked_vae=True, sample.videos_at_once=1, idle_on_host with policy and text",
        "groups smaller",
    ),
    "reconstruct": (
        "sample.videos_at_once=1, idle_on_host with policy, text and rewards",
        "rewards.reconstruct.frame_stride larger",
    ),
    "recon": (
        "sample.videos_at_once=1, idle_on_host with policy and text",
        "rewards.recon.views or groups smaller",
    ),
    "update": (
        "train.microbatches larger, policy.remat=whole, idle_on_host with text, vae and rewards, "
        "mesh.context=2 or more",
        "train.minibatches larger",
    ),
}
_OTHERS = ("sample.videos_at_once=1, idle_on_host with policy and text", "groups smaller")
_EXHAUSTED = ("RESOURCE_EXHAUSTED", "Ran out of memory", "Out of memory")
_AMOUNT = re.compile(
    r"(Used [\d.]+\w* of [\d.]+\w* hbm|allocate [\d.]+ ?\w+|allocating [\d.]+ ?\w+)", re.IGNORECASE
)


@contextlib.contextmanager
def explained(stage: str) -> Iterator[None]:
    """Turns exhausted device memory into one sentence that names the stage, how much was asked for,
    and which settings to change first.

    Raises:
      ValueError: in place of jax's error; other errors pass.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if not any(mark in text for mark in _EXHAUSTED):
            raise
        amount = _AMOUNT.search(text)
        said = amount.group(0) if amount else text.split("\n")[0][:200]
        first, then = SETTINGS.get(stage, _OTHERS)
        raise ValueError(
            f"the stage '{stage}' does not fit into a device's memory ({said}): change first "
            f"{first}, with which this run goes on; or, in another workdir, {then}"
        ) from error


class StageTimer:
    """Adds up the seconds of named stages.

        timer = StageTimer(on_stage=progress.stage)
        with timer("rollout") as wait_for:
            trajectory = wait_for(rollout(...))
        timer.collect()  # {"seconds/rollout": 1.2}

    jax returns before it has computed, so a stage ends when what went through `wait_for` is ready.
    A stage that exhausts a device's memory raises a ValueError with advice (`explained`).

    Args:
      on_stage: called with a stage's name as it begins.
    """

    def __init__(self, on_stage: Callable[[str], object] | None = None) -> None:
        self._seconds: dict[str, float] = {}
        self._on_stage = on_stage

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[Any], Any]]:
        outputs: list[Any] = []

        def wait_for(output: Any) -> Any:
            outputs.append(output)
            return output

        if self._on_stage:
            self._on_stage(name)
        start = time.perf_counter()
        try:
            with explained(name):
                yield wait_for
                jax.block_until_ready(outputs)
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def collect(self) -> dict[str, float]:
        """Returns {"seconds/<stage>": seconds} since the last call, and starts afresh."""
        seconds = {f"seconds/{name}": value for name, value in self._seconds.items()}
        self._seconds = {}
        return seconds
