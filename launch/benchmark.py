"""Times each stage of an update on the devices at hand, and says what bounds it.

python launch/benchmark.py --config=configs/world.py

Per stage: `matmul_share` is the part of its time that its matrix products and convolutions would
take at the rate of a large product, measured in the same run. A stage near 1 is bound by
arithmetic; one far below it by what lies between the products: elementwise work, memory, sorting,
or products too small for the machine.
"""

import json
import time

import cli
import numpy as np
from absl import flags

REPEATS = flags.DEFINE_integer("repeats", 3, "timed runs of each stage, after one that compiles")


def main() -> None:
    """Prints, per stage: median seconds, seconds to compile, host cores kept busy, GFLOP of its
    products, and the shares of the update and of the products."""
    import jax

    from worldr1_jax import settings
    from worldr1_jax.algorithms import update as learning
    from worldr1_jax.mesh.make import make_mesh
    from worldr1_jax.rollout.sample import sample_keys

    config = cli.CONFIG.value
    cli.use_cpu_well_for(config)
    mesh = make_mesh(config.mesh)
    settings.check(config, mesh)
    pipeline = settings.build_pipeline(config, mesh, jax.random.key(0))
    reward = settings.build_reward(config, mesh)
    count = config.groups * config.group_size
    prompts = list(settings.load_prompts(config).train)
    prompts = [p for p in prompts[: config.groups] for _ in range(config.group_size)]
    draw = settings.make_algorithm(config).draw(
        jax.random.key(2), 0, settings.make_plan(config)
    )  # fmt: skip
    state = settings.make_state(config, pipeline)
    keys = sample_keys(jax.random.key(1), count)
    text, paths = pipeline.encode(prompts), pipeline.paths(prompts)
    text_null = pipeline.encode_one("") if config.sample.guidance != 1 else None
    # Each repetition starts from the same state.
    step = settings.make_update(config, pipeline, state, donate=False)

    rows: dict[str, dict] = {}
    with jax.set_mesh(mesh):
        trajectory = _time(
            rows, "rollout", pipeline.rollout, state.adapters, text, paths, keys,
            text_null=text_null, **draw._asdict(),
        )  # fmt: skip
        videos = _time(rows, "decode", pipeline.decode, trajectory.latents)
        found = _time(rows, "reconstruct", reward.reconstruct, videos)
        parts = _time(rows, "render", reward.geometry, videos, found, paths)
        scores = reward.combine({**parts, "general": reward.general(videos, prompts)})
        advantages, valid = settings.make_advantages(config, mesh)(scores)
        batch = learning.Batch(trajectory, text, advantages, valid)
        _time(
            rows, "update", step, state, pipeline.base, batch, pipeline.sigmas, text_null
        )  # fmt: skip
    total, rate = sum(row["seconds"] for row in rows.values()), _matmul_rate(mesh.size)
    for row in rows.values():
        row["share"] = round(row["seconds"] / total, 3)
        row["matmul_share"] = round(row["matmul_gflop"] / rate / row["seconds"], 3)
    figures = {
        "devices": mesh.size, "videos": count, "matmul_gflop_per_second": round(rate, 1),
        "seconds_per_update": round(total, 3), "stages": rows,
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


def _time(rows: dict, name: str, function, *args, **kwargs):
    import jax

    from worldr1_jax.plan.flops import matmul_flops

    seconds = []
    for _ in range(REPEATS.value + 1):
        start, busy = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(function(*args, **kwargs))
        seconds.append((time.perf_counter() - start, time.process_time() - busy))
    wall = float(np.median([s[0] for s in seconds[1:]]))
    cores = float(np.median([s[1] / s[0] for s in seconds[1:]]))
    rows[name] = {
        "seconds": round(wall, 3),
        "compile_seconds": round(seconds[0][0] - wall, 1),
        "busy_cores": round(cores, 2),
        "matmul_gflop": round(matmul_flops(lambda: function(*args, **kwargs)) / 1e9, 2),
    }
    return out


if __name__ == "__main__":
    cli.run(main)
