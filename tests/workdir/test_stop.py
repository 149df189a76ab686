"""A request to stop: honoured between stages, or after a while wherever the process is."""

import os
import signal
import subprocess
import sys
import time

import pytest

from worldr1_jax.workdir.stop import Stopped, StopSignal


def until(true, seconds=10.0):
    """Waits for what another thread is about to do."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


def test_stop_signal_asks_and_then_gives_way():
    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert not stop.requested and not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stop.requested)
        assert stop.agreed()
    assert former == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_a_stage_is_not_begun_once_a_stop_is_asked_for():
    with StopSignal() as stop:
        stop.between_stages()
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stop.requested)
        with pytest.raises(Stopped):
            stop.between_stages()


# XLA holds the main thread, so that no handler of Python's runs before it is done.
LONG_STAGE = """
import jax, sys
from worldr1_jax.workdir.stop import StopSignal
with StopSignal(lambda: 7, grace=0.5):
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x != 0, lambda x: x * 3, x))
    endless = endless.lower(1).compile()
    print("in a stage", flush=True)
    endless(1).block_until_ready()
"""


def test_a_checkpoint_that_cannot_be_written_keeps_no_process_alive():
    """Of a disk that is full; the thread that listens may not die of it."""
    failing = LONG_STAGE.replace("lambda: 7", "lambda: open('/nowhere/at/all')")
    run = subprocess.Popen(
        [sys.executable, "-c", failing],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stdout is not None and run.stdout.readline() == "in a stage\n"
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped in the middle of a stage: [Errno 2]" in said


@pytest.mark.parametrize(
    ("asked", "status"), [([signal.SIGTERM], 0), ([signal.SIGINT, signal.SIGINT], 130)]
)
def test_a_stage_that_is_too_long_is_left_in_its_middle(asked, status):
    run = subprocess.Popen(
        [sys.executable, "-c", LONG_STAGE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == "in a stage\n"
    for number in asked:
        run.send_signal(number)
        time.sleep(0.3)  # two of a kind at once would be one
    try:
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == status
    assert "the same command goes on after update 7" in said and "Traceback" not in said
