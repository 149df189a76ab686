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


def main() -> None:
    """Joins the pod when asked, and runs the trainer."""
    import jax

    from worldr1_jax import train

    config = cli.CONFIG.value
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    else:
        cli.use_cpu_well_for(config)
    # The second start of a run, or a resume, then compiles nothing.
    cache = Path(cli.WORKDIR.value).absolute() / "compilation_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    train.run(config, cli.WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
