"""Hosts that differ are told what they differ in."""

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
