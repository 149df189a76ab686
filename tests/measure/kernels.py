"""Attention kernels as the TPU compiler schedules them: what the planner counts for a layer.

python -m tests.measure.kernels v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1      # 480x832x81, forward
python -m tests.measure.kernels v6e:2x2 --backward --heads 5 --tokens 75600
python -m tests.measure.kernels v5p:2x2x1 --tokens 30720 --block 384       # as where no larger fits

One row of docs/pods.md for each topology: milliseconds of a forward (or of a backward, without the
forward that it may repeat) of so many heads of 128 over so many tokens, and the share of the chip's
peak at which it does the products that it makes. Needs 'jax[tpu]', but no TPU.
"""

import argparse
import os

import jax
import jax.numpy as jnp
import numpy as np

from worldr1_jax.mesh import compiler
from worldr1_jax.mesh.chips import CHIPS
from worldr1_jax.nn.attention_kernels import BLOCKS, Splash, keys_in
from worldr1_jax.plan import hlo, report, schedule
from worldr1_jax.plan.flops import jaxpr_flops

WIDTH = 128  # of a head
TOKENS = 32760  # of 480x832x81


def attention(
    topology: str, *, heads: int, tokens: int, backward: bool = False, block: int = 0
) -> tuple[float, float]:
    """Seconds that the kernel of a chip takes, and the FLOPs of the products that it makes.

    Raises:
      ValueError: a kernel whose schedule was not written, because libtpu was loaded before anybody
        asked for it.
    """
    device, chip = report.topology_devices(topology)[0], topology.split(":")[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("one",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    block = block or BLOCKS[chip]
    padded = -(-tokens // block) * block
    shape = jax.ShapeDtypeStruct((1, padded, heads, WIDTH), jnp.bfloat16, sharding=here)
    kernel = Splash(block, keys_in(compiler.scoped_memory(chip)))

    def forward(q, k, v):
        return kernel(q, k, v, scale=WIDTH**-0.5, length=tokens)

    def gradient(q, k, v, out):
        return jax.vjp(forward, q, k, v)[1](out)

    schedule.clear()
    traced = jax.jit(gradient if backward else forward).trace(*[shape] * (4 if backward else 3))
    text = traced.lower().compile().as_text()
    half = "dkv" if backward else "fwd"
    (name,) = [name for name in hlo.kernel_names(text) if half in name]
    cycles = schedule.found({name}, CHIPS[chip].rows).get(name)
    if cycles is None:
        raise ValueError(f"the compiler wrote no schedule of {name}")
    products = jaxpr_flops(traced.jaxpr.jaxpr)
    # Of the gradient's seven products two are the forward's.
    return cycles / CHIPS[chip].clock, products * (5 / 7 if backward else 1)


def main() -> None:
    """Prints a row for each topology."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("topologies", nargs="+")
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--block", type=int, default=0, help="queries and keys; 0: the chip's")
    asked = parser.parse_args()
    kind = "backward" if asked.backward else "forward"
    for topology in asked.topologies:
        seconds, flops = attention(
            topology,
            heads=asked.heads,
            tokens=asked.tokens,
            backward=asked.backward,
            block=asked.block,
        )
        share = flops / seconds / CHIPS[topology.split(":")[0]].peak
        print(
            f"| {topology.split(':')[0]} | {kind} | {asked.heads} | {asked.tokens:,} | "
            f"{1e3 * seconds:.1f} ± {1e3 * schedule.ERROR * seconds:.1f} ms | {share:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here holds a chip
    main()
