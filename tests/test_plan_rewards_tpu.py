"""Depth Anything 3 through the TPU compiler, a small one; see test_plan_tpu.py."""

import dataclasses
import os

import pytest

from configs import world
from worldr1_jax import plan, plan_rewards, sharding
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
    ((name, trace, needed),) = plan_rewards.lowerings(config, mesh, net)
    yield config, mesh, plan._compile(plan.Lowering(name, trace, needed), mesh, None, "")
    patch.undo()


def test_the_network_compiles_with_kernels_and_no_gathered_frames(planned):
    config, mesh, program = planned
    assert plan_rewards.videos_at_once(config, mesh) == 4
    assert 0 < program.hbm_peak_bytes < program.hbm_limit_bytes
    assert program.terms["kernels"] > 0  # splash, and not attention in XLA
    assert 0 < program.mfu < 1
    # Queries, keys, values and outputs of 2 global layers in bfloat16, twice for what the padding
    # adds: 6 frames of 177 tokens.
    exchanged = 2 * 4 * 6 * 177 * 256 * 2
    assert 0 < program.collectives["all-to-all"] <= 2 * exchanged
