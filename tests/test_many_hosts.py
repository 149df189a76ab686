"""Two processes of four devices: the run of one process of eight; one killed, the other ends, and
the same command goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {
    "frames": 5, "height": 32, "width": 32, "groups": 2, "group_size": 4, "checkpoint_every": 1,
    "sample.steps": 3, "sample.window": 1, "sample.window_range": "(0,2)", "rewards.views": 2,
    "evaluate.prompts": 0, "videos_every": 100, "mesh.data": 4, "mesh.fsdp": 2,
}  # fmt: skip


def _start(weights, workdir, cache, *, updates, processes=1, devices=8, **fields):
    """Starts the launcher once a process and returns the processes."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    settings = {
        **FIELDS, "policy.weights": weights, "rewards.da3": weights / "da3",
        "num_updates": updates, **fields,
    }  # fmt: skip
    started = []
    for process in range(processes):
        command = [
            sys.executable, str(ROOT / "launch" / "tpu_train.py"),
            f"--config={ROOT / 'configs' / 'world.py'}", f"--workdir={workdir}",
            f"--compilation_cache={cache}", "--heartbeat=10",
            *(f"--config.{name}={value}" for name, value in settings.items()),
        ]  # fmt: skip
        if processes > 1:
            command += [
                "--distributed", f"--coordinator=localhost:{port}", f"--processes={processes}",
                f"--process={process}",
            ]  # fmt: skip
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(
                command, env=environment, cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    return started


def _finish(started, code=0):
    outputs = [process.communicate(timeout=900) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == code, errors[-2000:]
    return outputs


def _metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _newest(workdir):
    names = (path.name for path in (workdir / "checkpoints").glob("[0-9]*"))
    return max((int(name) for name in names if name.isdigit()), default=0)  # others are unfinished


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_and_resume_after_one_is_killed(tmp_path):
    weights, cache = tiny.save_weights(tmp_path / "weights"), tmp_path / "compiled"
    one, two = tmp_path / "one", tmp_path / "two"
    _finish(_start(weights, one, cache, updates=2))
    outputs = _finish(_start(weights, two, cache, updates=2, processes=2, devices=4))
    assert "update" in "".join(outputs[0])
    assert "reward" not in "".join(outputs[1])  # only process 0 reports
    for here, there in zip(_metrics(one), _metrics(two), strict=True):
        for name in ("reward", "recon", "trajectory", "general", "kl", "grad_norm"):
            # The same programs on the same mesh; sums between processes take another order.
            np.testing.assert_allclose(here[name], there[name], rtol=1e-4, atol=1e-6)

    # One is killed: the other ends by itself, and says why.
    pair = _start(weights, two, cache, updates=60, processes=2, devices=4)
    began = _newest(two)
    while _newest(two) < began + 1:
        assert all(process.poll() is None for process in pair), pair[0].communicate()
        time.sleep(0.5)
    pair[1].send_signal(signal.SIGKILL)
    _, errors = pair[0].communicate(timeout=300)
    pair[1].communicate()
    assert pair[0].returncode not in (0, None)
    assert "distributed service" in errors or "lost the others" in errors

    # Other hosts, another mesh: it goes on from what both wrote together.
    done = _newest(two)
    fields = {"mesh.data": 2, "mesh.fsdp": 4}
    ((out, _),) = _finish(_start(weights, two, cache, updates=done + 1, **fields))
    assert f"resumed after update {done} of {done + 1}" in out
