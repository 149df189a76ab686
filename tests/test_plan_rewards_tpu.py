"""Depth Anything 3 through the TPU compiler, a small one; see test_plan_tpu.py."""

import dataclasses
import os

import jax
import pytest

from configs import world
from worldr1_jax import plan, plan_hlo, plan_rewards, sharding
from worldr1_jax.models import da3

pytest.importorskip("libtpu")


@pytest.fixture(scope="module")
def planned():
    """Four layers of heads of 64, 5 frames, 4 videos on 8 chips, two devices a video."""
    patch = pytest.MonkeyPatch()
    patch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    patch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    config = world.get_config("large")
    with config.unlocked():
        config.frames, config.height, config.width = 5, 160, 224
    net = da3.Config.giant()
    starts = {"alt_start": 1, "qknorm_start": 1, "rope_start": 1}
    small = dataclasses.replace(
        net.net, embed_dim=256, num_heads=4, depth=4, out_layers=(0, 1, 2, 3), **starts
    )
    heads = [
        dataclasses.replace(head, features=32, out_channels=(32, 32, 64, 64))
        for head in (net.head, net.gs_head)
    ]
    net = dataclasses.replace(net, net=small, head=heads[0], gs_head=heads[1], process_res=224)
    mesh = sharding.make_mesh({"fsdp": 4, "context": 2}, plan.topology_devices("v5e:2x4"))
    ((_, trace, _),) = plan_rewards.lowerings(config, mesh, net)
    with jax.set_mesh(mesh):
        compiled = trace().lower().compile()
    yield config, mesh, compiled
    patch.undo()


def test_the_network_compiles_with_kernels_and_fits(planned):
    config, mesh, compiled = planned
    assert plan_rewards.videos_at_once(config, mesh) == 4
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16e9
    text = compiled.as_text()
    assert "splash_m" in text  # the kernel, and not attention in XLA
    assert plan_hlo.read(text)  # every loop has a number of turns
