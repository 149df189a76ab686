"""Two processes of four devices: the run of one process of eight; one is killed, hangs, is told to
stop or was given something else, and both end, and the same command goes on; a checkpoint keeps its
bits on other meshes and numbers of processes."""

import json
import math
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.launching import ROOT, environment
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.workdir.checkpoint import Checkpointer

FIELDS = {
    "frames": 5, "height": 32, "width": 32, "groups": 2, "group_size": 4, "checkpoint_every": 1,
    "sample.steps": 3, "algorithm.window": 1, "algorithm.window_range": "(0,2)",
    "rewards.recon.views": 2, "evaluate.prompts": 0, "videos_every": 100, "mesh.data": 4,
    "mesh.fsdp": 2, "rewards.weights.recon": 1.0,
}  # fmt: skip


# Leaves of every kind that a train state has, and where they lie.
STATE = {
    "kernel": ((16, 24), "float32", (("fsdp", "context"), None)),
    "stacked": ((3, 8, 8), "bfloat16", (None, None, "data")),
    "bias": ((5,), "float32", ()),
    "step": ((), "int32", ()),
}
SAVE_OR_RESTORE = """
import sys
import jax
port, process, task, folder, data, fsdp = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from tests.end_to_end import test_many_hosts as hosts
mesh = {"data": int(data), "fsdp": int(fsdp), "context": -1}
(hosts.save if task == "save" else hosts.restore)(folder, mesh)
"""


def values() -> dict[str, np.ndarray]:
    """The state: random bits, NaNs among them."""
    words = np.random.default_rng(0)
    return {
        name: np.frombuffer(
            words.bytes(math.prod(shape) * jnp.dtype(dtype).itemsize), jnp.dtype(dtype)
        ).reshape(shape)
        for name, (shape, dtype, _) in STATE.items()
    }


def places(sizes: dict[str, int]) -> dict[str, jax.sharding.NamedSharding]:
    """Where each leaf lies on a mesh."""
    mesh = make_mesh(sizes)
    return {
        name: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for name, (_, _, axes) in STATE.items()
    }


def save(folder: str, sizes: dict[str, int]) -> None:
    """Writes the state from the processes there are."""
    where = places(sizes)
    state = {name: arrays.to_global(x, where[name]) for name, x in values().items()}
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(1, state, data={}, meta={})


