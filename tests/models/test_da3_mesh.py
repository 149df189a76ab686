"""Depth Anything 3 over a mesh: frames over context, videos over data, heads over tensor; the same
numbers as on one device."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.goldens.make_da3 import tiny_config
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models.da3 import backbone as da3_backbone
from worldr1_jax.models.da3 import model as da3
from worldr1_jax.nn import attention
from worldr1_jax.nn.attention_context import Sharded
from worldr1_jax.nn.attention_kernels import Splash

pytestmark = pytest.mark.slow  # each mesh compiles the network anew

FRAMES, SIZE = 5, (14, 21)  # 7 tokens a frame, 35 in all: 2, 4 and 8 divide neither
MESHES = {
    # 2 heads do not divide over 4 devices: keys travel
    "ring": ("blocks", {"data": 2, "context": 4}),
    "ulysses": ("blocks", {"fsdp": 2, "context": 2}),
    "heads": ("blocks", {"context": 2, "tensor": 2}),
    # more devices than frames
    "wide": ("ulysses:blocks", {"data": 1, "context": 8}),
}


@pytest.fixture(scope="module")
def single():
    """A network of local and global layers, two videos, and what one device makes of them."""
    starts = {"alt_start": 1, "qknorm_start": 1, "rope_start": 1}
    config = tiny_config(
        embed_dim=16, depth=4, sh_degree=0, features=8, patch_size=7, img_size=28,
        out_layers=(0, 1, 2, 3), **starts,
    )  # fmt: skip
    model = da3.DA3(dataclasses.replace(config, frame_chunk=2), nnx.Rngs(0))
    video = jax.random.uniform(jax.random.key(0), (4, FRAMES, *SIZE, 3))
    return model, video, nnx.jit(lambda model, video: model(video))(model, video)


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_same(single, name):
    model, video, want = single
    kernel, sizes = MESHES[name]
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    model = nnx.clone(model)
    model.attention = attention.build(kernel, device_kind="cpu")
    graph, state = nnx.split(sharding.place(model, da3.PLACES, mesh))
    with jax.set_mesh(mesh):
        call = jax.jit(lambda state, video: nnx.merge(graph, state)(video))
        got = call(state, jax.device_put(video, arrays.batched(mesh)))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # float32 in another order of summation
        error = np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(theirs).max()
        assert error <= 1e-5, error


def test_no_device_holds_the_scores_or_the_frames_of_another(single):
    """Of 8 frames, each device's backbone sees 2, in sequences of one frame and of all tokens."""
    model = nnx.clone(single[0])
    model.attention = attention.build("blocks", device_kind="cpu")
    mesh = make_mesh({"context": 4}, jax.devices()[:4])
    video = jnp.zeros((1, 8, *SIZE, 3))
    with jax.set_mesh(mesh):
        graph, state = nnx.split(sharding.place(model, da3.PLACES, mesh))
        call = jax.jit(lambda state, video: nnx.merge(graph, state).forward(video))
        lowered = call.lower(state, video)
        text = lowered.as_text()
        compiled = lowered.compile().as_text()
    tokens = 8 * 7
    assert f"{tokens}x{tokens}x" not in text
    assert f"[{tokens},{tokens}]" not in compiled
    # Queries of all frames are exchanged; the residual stream is not.
    assert "f32[1,2,7,16]" in compiled
    assert "f32[1,8,7,16]" not in compiled


def test_long_sequences_get_whole_blocks_and_travelling_keys():
    splash = Sharded(Splash(block=1024))
    mesh = make_mesh({"context": 8})
    with jax.set_mesh(mesh):
        long = attention.for_long_sequences(splash, 88 * 757, 24)
        assert (long.context, long.kernel.multiple) == ("ulysses", 1024)
        # 4 heads over 8 devices; 5 frames are too few for blocks that large
        short = attention.for_long_sequences(splash, 5 * 65, 4)
        assert (short.context, short.kernel.multiple) == ("ring", 128)
        assert da3_backbone.padded_frames(81, splash) == 88
        assert da3_backbone.padded_frames(81, "xla") == 81
    assert attention.for_long_sequences(splash, 81 * 757, 24).context == "ulysses"
    assert attention.for_frames(splash).context == "alone"
