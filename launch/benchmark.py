"""Times each stage of an update on the devices at hand, and says what bounds it.

python launch/benchmark.py --config=configs/world.py

Per stage of `train.one_update`: `matmul_share` is the part of its time that its matrix products and
convolutions would take at the rate of a large product, measured in the same run. A stage near 1 is
bound by arithmetic; one far below it by what lies between the products: elementwise work, memory,
sorting, or products too small for the machine.
"""

import json
import time

import cli
import numpy as np
from absl import flags

REPEATS = flags.DEFINE_integer(
    "repeats", 3, "timed updates, after one that compiles", lower_bound=1
)


def main() -> None:
    """Prints, per stage: median seconds, seconds of the first run, which compiles, GFLOP of its
    products, and the shares of the update and of the products."""
    import jax

    from worldr1_jax import preflight, settings, train
    from worldr1_jax.plan.flops import jaxpr_flops
    from worldr1_jax.plan.programs import Shapes, every
    from worldr1_jax.timing import StageTimer

    config = cli.CONFIG.value
    cli.use_cpu_well_for(config)
    found = settings.read(config)
    preflight.check_files(found)
    prompts, mesh = settings.load_prompts(found), settings.make_mesh(found)
    preflight.check(found, mesh, prompts)
    programs, state = train.build(found, mesh)
    loader, timer = settings.make_loader(found, prompts), StageTimer()
    runs = []
    with jax.set_mesh(mesh):
        for update in range(REPEATS.value + 1):
            # Of the main phase, unless there are many: the dynamic one has fewer rewards.
            state, outcome = train.one_update(programs, state, loader, update, timer)
            runs.append({k: v for k, v in outcome.scalars.items() if k.startswith("seconds/")})
        shapes = Shapes(found, programs.pipeline)
        flops = {
            program.name: program.times * jaxpr_flops(program.trace().jaxpr.jaxpr)
            for program in every(found, programs.pipeline, programs.scorer, shapes, state)
        }
    names = [name for name in runs[0] if all(name in run for run in runs)]
    seconds = {name: float(np.median([run[name] for run in runs[1:]])) for name in names}
    total, rate = sum(seconds.values()), _matmul_rate(mesh.size)
    rows = {}
    for name in names:
        stage, gflop = name.removeprefix("seconds/"), flops.get(name.removeprefix("seconds/"), 0.0)
        rows[stage] = {
            "seconds": round(seconds[name], 3),
            "first_seconds": round(runs[0][name], 1),
            "matmul_gflop": round(gflop / 1e9, 2),
            "share": round(seconds[name] / total, 3),
            "matmul_share": round(gflop / 1e9 / rate / seconds[name], 3),
        }
    figures = {
        "devices": mesh.size, "videos": found.run.videos,
        "matmul_gflop_per_second": round(rate, 1), "seconds_per_update": round(total, 3),
        "stages": rows,
    }  # fmt: skip
    print(json.dumps(figures, indent=2))


def _matmul_rate(devices: int, size: int = 2048) -> float:
    """GFLOP/s of one large float32 product on every device at once."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)
    places = [jax.device_put(jnp.ones((size, size)), d) for d in jax.devices()[:devices]]
    best = np.inf
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready([product(a, a) for a in places])
        best = min(best, time.perf_counter() - start)
    return devices * 2 * size**3 / best / 1e9


if __name__ == "__main__":
    cli.run(main)
