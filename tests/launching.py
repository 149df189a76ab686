"""The launchers as the commands that users run, and how tests compile."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch import xla_flags

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
CONFIG = ROOT / "configs" / "world.py"
# Programs are compiled without LLVM's optimiser and, where it can be left out, without XLA's
# generator of fused kernels: they take most of the time.
QUICK = tuple(
    f"--{flag}={value}"
    for flag, value in (
        ("xla_backend_optimization_level", "0"),
        ("xla_cpu_use_fusion_emitters", "false"),
    )
    if xla_flags.known(flag)
)


def launcher(name: str) -> Any:
    """A module of launch/, which finds its neighbours as it does when it is run as a script."""
    if str(LAUNCH) not in sys.path:
        sys.path.insert(0, str(LAUNCH))
    return importlib.import_module(name)


def environment(devices: int = 0, **changes: str) -> dict[str, str]:
    """That of a launcher on a CPU, as so many emulated devices (0: as many as it makes itself)."""
    flags = list(QUICK)
    if devices:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}
    return os.environ | own | changes


def launch(
    script: str,
    *arguments: str,
    variant: str = "",
    devices: int = 0,
    stdin: str = "",
    **changes: str,
) -> subprocess.CompletedProcess:
    """Runs launch/<script>.py with a variant of configs/world.py; `changes` are of the
    environment."""
    config = f"--config={CONFIG}" + (f":{variant}" if variant else "")
    return subprocess.run(
        [sys.executable, str(LAUNCH / f"{script}.py"), config, *arguments],
        cwd=ROOT, env=environment(devices, **changes), input=stdin, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def ran(script: str, *arguments: str, **options: Any) -> str:
    """The standard output of a launcher that has to end well."""
    done = launch(script, *arguments, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def fields(changes: dict[str, Any]) -> list[str]:
    """Flags for fields of the config."""
    return [f"--config.{name}={value}" for name, value in changes.items()]
