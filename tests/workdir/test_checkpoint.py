"""Checkpoints: bit-equal on any mesh, whole or absent after a kill, damage named."""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from worldr1_jax.weights import orbax
from worldr1_jax.workdir.checkpoint import (
    Checkpointer,
    check_workdir,
    compare_config,
    write_config,
)
from worldr1_jax.workdir.lock import Lock
from worldr1_jax.workdir.metrics import MetricsWriter


def _abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def _assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _mesh(*shape):
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@functools.cache
def _small_state():
    adapters = nnx.state(nnx.Linear(8, 16, rngs=nnx.Rngs(0)))
    return {
        "adapters": adapters,
        "opt_state": optax.adamw(1e-3).init(adapters),
        "ema": jax.random.normal(jax.random.key(1), (8, 16), jnp.bfloat16),
        "step": jnp.int32(3),
    }


def test_restores_onto_another_mesh_bit_equal(tmp_path):
    here = NamedSharding(_mesh(4, 2), P("data", "fsdp"))
    spread = jax.tree.map(lambda x: jax.device_put(x, here) if x.ndim == 2 else x, _small_state())
    meta = {"key": np.asarray(jax.random.key_data(jax.random.key(5))).tolist(), "seed": 5}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, spread, {"update": 3}, meta)
    there = NamedSharding(_mesh(1, 8), P())
    with Checkpointer(tmp_path) as checkpointer:
        step, state, data, restored_meta = checkpointer.restore_latest(
            _abstract(_small_state(), there)
        )
    assert (step, data, restored_meta) == (3, {"update": 3}, meta)
    _assert_same_bits(state, _small_state())
    assert all(leaf.sharding == there for leaf in jax.tree.leaves(state))


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    weights = jnp.arange(1_000_000, dtype=jnp.float32)
    expected = {"w": np.array(weights)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": weights}, {}, {})
        for _ in range(5):
            weights = advance(weights)
        weights.block_until_ready()
        restored = checkpointer.restore_latest(_abstract({"w": weights}))
    _assert_same_bits(restored.state, {"w": jnp.asarray(expected["w"])})


def test_keeps_the_newest_and_refuses_to_go_back(tmp_path):
    state = {"w": jnp.zeros(3)}
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.restore_latest(_abstract(state)) is None
        for step in (1, 2, 5):
            checkpointer.save(step, state, {}, {})
        assert checkpointer.latest_step() == 5
        for step in (4, 5):
            with pytest.raises(ValueError, match="steps must grow"):
                checkpointer.save(step, state, {}, {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="is a URL"):
        Checkpointer("gs://bucket/run")
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="key_data"):
        checkpointer.save(1, {"key": jax.random.key(0)}, {}, {})


def test_another_model_is_told_apart_from_damage(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros((2, 3)), "old": jnp.zeros(1)}, {}, {})
        with pytest.raises(ValueError, match="does not fit") as error:
            checkpointer.restore_latest(
                _abstract({"w": jnp.zeros((2, 4)), "new": jnp.zeros(1, jnp.int32)})
            )
    for part in ("float32[2, 3] there and float32[2, 4] here", "['old'] is", "int32[1] here"):
        assert part in str(error.value)


# --------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, _random_state(1), {"update": 1}, {})
        checkpointer.save(2, _random_state(2), {"update": 2}, {})
    return folder


def _random_state(step, size=10_000):
    return {"w": jax.random.normal(jax.random.key(step), (size,)), "step": jnp.int32(step)}


