"""The notebooks run from top to bottom, in the order in which they stand."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rewards", "world"])
def test_every_cell_runs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    space = {"__name__": "__main__"}
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(sources) >= 3
    for number, source in enumerate(sources):
        exec(compile(source, f"{name}.ipynb, code cell {number}", "exec"), space)
    assert Path(os.getcwd()) == ROOT
