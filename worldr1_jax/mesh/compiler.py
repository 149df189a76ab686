"""What the TPU compiler is told: its flags, and `Jit` for programs of a mesh."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from worldr1_jax.mesh.chips import GENERATIONS

# What the launchers and the planner tell the TPU compiler.
# - Weights are gathered whole, behind other work. Left to itself, the compiler multiplies by one
#   device's part of a kernel after the other and adds up the results in HBM, in several passes over
#   all tokens. (A gather in the model's own words would be kept, of all layers, for the backward
#   pass.)
# - A program may use more of a core's memory, of which 16 or 32 MiB are the default: products of
#   matrices get larger blocks. By the compiler's own estimate, the largest of Wan 14B takes a v5p
#   10.2 ms in place of 11.6 forward, and 10.4 in place of 16.0 backward.
FLAGS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_tpu_scoped_vmem_limit_kib": "49152",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
# For programs of convolutions: with more of a core's memory the compiler searches several times as
# long for each, and finds one that is 0 to 6% faster by its own estimate. The forward half of
# splash attention, which Depth Anything 3 has beside its convolutions, fits into it.
CONVOLUTIONS = {"xla_tpu_scoped_vmem_limit_kib": "16384"}
# Tokens are exchanged for heads (attention_context.py) behind other work, where the compiler knows
# how to. It refuses on v5e; v4 was not tried. Of 14B's layer on four v6e it hides 1.0 of 23.4 ms by
# the plan.
EXCHANGES = {"xla_tpu_enable_async_all_to_all": "true"}
_HIDES_EXCHANGES = ("v5p", "v6e", "tpu7x")
_ARGS = "LIBTPU_INIT_ARGS"
_SCOPED = {"v4": 16, "v5e": 16, "v5p": 16, "v6e": 32, "tpu7x": 32}  # MiB, the compiler's defaults


def set_flags() -> None:
    """Adds FLAGS to the environment, where libtpu finds them when it is loaded; a flag that is
    there already stays as it is."""
    args = os.environ.get(_ARGS, "")
    new = [f"--{name}={value}" for name, value in FLAGS.items() if f"--{name}=" not in args]
    os.environ[_ARGS] = " ".join(filter(None, [args, *new]))


def keep_programs(folder: str | Path) -> None:
    """Keeps what is compiled from here on in a folder, and finds there what was compiled before.
    jax makes the folder, and opens it once: at the first program, whichever that is."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(folder))


class Jit:
    """`jax.jit` of a function for a mesh, with what the compiler should know where it is of TPUs;
    `convolutions` says that these are most of the program."""

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: jax.sharding.Mesh,
        *,
        convolutions: bool = False,
        **options: Any,
    ):
        tuned: Any = compiler_options(mesh.devices.flat[0], convolutions) or None
        self._plain = jax.jit(function, **options)
        self._tuned = jax.jit(function, **options, compiler_options=tuned)
        self.trace = self._tuned.trace

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        # Within another trace, such as one that counts FLOPs, jax refuses options.
        traced = isinstance(jnp.zeros(()), jax.core.Tracer)
        return (self._plain if traced else self._tuned)(*arguments, **named)


def compiler_options(device: Any, convolutions: bool = False) -> dict[str, str]:
    """Beside FLAGS, for programs of such devices; none where they are no TPUs, or where the
    environment says otherwise."""
    if device.platform != "tpu":
        return {}
    hides = GENERATIONS.get(device.device_kind) in _HIDES_EXCHANGES
    found = (EXCHANGES if hides else {}) | (CONVOLUTIONS if convolutions else {})
    return {name: value for name, value in found.items() if _given(name) in (None, FLAGS.get(name))}


def _given(name: str) -> str | None:
    """What the environment sets a flag of the compiler to."""
    found = re.search(rf"--{name}=(\S+)", os.environ.get(_ARGS, ""))
    return found.group(1) if found else None


def scoped_memory(chip: str) -> int:
    """Bytes of a core's own memory that the compiler gives one kernel, by its flags, except in
    programs of convolutions."""
    given = _given("xla_tpu_scoped_vmem_limit_kib")
    if given is None or chip == "v4":  # whose cores have no more
        return _SCOPED[chip] << 20
    return int(given) << 10


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled stage, named for plans and tables.

    Attributes:
      name: of the stage.
      trace: makes it, from shapes, under `jax.set_mesh`.
      needed: FLOPs of one run that the mathematics needs on all devices; 0: those that run.
      times: runs in one update; 0 for what runs when a job starts.
      inputs: what lies on the devices for it, read or not: shapes with their places.
    """

    name: str
    trace: Callable[[], Any]
    needed: float = 0.0
    times: int = 1
    inputs: Any = ()
