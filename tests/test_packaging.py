"""What a package says of itself is said once, or the same everywhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import worldr1_jax

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_and_metadata_name_the_same_versions():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").open()]
    extra = PROJECT["optional-dependencies"]["tfds"]
    assert sorted(filter(None, lines)) == sorted([*PROJECT["dependencies"], *extra])


def test_the_version_is_in_the_changelog_and_the_citation():
    released = worldr1_jax.__version__.partition(".dev")[0]
    assert f"## {released}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {released}" in (ROOT / "CITATION.cff").read_text()


def test_training_does_not_need_tensorflow_datasets():
    code = "import sys; sys.modules['tensorflow_datasets'] = None; import worldr1_jax.train"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_launcher_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "worldr1_jax"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    commands = set(re.findall(r"^  (\w+) +\S", done.stdout, re.MULTILINE))
    scripts = {p.stem for p in (ROOT / "launch").glob("*.py") if "cli.run(" in p.read_text()}
    assert commands == (scripts - {"tpu_train"}) | {"train"}