def _largest(checkpoint):
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate(checkpoint):
    path = _largest(checkpoint)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_one_bit(checkpoint):
    path = _largest(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut_json(checkpoint):
    (checkpoint / "meta" / "metadata").write_text('{"us')


def _lose_state(checkpoint):
    shutil.rmtree(checkpoint / "state")


def _empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize("damage", [_truncate, _flip_one_bit, _cut_json, _lose_state, _empty])
def test_damage_is_an_error_that_names_the_folder(two_checkpoints, tmp_path, damage):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    newest = workdir / "checkpoints" / "2"
    damage(newest)
    with Checkpointer(workdir) as checkpointer:
        with pytest.raises(ValueError, match="damaged") as error:
            checkpointer.restore_latest(_abstract(_random_state(0)))
        assert str(newest) in str(error.value) and "\n" not in str(error.value)
        shutil.rmtree(newest)  # what the message says to do
        restored = checkpointer.restore_latest(_abstract(_random_state(0)))
    assert restored.step == 1 and restored.data == {"update": 1}
    _assert_same_bits(restored.state, _random_state(1))


@pytest.mark.parametrize("name", ["7.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-12", "notes"])
def test_unfinished_and_foreign_folders_are_passed_over(two_checkpoints, tmp_path, name):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    shutil.copytree(workdir / "checkpoints" / "2", workdir / "checkpoints" / name)
    shutil.rmtree(workdir / "checkpoints" / name / "state")
    with Checkpointer(workdir) as checkpointer:
        assert checkpointer.restore_latest(_abstract(_random_state(0))).step == 2


# ---------------------------------------------------------------------------------- kills

_KILLED_SIZE = 1_000_000


def _save_until_killed(workdir, saving):
    """Resumes and saves one step after another, saying before each which one it begins."""
    with Checkpointer(workdir, keep=2) as checkpointer:
        restored = checkpointer.restore_latest(_abstract(_random_state(0, _KILLED_SIZE)))
        step = restored.step if restored else 0
        while True:
            step += 1
            saving.send(step)
            checkpointer.save(step, _random_state(step, _KILLED_SIZE), {"update": step}, {})


def test_a_killed_save_leaves_the_checkpoint_before_it(tmp_path):
    context = multiprocessing.get_context("forkserver")  # imports once, starts jax in each child
    context.set_forkserver_preload(["tests.workdir.test_checkpoint"])
    done = 0
    for delay in (0.0, 0.03, 0.1):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_save_until_killed, args=(tmp_path, sender), daemon=True)
        child.start()
        for _ in range(3):  # a save is over when the one after the next is announced
            assert receiver.poll(60)
            begun = receiver.recv()
        time.sleep(delay)
        child.kill()
        child.join()
        with Checkpointer(tmp_path) as checkpointer:
            restored = checkpointer.restore_latest(_abstract(_random_state(0, _KILLED_SIZE)))
        assert restored.step >= begun - 2 > done
        assert restored.data == {"update": restored.step}
        _assert_same_bits(restored.state, _random_state(restored.step, _KILLED_SIZE))
        done = restored.step
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(done + 1, {"w": jnp.zeros(1)}, {}, {})
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))  # what the kills left is gone


# --------------------------------------------------------------------- folder of a run, signals


def test_workdir_of_another_config_is_refused_and_left_alone(tmp_path):
    config = {"seed": 0, "num_updates": 10, "train": {"clip": 1e-3, "betas": (0.9, 0.95)}}
    check_workdir(tmp_path, config)
    before = (tmp_path / "config.json").read_bytes()
    check_workdir(tmp_path, before.decode())
    check_workdir(tmp_path, config | {"num_updates": 99}, may_change=("num_updates",))
    check_workdir(tmp_path, config | {"train": {"clip": 1}}, may_change=("train",))
    with pytest.raises(ValueError) as error:
        check_workdir(tmp_path, config | {"num_updates": 99, "train": {"clip": 0.1}, "new": None})
    for part in (
        "num_updates is 10 there and 99 here",
        "train.clip is 0.001 there and 0.1 here",
        "train.betas is [0.9, 0.95] there and absent here",
        "new is absent there and null here",
    ):
        assert part in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_workdir_with_a_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        check_workdir(tmp_path, {})


def test_a_config_is_written_with_the_first_checkpoint(tmp_path):
    """Before it, a folder belongs to nobody; after it, to the config that it began with."""
    config = {"seed": 0, "num_updates": 1}
    compare_config(tmp_path / "new", config)
    assert not (tmp_path / "new").exists()
    for config in ({"seed": 0}, {"seed": 1}):
        compare_config(tmp_path, config)
        with Checkpointer(tmp_path, config=config) as checkpointer:
            assert not (tmp_path / "config.json").exists()
    with Checkpointer(tmp_path, config=config) as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros(3)}, {}, {})
    compare_config(tmp_path, {"seed": 1})
    with pytest.raises(ValueError, match="seed is 1 there and 2 here"):
        compare_config(tmp_path, {"seed": 2})
    write_config(tmp_path, {"seed": 2})
    compare_config(tmp_path, {"seed": 1})


def test_what_a_path_names_counts_and_not_the_path(tmp_path):
    config, contents = {"policy": {"weights": "a", "x": 1}}, {"policy.weights": "hash"}
    write_config(tmp_path, config, contents)
    other = {"policy": {"weights": "b", "x": 1}}
    compare_config(tmp_path, config, (), contents)
    compare_config(tmp_path, other, (), contents)
    with pytest.raises(ValueError, match=r"config: what policy\.weights names has changed; choose"):
        compare_config(tmp_path, config, (), {"policy.weights": "another"})
    with pytest.raises(ValueError, match=r'policy\.weights is "a" there and "b" here'):
        compare_config(tmp_path, other)
    with pytest.raises(ValueError, match=r"policy\.x is 1 there and 2 here"):
        compare_config(tmp_path, {"policy": {"weights": "a", "x": 2}}, (), contents)


