"""launch/benchmark.py as a command, on two devices and a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "frames": 5, "height": 32, "width": 32, "groups": 2, "group_size": 2, "sample.steps": 3,
    "algorithm.window": 1, "algorithm.window_range": "(0,2)", "rewards.recon.views": 2,
}  # fmt: skip


def test_every_stage_is_timed_and_counted(tmp_path):
    weights = tiny.save_weights(tmp_path / "weights")
    fields = FIELDS | {"policy.weights": weights, "rewards.reconstruct.da3": weights / "da3"}
    command = [
        sys.executable, str(ROOT / "launch" / "benchmark.py"), "--repeats=1",
        f"--config={ROOT / 'configs' / 'world.py'}:nano,grpo",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["devices"], found["videos"]) == (2, 4)
    assert list(found["stages"]) == ["rollout", "decode", "reconstruct", "recon", "update"]
    for row in found["stages"].values():
        assert row["seconds"] > 0 and row["matmul_gflop"] > 0
