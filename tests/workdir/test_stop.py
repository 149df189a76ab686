"""A request to stop: honoured between stages, or after a while wherever the process is."""

import os
import signal
import subprocess
import sys
import time

import pytest

from worldr1_jax.workdir.stop import Stopped, StopSignal


def test_stop_signal_asks_and_then_gives_way():
    former = signal.getsignal(signal.SIGTERM)
    # A shell's background job starts with ctrl-C ignored; a foreground one has this handler.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignal() as stop:
        assert not stop.requested and not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.agreed()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is former
    signal.signal(signal.SIGINT, interrupt)


def test_a_stage_is_not_begun_once_a_stop_is_asked_for():
    with StopSignal() as stop:
        stop.between_stages()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.between_stages()


LONG_STAGE = """
import time
from worldr1_jax.workdir.stop import StopSignal
with StopSignal(lambda: 7, grace=0.5):
    print("in a stage", flush=True)
    time.sleep(60)
"""


def test_a_stage_that_is_too_long_is_left_in_its_middle():
    run = subprocess.Popen(
        [sys.executable, "-c", LONG_STAGE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == "in a stage\n"
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=30)
    assert run.returncode == 0 and time.monotonic() - began < 20
    assert "the same command goes on after update 7" in said
