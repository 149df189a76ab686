"""The renderer under the TPU compiler; needs libtpu (pip install 'jax[tpu]') but no TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.mesh.chips import CHIPS
from worldr1_jax.plan import hlo as plan_hlo
from worldr1_jax.plan import report as plan
from worldr1_jax.plan import schedule, splat_cost
from worldr1_jax.splat import kernel as tile_kernel
from worldr1_jax.splat import lists as tile_lists
from worldr1_jax.splat import tiles

pytest.importorskip("libtpu")

TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}
SIZE = (294, 504)  # px; what Depth Anything 3 sees of 480x832


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_kernel_compiles(chip):
    """A round of the default room at full size: as a kernel of the chip, within its memory."""
    mesh = jax.sharding.Mesh(np.array(plan.topology_devices(TOPOLOGIES[chip])[:1]), ("data",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    grid = tile_lists.make_grid(SIZE, 16, None, None, "pallas")

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=here)

    def ints(*dims):
        return shape(*dims, dtype=jnp.int32)

    lists = tile_lists.Lists(
        shape(grid.pairs, 10), ints(grid.pairs), ints(grid.pairs), ints(grid.padded),
        ints(grid.padded), ints(),
    )  # fmt: skip
    pixels = grid.tile**2
    canvas = tiles.Canvas(
        shape(grid.padded, tiles.CHANNELS, pixels), shape(grid.padded, pixels),
        ints(grid.padded, pixels),
    )  # fmt: skip
    draw = jax.jit(lambda lists, canvas, n: tile_kernel.composite(grid, lists, canvas, n, False))
    done = draw.lower(lists, canvas, ints()).compile()
    text = done.as_text()
    assert text.count("tpu_custom_call") == 1
    # The plan counts its schedule, a step for each chunk; splat_cost has v5e's, with what ends it.
    cycles = schedule.found(plan_hlo.kernel_names(text), CHIPS[chip].rows)
    kernels = [op for op in plan_hlo.read(text, kernels=cycles) if op.kind in ("kernel", "unknown")]
    assert [op.kind for op in kernels] == ["kernel"]
    steps = grid.padded + grid.pairs // tile_kernel.CHUNK
    assert 0.5 < kernels[0].cycles / (splat_cost.KERNEL_CYCLES * steps) < 1.2
    used = done.memory_analysis()
    assert used.temp_size_in_bytes + used.argument_size_in_bytes < CHIPS[chip].hbm
