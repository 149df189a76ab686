"""Trains: the same command on one CPU, a TPU VM, and every host of a pod.

python launch/tpu_train.py --config=configs/world.py
python launch/tpu_train.py --config=configs/world.py:small --config.policy.weights=... --workdir=...
"""

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
    from worldr1_jax.mesh import hosts

    config = cli.CONFIG.value
    host = None
    if DISTRIBUTED.value:
        host = hosts.join(COORDINATOR.value, PROCESSES.value, PROCESS.value, HEARTBEAT.value)
    else:
        cli.use_cpu_well_for(config)
    # The second start of a run, or a resume, then compiles nothing.
    programs = CACHE.value or Path(cli.WORKDIR.value).absolute() / "compilation_cache"
    try:
        train.run(config, cli.WORKDIR.value, programs)
    except jax.errors.JaxRuntimeError as error:
        if host is None:
            raise
        host.lost(str(error).splitlines()[0][:200])
    except (ValueError, OSError) as error:
        if host is None or cli.TRACEBACK.value:
            raise
        host.leave(cli.sentence(error))


if __name__ == "__main__":
    cli.run(main)
