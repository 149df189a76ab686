"""Operations counted from the jaxpr, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from configs.world import get_config
from worldr1_jax import settings
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.plan import programs
from worldr1_jax.plan.flops import matmul_flops

A, B = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
PRODUCT = 2 * 3 * 4 * 5 * 6


def test_products_convolutions_and_what_holds_them():
    assert matmul_flops(lambda: A @ B) == PRODUCT
    assert matmul_flops(lambda: jax.jit(jnp.matmul)(A, B)) == PRODUCT
    scanned = lambda: jax.lax.scan(lambda c, _: (c, A @ B), 0.0, None, length=7)  # noqa: E731
    assert matmul_flops(scanned) == 7 * PRODUCT
    branches = (lambda: jnp.sum(A @ B), lambda: 0.0)
    assert matmul_flops(lambda: jax.lax.cond(True, *branches)) == PRODUCT
    gradient = jax.grad(lambda a: jnp.sum((a @ B) ** 2))
    assert matmul_flops(lambda: gradient(A)) == 2 * PRODUCT


def test_convolution():
    image, kernel = jnp.ones((2, 8, 9, 3)), jnp.ones((3, 3, 3, 5))
    numbers = ("NHWC", "HWIO", "NHWC")
    call = lambda: jax.lax.conv_general_dilated(  # noqa: E731
        image, kernel, (1, 1), "SAME", dimension_numbers=numbers
    )
    assert matmul_flops(call) == 2 * (2 * 8 * 9 * 5) * (3 * 3 * 3)


def test_every_device_counts():
    mesh = make_mesh({"data": -1})
    rows = np.ones((mesh.size, 4, 5), np.float32)
    product = jax.shard_map(
        lambda a: a @ jnp.ones((5, 6)), mesh=mesh, in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )  # fmt: skip
    assert matmul_flops(lambda: product(rows)) == mesh.size * 2 * 4 * 5 * 6


def test_a_kernels_body_counts_for_each_block():
    def body(a, b, out):
        out[...] = a[...] @ b[...]

    block = pl.BlockSpec((8, 128), lambda i: (i, 0))
    call = pl.pallas_call(
        body, jax.ShapeDtypeStruct((32, 128), jnp.float32), grid=(4,),
        in_specs=[block, pl.BlockSpec((128, 128), lambda i: (0, 0))], out_specs=block,
    )  # fmt: skip
    rows, square = jnp.ones((32, 128)), jnp.ones((128, 128))
    assert matmul_flops(lambda: call(rows, square)) == 2 * 32 * 128 * 128


def test_what_an_update_needs():
    """An algorithm that takes over what guidance did trains one branch, whatever guidance is."""

    def needed(variant, guidance):
        config = get_config(variant)
        config.sample.guidance = guidance
        found, mesh = settings.read(config), make_mesh({"data": 1}, jax.devices()[:1])
        pipeline = settings.build_pipeline(found, mesh, jax.random.key(0))
        shapes = programs.Shapes(found, pipeline)
        (*_, update) = programs.every(
            found, pipeline, settings.build_scorer(found, mesh), shapes,
            settings.described_state(found, pipeline),
        )  # fmt: skip
        return update.needed

    assert needed("nano,fast", 2.7) == needed("nano,fast", 1.0) > 0
    assert needed("nano,grpo", 2.7) == 2 * needed("nano,grpo", 1.0) > 0
