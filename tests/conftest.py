"""Tests run on the CPU, as eight emulated devices, whatever the machine has.

Programs are compiled without LLVM's optimiser, which takes half of the time. WORLDR1_SHAPES=1
enforces what annotations of the rooms in SHAPED promise about arrays (jaxtyping, beartype).
"""

import os

FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",
}

# Before anything imports JAX or the package.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), *(f"--{name}={value}" for name, value in FLAGS.items())]
)
# For the TPU compiler: nothing here holds a chip, and there is no metadata server to ask.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import pytest  # noqa: E402

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
# Asked for, not the rule: tests that hand over scalars, or that await a function's own error about
# a wrong shape, meet the checker first and fail.
if os.environ.get("WORLDR1_SHAPES"):
    import jaxtyping

    import tests.shapes  # noqa: F401

    jaxtyping.install_import_hook([f"worldr1_jax.{room}" for room in SHAPED], "tests.shapes.check")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The folder of `tiny.save_weights`, for all tests: leave it as it is."""
    from tests import tiny  # which imports the package

    return tiny.save_weights(tmp_path_factory.mktemp("weights"))
