"""The notebooks run from top to bottom, in the order in which they stand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import environment

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rewards", "world"])
def test_every_cell_runs(name, tmp_path):
    """In a process of its own, as users have it: optimised, on what devices there are."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(sources) >= 3
    whole = "\n\n".join(sources).replace("runs/notebook", str(tmp_path / "run"))
    script = f"{whole}\nassert os.getcwd() == {str(ROOT)!r}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "notebooks", env=environment(XLA_FLAGS=""),
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["rewards", "world"])
def test_the_first_cell_finds_the_package_beside_a_plain_clone(name, tmp_path):
    """As on Colab: the folder above the clone, in which the clone's name hides the package."""
    (tmp_path / "worldr1_jax").symlink_to(ROOT)
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = f"{first}\nimport worldr1_jax\nprint(worldr1_jax.__file__)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()).resolve() == ROOT / "worldr1_jax" / "__init__.py"
