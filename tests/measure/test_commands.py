"""Commands that documents name, on very little."""

import subprocess
import sys

import pytest

from tests.launching import ROOT, environment


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "cost_of_frame_stride --scenes=2 --rounds=1",
        "truth_of_rewards --scenes=2 --only still",
        "camera_guidance --prompts=2 --weights 0 1 --above=0.85",
        "told_apart --prompts=32 --levels 0.9",
        "weights",
    ],
)
def test_it_runs(command):
    done = subprocess.run(
        [sys.executable, "-m", *f"tests.measure.{command}".split()], cwd=ROOT,
        env=environment(XLA_FLAGS=""), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
