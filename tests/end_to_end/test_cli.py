"""What every launcher does before the library is called."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from configs import world
from worldr1_jax.algorithms import base as algorithms
from worldr1_jax.algorithms.base import ALGORITHMS

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))
import config_help  # noqa: E402


def devices(divides: str, **environment: str) -> int:
    """Devices that a fresh process sees after `use_cpu_well`."""
    code = f"import cli; cli.use_cpu_well({divides}); import jax; print(jax.device_count())"
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=LAUNCH, capture_output=True, text=True, check=True,
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip
    return int(done.stdout)


def test_a_device_for_each_core_that_the_videos_divide():
    cores = len(os.sched_getaffinity(0))
    assert devices("32, 48") == max(n for n in range(1, cores + 1) if 16 % n == 0)
    assert devices("7, 32") == 1


def test_the_number_of_devices_that_a_user_asks_for_stays():
    assert devices("32", XLA_FLAGS="--xla_force_host_platform_device_count=3") == 3


def test_xla_is_asked_before_it_is_given_a_flag():
    """A flag that the library lacks would end the process; a user's own choice stays."""
    flag = "xla_cpu_experimental_ynn_fusion_type"
    code = (
        "import cli, os, xla_flags; assert not xla_flags.known('xla_no_such_flag'); "
        f"assert not xla_flags.known('{flag[:-1]}'); cli.spread_convolutions(); "
        f"import jax; jax.devices(); has = xla_flags.known('{flag}'); "
        "print(os.environ.get('XLA_FLAGS', '') if has else 'lacks it')"
    )
    own = f"--{flag}=LIBRARY_FUSION_TYPE_DOT"
    for given, want in ((own, own), ("", f"--{flag}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=LAUNCH, capture_output=True, text=True, check=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": given},
        )  # fmt: skip
        assert done.stdout.strip() in (want, "lacks it")


def test_there_is_a_test_of_every_launcher():
    scripts = {path.stem for path in LAUNCH.glob("*.py")} - {"cli", "config_help", "xla_flags"}
    tests = Path(__file__).with_name("test_launchers.py").read_text("utf-8")
    assert not [script for script in scripts if f'"{script}"' not in tests]


# -- help and wrong input


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(LAUNCH / f"{script}.py"), *arguments],
        capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def helped():
    done = launch("score", "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_names_every_field_with_its_value_and_comment(helped):
    for name, value in config_help.fields(world.get_config("nano")):
        assert f"--config.{name}={value}" in helped
    (line,) = (line for line in helped.splitlines() if "--config.checkpoint_every=" in line)
    assert line.split() == ["--config.checkpoint_every=8", "updates"]
    assert "--workdir=runs/scores" in helped and "--pictures=False" in helped


def test_every_field_has_a_comment():
    said = config_help.comments(LAUNCH.parent / "configs" / "world.py")
    known = [name for name, _ in config_help.fields(world.get_config("nano"))]
    plain = {"variant", "sample.negative_prompt"}  # whose names say it all
    bare = {name for name in known if not config_help.key(name, said)}
    assert bare <= plain


def test_comments_are_read_in_the_files_own_encoding(tmp_path):
    path = tmp_path / "config.py"
    path.write_bytes(b"# coding: latin-1\nc.seed = 3  # caf\xe9\n")
    assert config_help.comments(path) == {"seed": config_help.Comment("caf\u00e9", 3)}


def test_a_comment_is_that_of_the_field_whatever_a_variant_makes_of_it(tmp_path):
    """A value that a variant changes is not marked with the source of another, and a comment on why
    it does so is not what the field means."""
    path = tmp_path / "config.py"
    path.write_text(
        "c.steps = 50  # T [paper]\n"
        "c.rank, c.alpha = 32, 64.0  # of adapters [paper]\n"
        "# counts [paper], or not\n"
        "c.weights = ConfigDict({'recon': 1.0})\n"
        "for name in ('hps', 'pick'):\n"
        "    c.rewards[name] = judge = ConfigDict()\n"
        "    judge.fit = 'pad'  # to a square\n"
        "c.steps, c.rank = 10, 32\n"
        "# here for reasons of size\n"
        "c.weights.recon = 0.0\n"
        "c.rewards.hps.fit = 'squeeze'  # small\n"
    )
    values = {"steps": 10, "rank": 32, "weights": {"recon": 0.0}, "rewards": {"hps": {"fit": 1}}}
    text = config_help.describe(path, ml_collections.ConfigDict(values), {"rank": "its meaning"})
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "--config.steps=10 T",
        "--config.rank=32 its meaning",
        "--config.weights.recon=0.0 counts [paper], or not",
        "--config.rewards.hps.fit=1 to a square",
    ]