def test_a_field_that_is_newer_than_the_folder_has_its_default_there(tmp_path):
    write_config(tmp_path, {"algorithm": {"beta": 0.1}})
    newer, defaults = {"algorithm": {"beta": 0.1, "anchor": 0.0}}, {"algorithm.anchor": 0.0}
    compare_config(tmp_path, newer, defaults=defaults)
    with pytest.raises(ValueError, match=r"algorithm\.anchor is 0\.0 there and 8\.0 here"):
        newer["algorithm"]["anchor"] = 8.0
        compare_config(tmp_path, newer, defaults=defaults)
    with pytest.raises(ValueError, match=r"algorithm\.beta is 0\.1 there and absent here"):
        compare_config(tmp_path, {}, defaults=defaults | {"algorithm.beta": 0.1})


@pytest.mark.parametrize("place", ["file/run", "a" * 300, "loop/run", "gs://bucket/run"])
def test_a_workdir_that_cannot_be_made_is_one_sentence(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    workdir = place if "://" in place else tmp_path / place
    for take in (Checkpointer, lambda path: Lock(path).__enter__(), MetricsWriter):
        with pytest.raises(ValueError, match=r"cannot be made: |is a URL") as error:
            take(workdir)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_disk_that_is_full_is_one_sentence(tmp_path):
    """Files of a limited size stand for one."""
    large = {"a": jnp.arange(2.0**17) * 1.7}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        wanted = r"checkpoints cannot be written: File too large$"
        with pytest.raises(ValueError, match=wanted), Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(1, large, data={}, meta={})
        with pytest.raises(ValueError, match=r"weights cannot be written: File too large$"):
            orbax.save(tmp_path / "weights", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------------------ the lock


HOLD = """
import sys, time
from worldr1_jax.workdir.lock import Lock
with Lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def holder(workdir, seconds=60):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(workdir), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_runs_in_one_folder_are_refused_and_a_dead_ones_lock_is_taken(tmp_path):
    with holder(tmp_path) as process:
        before = (tmp_path / "lock").read_bytes()
        with pytest.raises(
            ValueError, match=rf"is in use by process {process.pid} on .*: wait for"
        ):
            Lock(tmp_path).__enter__()
        assert (tmp_path / "lock").read_bytes() == before
        process.kill()
        process.wait()
        assert (tmp_path / "lock").exists()  # as a killed run leaves it
        with Lock(tmp_path) as lock:
            lock.check()
    assert not list(tmp_path.iterdir())
    with Lock(tmp_path) as lock:
        assert lock.seen().startswith(".seen-")
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    with Lock(tmp_path), pytest.raises(ValueError, match="is in use"):
        Lock(tmp_path).__enter__()


def test_a_lock_of_another_host_counts_while_its_heart_beats(tmp_path):
    path, stopped = tmp_path / "lock", threading.Event()

    def owner(beat):
        return json.dumps({"host": "elsewhere", "pid": 7, "beat": beat})

    def beat():
        with path.open("r+") as file:  # in place, and never empty, as `Lock` has it
            for count in itertools.count(100):
                file.seek(0)
                file.write(owner(count))
                file.flush()
                if stopped.wait(0.05):
                    return

    quick = {"beat": 0.1, "patience": 1.0}
    path.write_text(owner(100))
    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ValueError, match="is in use by process 7 on elsewhere"):
        Lock(tmp_path, **quick).__enter__()
    stopped.set()
    thread.join()
    path.write_text(path.read_text() + "of one that said more")
    with Lock(tmp_path, **quick):
        first = json.loads(path.read_text())
        assert first["host"] != "elsewhere"
        while json.loads(path.read_text()) == first:  # it beats, too
            time.sleep(0.05)
    path.write_text("{")  # half written
    with Lock(tmp_path, **quick):
        pass


def test_a_lock_is_never_seen_without_its_owner(tmp_path):
    """Another host that found it empty would take it."""
    with Lock(tmp_path, beat=1e-4):
        for _ in range(2000):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_is_removed_under_a_run_is_noticed(tmp_path):
    with Lock(tmp_path / "run") as lock:
        lock.check()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(ValueError, match="is gone: the folder was removed"):
            lock.check()
        (tmp_path / "run").mkdir()
        with Lock(tmp_path / "run"), pytest.raises(ValueError, match="is gone"):
            lock.check()
