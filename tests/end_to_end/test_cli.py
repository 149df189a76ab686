"""What every launcher does before the library is called."""

import os
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


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
        "import cli, os; assert not cli._xla_has('xla_no_such_flag'); cli.spread_convolutions(); "
        f"import jax; jax.devices(); has = cli._xla_has('{flag}'); "
        "print(os.environ.get('XLA_FLAGS', '') if has else 'lacks it')"
    )
    own = f"--{flag}=LIBRARY_FUSION_TYPE_DOT"
    for given, want in ((own, own), ("", f"--{flag}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=LAUNCH, capture_output=True, text=True, check=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": given},
        )  # fmt: skip
        assert done.stdout.strip() in (want, "lacks it")
