"""Trains: the same command on one CPU, a TPU VM, and every host of a pod.

python launch/tpu_train.py --config=configs/world.py
python launch/tpu_train.py --config=configs/world.py:small --config.policy.weights=... --workdir=...
"""

import os
import sys
from pathlib import Path

import cli
from absl import flags

DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "join the other hosts of a pod (jax.distributed) before anything else"
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0; a TPU pod finds it by itself"
)
PROCESSES = flags.DEFINE_integer("processes", None, "hosts of the run; a TPU pod knows")
PROCESS = flags.DEFINE_integer("process", None, "number of this host; a TPU pod knows")
HEARTBEAT = flags.DEFINE_integer("heartbeat", 60, "seconds after which a silent host is given up")
CACHE = flags.DEFINE_string(
    "compilation_cache", "", "folder of compiled programs; by default workdir/compilation_cache"
)


def main() -> None:
    """Joins the pod when asked, and runs the trainer."""
    import jax

    from worldr1_jax import train

    config = cli.CONFIG.value
    if DISTRIBUTED.value:
        jax.distributed.initialize(
            COORDINATOR.value, PROCESSES.value, PROCESS.value,
            heartbeat_timeout_seconds=HEARTBEAT.value,
        )  # fmt: skip
    else:
        cli.use_cpu_well_for(config)
    # The second start of a run, or a resume, then compiles nothing.
    cache = CACHE.value or Path(cli.WORKDIR.value).absolute() / "compilation_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    try:
        train.run(config, cli.WORKDIR.value)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _give_up(str(error))


def _give_up(reason: str) -> None:
    """Ends this process of several. The others may be gone, so nothing waits for them."""
    print(
        "error: this host lost the others, one of which has probably ended "
        f"({reason.splitlines()[0][:200]}); start the same command on every host, and the run goes "
        "on from its newest checkpoint",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


if __name__ == "__main__":
    cli.run(main)
