"""Hosts that differ are told what they differ in, and each hears of the end of another."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from worldr1_jax.mesh import hosts

MINE = {"config": "seed 0", "prompts": "a b"}


@pytest.fixture
def other(monkeypatch):
    """Makes this process host 0 of two; the other one has what the function is given."""

    def be(things):
        sent = []

        def record(mine):
            sent.append(mine)
            return np.stack([mine, mine])

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(multihost_utils, "process_allgather", record)
        hosts.agree(things)
        monkeypatch.setattr(
            multihost_utils, "process_allgather", lambda mine: np.stack([mine, sent[0]])
        )

    return be


def test_hosts_that_agree_go_on(other):
    other(MINE)
    hosts.agree(MINE)


@pytest.mark.parametrize(
    ("changed", "what"), [({"config": "seed 1"}, "config"), ({"prompts": "a c"}, "prompts")]
)
def test_hosts_that_differ_are_refused(other, changed, what):
    other(MINE | changed)
    with pytest.raises(ValueError, match=f"hosts differ in their {what}: host 0 .* host 1"):
        hosts.agree(MINE)


def test_one_host_has_nobody_to_agree_with():
    hosts.agree(MINE)


# -- two processes, which compute nothing

HOST = """
import sys, time
from worldr1_jax.mesh import hosts
host = hosts.join(sys.argv[1], 2, int(sys.argv[2]), patience=4)
print("joined", flush=True)
if not sys.stdin.readline():  # nothing more is to come
    time.sleep(600)
host.leave("the disk is full")
"""


@pytest.fixture
def pair():
    """Two processes that have joined; each leaves once it is written to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(process)], text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for process in range(2)
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "joined\n", process.communicate()
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_hangs_ends_the_other_with_a_sentence(pair, victim):
    pair[victim].send_signal(signal.SIGSTOP)
    _, said = pair[1 - victim].communicate(timeout=120)
    assert pair[1 - victim].returncode == 1
    assert said.startswith(f"error: host {victim} has been silent for 4 seconds, and no host")
    assert said.count("\n") == 1


@pytest.mark.parametrize("first", [0, 1])
def test_a_host_that_ends_tells_the_others_why(pair, first):
    pair[first].stdin.write("\n")
    pair[first].stdin.flush()
    for process, want in ((first, "the disk is full"), (1 - first, f"host {first} has ended: the")):
        _, said = pair[process].communicate(timeout=120)
        assert pair[process].returncode == 1 and said.startswith(f"error: {want}"), said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", 2, 0), "--coordinator is 'nowhere': it has to be host:port"),
        (("h:99999", 2, 0), "--coordinator is 'h:99999'"),
        (("h:1", 0, 0), "--processes is 0"),
        (("h:1", 2, 2), "--process is 2: it has to be 0 or more, below --processes"),
        (("h:1", 2, 0, 0), "--heartbeat is 0"),
    ],
)
def test_addresses_and_numbers_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.join(*arguments)
