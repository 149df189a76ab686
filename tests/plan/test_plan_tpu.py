"""The TPU compiler itself, on a small network; needs libtpu (pip install 'jax[tpu]') but no TPU."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import world
from tests.models.test_wan_vae import TINY
from worldr1_jax import settings
from worldr1_jax.mesh import arrays, compiler
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.chips import CHIPS
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models.da3 import model as da3
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nn import attention
from worldr1_jax.plan import hlo as plan_hlo
from worldr1_jax.plan import report as plan
from worldr1_jax.policies import wan
from worldr1_jax.policies.stages import COLUMNS
from worldr1_jax.rewards.reconstruct import Reconstruct, reconstruct

pytest.importorskip("libtpu")


@pytest.fixture(scope="module")
def planned():
    """A small DiT, 8 videos of 5 frames on one host of 8 chips, two devices a video."""
    patch = pytest.MonkeyPatch()
    small = wan_dit.Config(num_attention_heads=2, ffn_dim=512, num_layers=3)
    patch.setitem(wan.SIZES, "large", lambda: small)
    config = world.get_config("large")
    with config.unlocked():
        config.frames, config.height, config.width = 5, 64, 64
        config.groups, config.sample.steps, config.algorithm.window_range = 1, 6, (0, 4)
        config.mesh.data, config.mesh.fsdp, config.mesh.context = 1, 4, 2
    found = settings.read(config)
    mesh = plan.mesh_for(found, plan.topology_devices("v5e:2x4"))
    programs = plan.plan(found, mesh, only=("rollout", "update"))
    yield plan.report("v5e:2x4", mesh, programs), {p.name: p for p in programs}
    patch.undo()


def test_rollout_and_update_compile_and_fit(planned):
    found, programs = planned
    assert set(programs) == {"rollout", "update"}
    for p in programs.values():
        assert 0 < p.hbm_peak_bytes < p.hbm_limit_bytes == CHIPS["v5e"].hbm
        assert p.terms["kernels"] > 0  # splash, and not attention in XLA
        assert not p.unknown and 0 < p.error < p.seconds
        assert 0 < p.mfu < 1
    assert found["devices"] == 8
    assert json.loads(json.dumps(found)) == found


def test_only_weights_and_heads_cross_the_network(planned):
    """No activation is gathered whole: each kernel once a layer and forward, exchanges apart."""
    sent = planned[1]["rollout"].collectives
    d, ffn, layers, forwards = 256, 512, 3, 6 * 2 * 2  # steps, branches, videos of a device
    weights = forwards * layers * (8 * d * d + 2 * d * ffn) * 2
    text = forwards * 512 * 4096 * 4 // 2  # of a prompt, half of which the other device keeps
    # The rest is the embeddings of text and time, which weigh much in a network this narrow.
    assert sent["all-gather"] < 2 * weights + text
    assert "all-to-all" in sent


def test_depth_anything_compiles_with_kernels_and_fits():
    """Four layers of heads of 64, 5 frames, 4 videos on 8 chips, two devices a video."""
    net = da3.Config.giant()
    starts = {"alt_start": 1, "qknorm_start": 1, "rope_start": 1}
    small = dataclasses.replace(
        net.net, embed_dim=256, num_heads=4, depth=4, out_layers=(0, 1, 2, 3), **starts
    )
    heads = [
        dataclasses.replace(head, features=32, out_channels=(32, 32, 64, 64))
        for head in (net.head, net.gs_head)
    ]
    net = dataclasses.replace(net, net=small, head=heads[0], gs_head=heads[1], process_res=112)
    mesh = make_mesh({"fsdp": 4, "context": 2}, plan.topology_devices("v5e:2x4"))
    look = Reconstruct(frame_stride=1)
    graph, state = nnx.split(look.described(mesh, "bfloat16", net)["da3"])

    def program(state, videos):
        return reconstruct(nnx.merge(graph, state), videos)

    videos = jax.ShapeDtypeStruct((4, 5, 84, 112, 3), "float32", sharding=arrays.batched(mesh))
    with jax.set_mesh(mesh):
        made = compiler.Jit(program, mesh, convolutions=True).trace(state, videos)
        compiled = made.lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < CHIPS["v5e"].hbm
    assert "splash_m" in text  # the kernel, and not attention in XLA
    assert plan_hlo.read(text)  # every loop has a number of turns


def test_the_decoder_convolves_in_bfloat16_and_in_time():
    """A float32 decoder, columns over two devices: no convolution of float32, which takes the
    compiler minutes at full size, and one in place of a tap each."""
    mesh = make_mesh({"fsdp": 2, "context": 2}, plan.topology_devices("v5e:2x2"))
    graph, state = nnx.split(nnx.eval_shape(lambda: wan_vae.WanVAE(TINY, nnx.Rngs(0))))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=arrays.replicated(mesh)), state
    )
    latents = jax.ShapeDtypeStruct((2, 3, 8, 8, 2), "float32", sharding=arrays.batched(mesh))

    def decode(state, latents):
        latents = sharding.constrain(latents, *COLUMNS)
        return nnx.merge(graph, state).decode(latents, chunked=True)

    with jax.set_mesh(mesh):
        lowered = compiler.Jit(decode, mesh, convolutions=True).trace(state, latents).lower()
    inputs = re.findall(
        r"stablehlo.convolution.*: \(tensor<(\w+)>, tensor<(\w+)>", lowered.as_text()
    )
    assert inputs and all(kind.endswith("bf16") for pair in inputs for kind in pair)
    assert any(kind.count("x") == 5 for kind, _ in inputs)
    memory = lowered.compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < CHIPS["v5e"].hbm


def test_attention_of_720p_holds_few_gradients_of_the_queries():
    """75,600 tokens as they are would take 197 of them, 46 GB, in bfloat16."""
    device = plan.topology_devices("v5p:2x2x1")[0]
    kernel = attention.build("splash", device_kind=device.device_kind)
    tokens = attention.padded(75_600, kernel)
    place = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((1, tokens, 12, 128), jnp.bfloat16, sharding=place)

    def total(q, k, v):
        out = attention.attention(q, k, v, length=75_600, implementation=kernel)
        return jnp.sum(out.astype(jnp.float32))

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x).compile()
    held = compiled.memory_analysis().temp_size_in_bytes / (4 * x.size)  # of float32
    assert held < 10
