"""Exhausted memory is told in one sentence; other errors pass."""

import jax
import pytest

from worldr1_jax import timing as memory
from worldr1_jax.timing import StageTimer

MESSAGE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 34.20G of 15.75G hbm. Exceeded hbm capacity by 18.45G.\nmore"
)


def test_a_stage_says_how_much_and_what_to_change():
    wanted = r"the stage 'update' .*Used 34.20G of 15.75G hbm.*change first train.microbatches"
    with pytest.raises(ValueError, match=wanted), StageTimer()("update"):
        raise jax.errors.JaxRuntimeError(MESSAGE)


def test_other_errors_pass():
    with pytest.raises(jax.errors.JaxRuntimeError), memory.explained("update"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