def test_an_algorithms_fields_mean_what_its_class_says():
    for name in ALGORITHMS:
        found = config_help.attributes(algorithms.load(name))
        assert set(algorithms.section(name)) - {"name"} <= set(found), name
    nft, grpo = (config_help.attributes(algorithms.load(name)) for name in ("nft", "grpo"))
    assert nft["kl_weight"].startswith("of `mean") and nft["kl_weight"].endswith("measures it")
    assert grpo["kl_weight"].startswith("beta") and nft["sharpness"] == nft["margin"]


def test_what_a_wrong_flag_may_have_meant():
    config = world.get_config("nano")
    wanted = {"steps": "sample.steps", "config.sample.stepz": "sample.steps", "zzz": ""}
    assert {word: config_help.nearest(word, config) for word in wanted} == wanted


CONFIG = f"--config={LAUNCH.parent / 'configs' / 'world.py'}"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--steps=3"], {}, "--steps is no flag: do you mean --config.sample.steps?"),
        (["--config.sample.stepz=3"], {}, "the config has no field sample.stepz: do you mean"),
        (["--prompt="], {}, "--prompt is empty: give it a value, or leave it out"),
        ([], {"JAX_PLATFORMS": "abacus"}, "JAX_PLATFORMS names 'abacus'"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, environment, message):
    done = launch("score", CONFIG, *arguments, **environment)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("open('/nowhere/at/all')", "/nowhere/at/all: No such file or directory"),
        ("open('/dev/null/x', 'w')", "/dev/null/x: Not a directory"),
        (
            "__import__('worldr1_jax.files').files.check_writable('/proc/self')",
            "/proc/self cannot be written to: No such file or directory",
        ),
        ("(_ for _ in ()).throw(ValueError('long ' * 10**5))", "long long"),
    ],
)
def test_what_a_path_or_value_raises_is_one_short_sentence(body, message, tmp_path):
    code = f"import sys; sys.argv[1:] = [{CONFIG!r}]; import cli; cli.run(lambda: {body})"
    done = subprocess.run([sys.executable, "-c", code], cwd=LAUNCH, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 700


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "ctrl-C"]
)
def test_a_launcher_that_is_stopped_says_so_in_one_line(number, status):
    """Wherever it is; training has a way of its own (workdir/stop.py)."""
    body = "import time; print('at work', flush=True); time.sleep(60)"
    code = f"import sys; sys.argv[1:] = [{CONFIG!r}]; import cli; cli.run(lambda: exec({body!r}))"
    done = subprocess.Popen(
        [sys.executable, "-c", code], cwd=LAUNCH, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert done.stdout.readline() == "at work\n"
    done.send_signal(number)
    _, said = done.communicate(timeout=60)
    assert done.returncode == status
    assert said.strip() == "stopped; what is on disk is whole, and training goes on from there"


def test_a_config_file_that_is_no_python_is_named(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("x = (\n")
    done = launch("score", f"--config={broken}")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {broken} line 1 is no Python")


def test_what_a_config_file_may_end_in_is_one_sentence(tmp_path):
    """Of its own code, with the line; and of one that returns something else."""
    # Before 3.11.4 Python calls a NUL a wrong value, and no wrong syntax.
    kind = " is no Python" if sys.version_info >= (3, 11, 4) else ""
    bodies = {
        "import nowhere": " line 1: ModuleNotFoundError: No module named 'nowhere'",
        "def get_config():\n  return {}['k']": " line 2: KeyError: 'k'",
        "def get_config():\n  pass": ": get_config returns no config: begin with a copy of",
        "x = 3": " has no get_config",
        "x = '\0'": f"{kind}: source code string cannot contain null bytes",
    }
    paths = [tmp_path / f"{number}.py" for number in range(len(bodies))]
    for path, body in zip(paths, bodies, strict=True):
        path.write_text(body)
    code = (
        "import cli, contextlib\n"
        f"for path in {list(map(str, paths))}:\n"
        "  with contextlib.suppress(SystemExit): cli._load(path)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=LAUNCH, capture_output=True, text=True)
    for said, path, want in zip(done.stderr.splitlines(), paths, bodies.values(), strict=True):
        assert said.startswith(f"error: {path}{want}")


def test_a_start_on_an_empty_machine_names_all_that_is_missing(tmp_path):
    done = launch("tpu_train", f"{CONFIG}:small", f"--workdir={tmp_path}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    for field in ("policy.weights", "rewards.recon.lpips", "rewards.reconstruct.da3"):
        assert field in done.stderr, done.stderr