def restore(folder: str, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Restores it onto the processes there are, and writes what they hold."""
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places(sizes)[name])
        for name, x in values().items()
    }
    with Checkpointer(folder) as checkpoints:
        restored = checkpoints.restore_latest(abstract)
    assert restored is not None
    for name, leaf in restored.state.items():
        assert leaf.sharding == places(sizes)[name]
    held = {name: arrays.to_host(leaf) for name, leaf in restored.state.items()}
    if jax.process_count() > 1 and jax.process_index() == 0:
        np.savez(Path(folder) / "held.npz", **{n: _bits(x) for n, x in held.items()})
    return held


def _bits(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), np.uint8)


def _two_processes(task, folder, data, fsdp):
    """Runs `save` or `restore` in two processes of four devices, compiled as for users: with the
    flags of tests, the CPU quiets bfloat16's signalling NaNs, and bits change."""
    port = _free_port()
    users = environment(XLA_FLAGS="--xla_force_host_platform_device_count=4")
    _finish(
        [
            subprocess.Popen(
                [sys.executable, "-c", SAVE_OR_RESTORE, str(port), str(process), task, str(folder),
                 str(data), str(fsdp)],
                env=users, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for process in range(2)
        ]
    )  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_restored_bit_for_bit_by_one(tmp_path):
    _two_processes("save", tmp_path, data=2, fsdp=4)
    held = restore(str(tmp_path), {"data": 4, "fsdp": 1, "context": 2})
    for name, wanted in values().items():
        assert held[name].dtype == wanted.dtype
        np.testing.assert_array_equal(_bits(held[name]), _bits(wanted), err_msg=name)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_is_restored_bit_for_bit_by_two(tmp_path):
    save(str(tmp_path), {"data": 8})
    _two_processes("restore", tmp_path, data=1, fsdp=8)
    with np.load(tmp_path / "held.npz") as held:
        for name, wanted in values().items():
            np.testing.assert_array_equal(held[name], _bits(wanted), err_msg=name)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _start(
    weights, workdir, cache, *, updates, processes=1, devices=8, second=(), elsewhere=None,
    heartbeat=60, **fields,
):  # fmt: skip
    """Starts the launcher once a process and returns the processes; `second` are fields of process
    1 alone, `elsewhere` its workdir."""
    port = _free_port()
    common = {
        **FIELDS, "policy.weights": weights, "rewards.reconstruct.da3": weights / "da3",
        "num_updates": updates, **fields,
    }  # fmt: skip
    started = []
    for process in range(processes):
        settings = common | (dict(second) if process == 1 else {})
        command = [
            sys.executable, str(ROOT / "launch" / "tpu_train.py"),
            f"--config={ROOT / 'configs' / 'world.py'}:nano,grpo", 
            f"--workdir={elsewhere if process == 1 and elsewhere else workdir}",
            f"--compilation_cache={cache}", f"--heartbeat={heartbeat}",
            *(f"--config.{name}={value}" for name, value in settings.items()),
        ]  # fmt: skip
        if processes > 1:
            command += [
                "--distributed", f"--coordinator=localhost:{port}", f"--processes={processes}",
                f"--process={process}",
            ]  # fmt: skip
        started.append(
            subprocess.Popen(
                command, env=environment(devices), cwd=ROOT, text=True,
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, which these tests share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_and_resume_after_one_is_killed(weights, cache, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    # 3 prompts, in batches of as many as the mesh can divide: 4, with a filler
    report = {"evaluate.prompts": 3, "evaluate.samples": 2, "evaluate.batch": 2}
    _finish(_start(weights, one, cache, updates=2, **report))
    outputs = _finish(_start(weights, two, cache, updates=2, processes=2, devices=4, **report))
    assert "update" in "".join(outputs[0])
    assert "reward" not in "".join(outputs[1])  # only process 0 reports
    assert all(line["grad_norm"] > 0 for line in _metrics(one))
    for here, there in zip(_metrics(one), _metrics(two), strict=True):
        for name in ("reward", "recon", "trajectory", "general", "kl", "grad_norm"):
            # The same programs on the same mesh; sums between processes take another order.
            np.testing.assert_allclose(here[name], there[name], rtol=1e-4, atol=1e-6)
    here, there = (json.loads((d / "summary.json").read_text())["heldout"] for d in (one, two))
    for name in ("general", "diversity", "psnr"):
        assert here[name]["pairs"] == there[name]["pairs"] == 3
        for when in ("before", "after"):
            np.testing.assert_allclose(here[name][when], there[name][when], rtol=1e-3)

    # One is killed: the other ends by itself, and says why.
    pair = _running(weights, two, cache)
    pair[1].send_signal(signal.SIGKILL)
    _, errors = pair[0].communicate(timeout=300)
    pair[1].communicate()
    assert pair[0].returncode == 1 and "Traceback" not in errors, errors[-4000:]
    assert "this host lost the others" in errors or "host 1 has been silent" in errors

    # Other hosts, another mesh: it goes on from what both wrote together.
    done = _newest(two)
    fields = {"mesh.data": 2, "mesh.fsdp": 4}
    ((out, _),) = _finish(_start(weights, two, cache, updates=done + 1, **fields))
    assert f"resumed after update {done} of {done + 1}" in out


def _running(weights, workdir, cache):
    """Two processes that have written a checkpoint, and have many updates before them."""
    pair = _start(weights, workdir, cache, updates=200, processes=2, devices=4)
    began = _newest(workdir)
    while _newest(workdir) < began + 1:
        assert all(process.poll() is None for process in pair), pair[0].communicate()
        time.sleep(0.5)
    return pair


@pytest.mark.slow
def test_two_processes_stop_together_and_one_that_hangs_ends_the_other(weights, cache, tmp_path):
    run = tmp_path / "run"
    pair = _running(weights, run, cache)
    pair[1].send_signal(signal.SIGTERM)  # process 0 hears of it from process 1
    (out, _), _ = _finish(pair)
    assert f"stopped after update {_newest(run)}; the same command goes on" in out

    pair = _running(weights, run, cache)
    pair[1].send_signal(signal.SIGSTOP)
    try:
        _, errors = pair[0].communicate(timeout=300)
    finally:
        pair[1].kill()
        pair[1].communicate()
    assert pair[0].returncode == 1 and "Traceback" not in errors, errors[-4000:]
    assert "error: host 1 has been silent for 60 seconds, and no host goes on" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"seed": 1}, "hosts differ in their config: host {} has another one than host {}"),
        ({"frames": 6}, "frames is 6: it has to be 1 + 4 k"),
    ],
)
def test_processes_that_were_given_something_else_end_before_they_load(
    weights, cache, tmp_path, second, message
):
    run = tmp_path / "run"
    pair = _start(weights, run, cache, updates=2, processes=2, devices=4, second=second)
    for process, (_, errors) in enumerate(_finish(pair, code=1)):
        assert message.format(process, 1 - process) in errors or (
            f"host {1 - process} has ended: {message.format(1 - process, process)}" in errors
        ), errors
        assert "Traceback" not in errors and len(errors.strip().splitlines()) == 1, errors
    assert not run.exists()


@pytest.mark.slow
def test_processes_that_do_not_see_one_workdir_end_before_they_load(weights, cache, tmp_path):
    pair = _start(
        weights, tmp_path / "run", cache, updates=2, processes=2, devices=4,
        elsewhere=tmp_path / "other",
    )  # fmt: skip
    said = "hosts differ in their workdir, which has to be a folder that all of them see"
    for _, errors in _finish(pair, code=1):
        assert said in errors and "Traceback" not in errors, errors
    assert not list(tmp_path.glob("*/checkpoints/[0-9]*"))
