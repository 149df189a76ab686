"""launch/tpu_pod.sh with a host played by a folder: it starts the trainer once, and again when that
has ended."""

import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "tpu_pod.sh"
# The host's shell gets the command as ssh gives it: in its own command line.
GCLOUD = """#!/bin/bash
for word in "$@"; do case $word in --command=*) command=${word#--command=};; esac; done
cd "$HOST" && exec bash -c "$command"
"""
PYTHON = """#!/bin/bash
echo "$$ $*" >>started
exec sleep 60
"""


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _wait_for(lines: Path, count: int) -> list[str]:
    for _ in range(100):
        if lines.exists() and lines.read_text().count("\n") >= count:
            break
        time.sleep(0.05)
    return lines.read_text().splitlines()


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is of util-linux")
def test_a_host_that_runs_is_left_alone_and_one_that_ended_starts_again(tmp_path):
    home = tmp_path / "worldr1_jax"
    _program(tmp_path / "bin" / "gcloud", GCLOUD)
    _program(home / ".venv" / "bin" / "python", PYTHON)
    _program(home / ".venv" / "bin" / "pip", "#!/bin/bash\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOST": str(tmp_path), "TPU": "t", "ZONE": "z"}
    command = ["bash", str(SCRIPT), "--config=configs/world.py:large", "--config.prompts=a b"]

    def start() -> str:
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout

    started = home / "started"
    try:
        assert "already" not in start()
        (first,) = _wait_for(started, 1)
        wanted = "launch/tpu_train.py --distributed --config=configs/world.py:large"
        assert first.split(" ", 1)[1] == f"{wanted} --config.prompts=a b"
        assert "already running" in start()
        assert len(started.read_text().splitlines()) == 1
        os.kill(int(first.split()[0]), signal.SIGKILL)
        while "already" in start():
            time.sleep(0.05)
        assert len(_wait_for(started, 2)) == 2
    finally:
        for line in started.read_text().splitlines():
            try:
                os.kill(int(line.split()[0]), signal.SIGKILL)
            except ProcessLookupError:
                continue  # the one that was killed above
