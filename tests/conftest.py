"""Tests run on the CPU, as eight emulated devices, whatever the machine has.

What annotations of the rooms in SHAPED promise about arrays is enforced (shapes.py).
"""

import os
import time

from tests.launching import QUICK

# Before anything imports JAX or the package.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", *QUICK]
)
# For the TPU compiler: nothing here holds a chip, and there is no metadata server to ask.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jaxtyping
import pytest

import tests.shapes  # noqa: F401

# Rooms of the mathematics; networks speak of one letter's sizes before and after a layer.
SHAPED = (
    "algorithms",
    "camera",
    "episode",
    "evaluation",
    "geometry",
    "rewards",
    "rollout",
    "splat",
)
jaxtyping.install_import_hook([f"worldr1_jax.{room}" for room in SHAPED], "tests.shapes.check")


def pytest_addoption(parser, pluginmanager):
    """Without pytest-xdist (-p no:xdist), what pyproject.toml says to it says nothing."""
    if not pluginmanager.hasplugin("xdist"):
        for option in ("--numprocesses", "--dist"):
            parser.addoption(option, help="needs pytest-xdist")


@pytest.fixture(scope="session")
def worker_id(request):
    """Which process this is, as pytest-xdist names it."""
    return getattr(request.config, "workerinput", {"workerid": "master"})["workerid"]


@pytest.fixture
def one_device(monkeypatch):
    """Runs see one device, which `tiny.config` asks for."""
    import jax

    from worldr1_jax.mesh import make

    whole = make.make_mesh
    monkeypatch.setattr(make, "make_mesh", lambda sizes, *_: whole(sizes, jax.devices()[:1]))


@pytest.fixture(scope="session")
def weights(tmp_path_factory, worker_id):
    """The folder of `tiny.save_weights`, for all tests of all processes: leave it as it is."""
    from tests import tiny  # which imports the package

    own = tmp_path_factory.mktemp("weights")
    if worker_id == "master":
        return tiny.save_weights(own)
    shared = tmp_path_factory.getbasetemp().parent / "weights"
    try:
        shared.mkdir()
    except FileExistsError:  # another process is at it
        for _ in range(1200):
            if (shared / "whole").exists():
                return (shared / "whole").resolve()
            time.sleep(0.1)
        raise TimeoutError(f"no weights in {shared} within two minutes") from None
    (shared / "whole").symlink_to(tiny.save_weights(own))
    return own
