"""The whole loop on tiny random weights: what it writes, kills and resumes, meshes, wrong input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tests import tiny
from tests.launching import environment
from tests.measure import kills
from worldr1_jax import settings, train
from worldr1_jax.mesh import make as meshes
from worldr1_jax.workdir.lock import Lock

ROOT = Path(__file__).parents[2]
UPDATES = 5
SCRIPT = """
import sys
from tests import tiny
from tests.measure import kills
from worldr1_jax import train
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from pathlib import Path
train.run(tiny.config(Path(sys.argv[1]), num_updates=UPDATES), sys.argv[2])
""".replace("UPDATES", str(UPDATES))


@pytest.fixture(scope="module")
def folder(weights):
    return weights


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(folder, workdir, cache):
    command = [sys.executable, "-c", SCRIPT, str(folder), str(workdir), str(cache)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()[-2000:]


def wait_for_lines(workdir, count, process):
    path = Path(workdir) / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or path.read_text().count("\n") < count):
        time.sleep(0.05)


def final_state(workdir):
    manager = ocp.CheckpointManager((Path(workdir) / "checkpoints").absolute())
    step = manager.latest_step()
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))[
        "state"
    ]
    manager.close()
    return step, tiny.leaves(state)


def assert_same_end(workdir, unbroken):
    """The same bits in the last checkpoint, and a line for each update."""
    step, leaves = final_state(workdir)
    want_step, want = final_state(unbroken)
    assert step == want_step == UPDATES
    assert all(np.array_equal(a, b) for a, b in zip(leaves, want, strict=True))
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == list(range(UPDATES))


@pytest.fixture(scope="module")
def unbroken(folder, cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    finish(start(folder, workdir, cache))
    return workdir


def test_a_run_writes_what_people_look_at(unbroken):
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(UPDATES))
    wanted = {
        "reward",
        "recon",
        "trajectory",
        "general",
        "kl",
        "clip_fraction",
        "grad_norm",
        "masked",
    }
    assert (
        wanted <= set(lines[0]) and "seconds/rollout" in lines[0] and "seconds/update" in lines[0]
    )
    assert all(line["grad_norm"] > 0 for line in lines)
    # Two main updates, then one dynamic one without 3D rewards, and again.
    assert [line["dynamic"] for line in lines] == [0, 0, 1, 0, 0]
    assert ["recon" in line for line in lines] == [True, True, False, True, True]
    assert all(line["ratio_deviation_first"] <= 1e-6 for line in lines)
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["updates"] == UPDATES and summary["seed"] == 0
    assert {"epipolar", "epipolar_asked", "change"} <= set(summary["heldout"])
    row = summary["heldout"]["total_3d"]
    assert row["paired_ci95"][0] <= row["after"] - row["before"] <= row["paired_ci95"][1]
    assert list((unbroken / "videos").glob("*.mp4")) and list((unbroken / "videos").glob("*.png"))
    assert list(unbroken.glob("events.out.tfevents*"))
    assert len(list((unbroken / "checkpoints").iterdir())) == 3  # the newest k


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(folder, cache, unbroken, tmp_path):
    """As if the machine had gone while the update after the checkpoint was running."""
    workdir = tmp_path / "cut"
    shutil.copytree(unbroken, workdir)
    for step in (UPDATES - 1, UPDATES):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    (workdir / "summary.json").unlink()
    finish(start(folder, workdir, cache))
    assert_same_end(workdir, unbroken)
    assert json.loads((workdir / "summary.json").read_text())["updates"] == UPDATES


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(folder, cache, unbroken, tmp_path):
    rng = random.Random(0)
    for kill in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        process = start(folder, tmp_path, cache)
        path = tmp_path / "metrics.jsonl"
        done = path.read_text().count("\n") if path.exists() else 0
        # A checkpoint is saved after every update, so a short wait lands within or beside a save.
        wait_for_lines(tmp_path, min(done + 1, UPDATES - 1), process)
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(kill)
        _, errors = process.communicate(timeout=300)
        if kill == signal.SIGTERM:
            assert process.returncode == 0, errors.decode()[-2000:]
    finish(start(folder, tmp_path, cache))
    assert_same_end(tmp_path, unbroken)


@pytest.mark.slow
def test_six_kills_at_random_moments_change_no_bit(folder, tmp_path):
    """`python -m tests.measure.kills` has more of them."""
    assert kills.compare(folder, tmp_path, kills=6)[1] == 0


@pytest.mark.slow
def test_eight_devices_agree_with_one(folder, tmp_path, monkeypatch):
    results = []
    # The one device samples and scores four of its videos at a time; the networks of the eight wait
    # on the host, and two devices share a video.
    runs: list[tuple[int, dict, dict]] = [
        (1, {"data": 1}, {"sample.videos_at_once": 4}),
        (
            8,
            {"data": 2, "fsdp": 2, "context": 2},
            {"idle_on_host": ("text", "vae", "policy", "rewards")},
        ),
    ]
    for count, sizes, changes in runs:
        make = meshes.make_mesh

        def on_some(*_, count=count, sizes=sizes, make=make):
            return make(sizes, jax.devices()[:count])

        monkeypatch.setattr(meshes, "make_mesh", on_some)
        config = tiny.config(folder, num_updates=3, **{"evaluate.prompts": 0}, **changes)
        train.run(config, str(tmp_path / str(count)))
        monkeypatch.setattr(meshes, "make_mesh", make)
        results.append(final_state(tmp_path / str(count))[1])
        lines = (tmp_path / str(count) / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["grad_norm"] > 0 for line in lines)
    # Adam divides by the root of tiny squared gradients, so rounding of 1e-7 in them shows up
    # larger.
    for a, b in zip(*results, strict=True):
        assert np.allclose(a, b, atol=1e-5), np.abs(a - b).max()


def loop(monkeypatch, one_update, lock, workdir, saved):
    """Two updates of `train.learn` with nothing in them but `one_update`."""
    keeper = SimpleNamespace(
        saved=0, loader=None, lock=lock, settled=lambda: saved[-1],
        watcher=train.Watcher(settings.Watch()), save=lambda done, state: saved.append(done),
    )  # fmt: skip
    monkeypatch.setattr(train, "one_update", one_update)
    run = SimpleNamespace(num_updates=2, checkpoint_every=1, fps=8.0)
    programs = SimpleNamespace(
        settings=SimpleNamespace(run=run, rewards=SimpleNamespace(reported=tuple)),
        pipeline=SimpleNamespace(base=nnx.State({})), mesh=meshes.make_mesh({}, jax.devices()[:1]),
    )  # fmt: skip
    train.learn(programs, SimpleNamespace(adapters={}), 0, keeper, str(workdir))


def test_a_stop_in_the_last_stage_comes_before_the_report(monkeypatch, tmp_path):
    """Which at full size takes hours."""

    def one_update(programs, state, loader, update, timer, *, between):
        between()
        if update == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return state, train.Outcome(None, {}, None, {"reward": 0.0})

    saved = []
    with pytest.raises(train.Stopped):
        loop(monkeypatch, one_update, SimpleNamespace(check=lambda: None), tmp_path, saved)
    assert saved[-1] == 2


def test_a_run_whose_folder_was_taken_writes_nothing_there(monkeypatch, tmp_path):
    """`rm -r` of a run, and another in the same place: its metrics are its own."""
    workdir = tmp_path / "run"

    def one_update(programs, state, loader, update, timer, *, between):
        if update == 1:
            shutil.rmtree(workdir)
            workdir.mkdir()
        return state, train.Outcome(None, {}, None, {"reward": 0.0})

    saved = []
    with Lock(workdir) as lock, pytest.raises(ValueError, match="the folder was removed"):
        loop(monkeypatch, one_update, lock, workdir, saved)
    assert saved == [1] and not (workdir / "metrics.jsonl").exists()


def wrong_prompts(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 6}, r"frames is 6: it has to be 1 \+ 4 k"),
        ({"height": 40}, "height is 40: it has to be a multiple of 16"),
        ({"policy.weights": "nowhere"}, "'nowhere'"),
        ({"rewards.reconstruct.da3": "nowhere"}, "'nowhere'"),
        ({"groups": 3, "mesh.data": 8}, "cannot divide"),
        ({"mesh.data": 3}, "needs 3 devices"),
        ({"algorithm.window_range": (0, 4)}, "must stay deterministic"),
        ({"algorithm.sde": "ddim"}, "sde is 'ddim'"),
        ({"camera.mode": "sometimes"}, "camera.mode is 'sometimes'"),
        ({"algorithm.clip": 0.0}, "clip is 0.0"),
        ({"train.learning_rate": float("nan")}, "learning_rate is nan"),
        ({"advantage.std": "median"}, "advantage.std is 'median'"),
        ({"num_updates": 0}, "num_updates is 0"),
        ({"idle_on_host": ("dit",)}, "idle_on_host names 'dit'"),
        ({"rewards.general": {"beauty": 1.0}}, "'beauty'"),
    ],
)
def test_wrong_fields_stop_before_anything_is_written(folder, tmp_path, changes, message):
    changes = {"mesh.data": 8} | changes
    with pytest.raises(ValueError, match=message) as error:
        train.run(tiny.config(folder, **changes), str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"A red box.\n\nCamera zoom in. A blue box.\n", "line 3"),
    ],
)
def test_wrong_prompt_files_are_refused(folder, tmp_path, content, message):
    prompts = wrong_prompts(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        train.run(tiny.config(folder, prompts=prompts, **{"mesh.data": 8}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_refused_and_kept(folder, unbroken, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in unbroken.rglob("*") if p.is_file()}
    make = meshes.make_mesh
    monkeypatch.setattr(meshes, "make_mesh", lambda *_: make({"data": 1}, jax.devices()[:1]))
    with pytest.raises(ValueError, match="seed is 0 there and 7 here"):
        train.run(tiny.config(folder, seed=7), str(unbroken))
    assert before == {p: p.stat().st_mtime_ns for p in unbroken.rglob("*") if p.is_file()}


def slow(*arguments):
    """A case that starts one process more."""
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/world.py:huge"], "'huge': use one of nano, small, large"),
        slow(["--config=configs/world.py", "--config.prompts="], "prompts is empty"),
        slow(["--config=configs/world.py", "--config.train.lr=3"], "has no field train.lr"),
        slow(["--config=configs/nope.py"], "configs/nope.py, which is no file"),
        slow([], "--config is missing"),
    ],
)
def test_the_launcher_answers_in_one_sentence(arguments, message, tmp_path):
    command = [sys.executable, "launch/tpu_train.py", *arguments, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
