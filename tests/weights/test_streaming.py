"""How much memory a loader needs beside what the devices hold, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3, 30], ids=["a_tenth", "whole"])
def test_the_peak_is_under_1_3_times_what_the_devices_hold(layers):
    """Wan2.1-1.3B's shapes in float32 on disk, in bfloat16 on eight devices. Seen: 1.18 with 3 of
    its 30 layers, where the mapped 64 MB weigh ten times as much as with all of them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.measure.streaming", f"--layers={layers}"],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    print(figures)
    assert figures["held"] < figures["grown"] < 1.3 * figures["held"]
