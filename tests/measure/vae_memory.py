"""Memory that the compiler plans for Wan2.1's VAE at 480x832, by frames: whole and by chunks.

    python -m tests.measure.vae_memory --frames 21 41 81
    python -m tests.measure.vae_memory --frames 21 --whole

    python -m tests.measure.vae_memory --frames 81 --what decode --split 4

Prints, for each, a device's bytes of arguments, result and temporaries of the compiled program.
Nothing is run. LLVM's optimiser is off: it has no part in the plan.
"""

import argparse
import json

import jax
import jax.numpy as jnp
from flax import nnx

from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.policies.stages import COLUMNS


def main() -> None:
    """One JSON object a program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="*", default=[21, 41, 81])
    parser.add_argument("--size", type=int, nargs=2, default=[480, 832])
    parser.add_argument("--what", nargs="*", default=["decode", "encode"])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--split", type=int, default=1, help="devices that share the columns")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.split)
    mesh = make_mesh({"context": args.split})
    model = nnx.eval_shape(lambda: wan_vae.WanVAE(wan_vae.Config.wan2_1(), nnx.Rngs(0)))
    for what in args.what:
        for frames in args.frames:
            with jax.set_mesh(mesh):
                program = compiled(model, what, (frames, *args.size), not args.whole, mesh)
            plan = program.memory_analysis()
            sizes = {
                "temporaries": plan.temp_size_in_bytes, "result": plan.output_size_in_bytes,
                "arguments": plan.argument_size_in_bytes,
            }  # fmt: skip
            print(json.dumps({"what": what, "frames": frames, **sizes}), flush=True)


def compiled(model, what: str, size: tuple[int, int, int], chunked: bool, mesh):
    """The program of one video of (frames, height, width)."""
    graph, state = nnx.split(model)
    video = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)

    def encode(state, x):
        return nnx.merge(graph, state).encode(x, chunked=chunked)

    def decode(state, x):
        return nnx.merge(graph, state).decode(sharding.constrain(x, *COLUMNS), chunked=chunked)

    options = {"xla_backend_optimization_level": 0}
    x = video if what == "encode" else jax.eval_shape(encode, state, video)
    function = encode if what == "encode" else decode
    with jax.set_mesh(mesh):
        return jax.jit(function, compiler_options=options).lower(state, x).compile()


if __name__ == "__main__":
    main()
