"""The Wan2.1 VAE without torch: the golden of diffusers, chunks, gradients, errors, files."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests import goldens
from tests.goldens.make_wan_vae import PATH
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.policies.stages import COLUMNS

TINY = wan_vae.Config(
    base_dim=4,
    z_dim=2,
    dim_mult=(1, 2),
    num_res_blocks=1,
    attn_scales=(0.5,),
    temperal_downsample=(True,),
    latents_mean=(0.1, -0.3),
    latents_std=(0.5, 2.0),
)


@pytest.fixture(scope="module")
def golden():
    return goldens.read(PATH)


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """The golden's network, in the files that diffusers' save_pretrained wrote."""
    folder = tmp_path_factory.mktemp("wan_vae")
    return goldens.publish(golden, folder, "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def tiny():
    """Random weights, made under jit: eagerly, each leaf's shape would be compiled by itself."""
    return nnx.jit(lambda: wan_vae.WanVAE(TINY, nnx.Rngs(0)))()


def run(model, function, *arrays):
    """function(model, *arrays) under jit, without LLVM's optimiser: it costs more than it saves."""
    graph, state = nnx.split(model)
    options = {"xla_backend_optimization_level": 0}
    call = jax.jit(
        lambda state, *a: function(nnx.merge(graph, state), *a), compiler_options=options
    )
    return call(state, *arrays)


def assert_close(got, expected, tolerance=1e-4):
    """Float32 sums in another order: 1e-5 of the spread is seen."""
    assert got.shape == expected.shape
    assert np.abs(np.asarray(got) - np.asarray(expected)).max() <= tolerance * np.std(expected)


@pytest.mark.parametrize("chunked", [False, True])
def test_golden(golden, published, chunked):
    model = wan_vae.load(published, remat=chunked)  # remat changes no value
    shift, scale = np.float32(model.config.latents_mean), np.float32(model.config.latents_std)
    expected = (golden["mean"] - shift) / scale

    def everything(model, video, latents):
        moments = model.encode_moments(video, chunked=chunked)
        encoded, decoded = (
            model.encode(video, chunked=chunked),
            model.decode(latents, chunked=chunked),
        )
        return *moments, encoded, decoded

    mean, logvar, latents, decoded = run(model, everything, golden["video"], expected)
    assert_close(mean, golden["mean"])
    assert_close(logvar, golden["logvar"])
    assert_close(latents, expected)
    assert_close(decoded, golden["decoded"])


def test_chunks_give_the_whole_and_frames_are_causal(tiny):
    video = jax.random.uniform(jax.random.key(1), (1, 7, 4, 6, 3))
    videos = jnp.concatenate([video, video.at[:, 5:].set(0.0)])

    def both(model, videos):
        whole = model.encode(videos)
        by_chunks = model.encode(videos, chunked=True), model.decode_raw(whole, chunked=True)
        return (whole, model.decode_raw(whole)), by_chunks

    (latents, decoded), (chunk_latents, chunk_decoded) = run(tiny, both, videos)
    assert latents.shape == (2, 4, 2, 3, 2)
    assert decoded.shape == videos.shape
    assert_close(chunk_latents, latents)
    assert_close(chunk_decoded, decoded)
    for value, frames in ((latents, 3), (decoded, 5)):
        np.testing.assert_allclose(value[0, :frames], value[1, :frames], atol=1e-6)
        assert np.abs(value[0, frames:] - value[1, frames:]).max() > 1e-3


@pytest.mark.slow
def test_chunks_keep_memory_and_columns_split_it(tiny):
    """What the compiler plans: temporaries of chunks do not grow with the frames, and devices that
    share a video hold parts of it. The result is that of one device."""
    graph, state = nnx.split(tiny)
    options = {"xla_backend_optimization_level": 0}

    def decode(state, latents):
        return nnx.merge(graph, state).decode_raw(latents, chunked=True)

    def plan(function, latents):
        program = jax.jit(function, compiler_options=options).lower(state, latents).compile()
        return program, program.memory_analysis().temp_size_in_bytes

    latents = [jax.random.normal(jax.random.key(1), (1, f, 8, 32, 2)) for f in (3, 9)]
    (program, few), (_, many) = (plan(decode, z) for z in latents)
    assert many <= 1.05 * few, (few, many)
    mesh = make_mesh({"context": 2, "tensor": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        split, each = plan(
            lambda state, z: decode(state, sharding.constrain(z, *COLUMNS)), latents[0]
        )
        got = split(state, latents[0])
    # At this size 0.61: each device holds the logits of a frame's pixels whole, and few columns
    # beside those at its edges. tests.measure.vae_memory has the published size.
    assert each < 0.7 * few, (few, each)
    assert got.sharding.spec[3] == ("context", "tensor")
    np.testing.assert_allclose(got, program(state, latents[0]), atol=1e-5)  # float32 sums


@pytest.mark.slow
def test_gradients_are_the_same_with_remat(tiny):
    video = jax.random.uniform(jax.random.key(1), (1, 3, 4, 4, 3))

    def gradient(remat):
        graph, state = nnx.split(tiny)
        model = nnx.merge(graph, state)
        model.remat = remat

        def loss(state, graph, video):
            model = nnx.merge(graph, state)
            return jnp.mean((model.decode_raw(model.encode(video)) - video) ** 2)

        def function(model, video):
            return jax.grad(loss)(nnx.state(model), nnx.graphdef(model), video)

        return jax.tree.leaves(run(model, function, video))

    for plain, again in zip(gradient(False), gradient(True), strict=True):
        assert np.isfinite(plain).all()
        np.testing.assert_allclose(plain, again, rtol=1e-4, atol=1e-6)


def test_nano_compresses_8x8x4():
    config = wan_vae.Config.nano()
    assert (config.spatial_compression, config.temporal_compression) == (8, 4)
    model = nnx.eval_shape(lambda: wan_vae.WanVAE(config, nnx.Rngs(0)))
    graph, state = nnx.split(model)
    video = jax.ShapeDtypeStruct((2, 17, 64, 64, 3), jnp.float32)
    latents = jax.eval_shape(lambda s, v: nnx.merge(graph, s).encode(v), state, video)
    assert latents.shape == (2, 5, 8, 8, 16)
    assert (
        jax.eval_shape(lambda s, z: nnx.merge(graph, s).decode(z), state, latents).shape
        == video.shape
    )


def test_wan2_1_is_the_published_size():
    model = nnx.eval_shape(lambda: wan_vae.WanVAE(wan_vae.Config.wan2_1(), nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == 126_892_531  # Of diffusers' AutoencoderKLWan() with its defaults.


def test_bfloat16_stays_near(golden, published):
    model = wan_vae.load(published, dtype=jnp.bfloat16)
    mean, _ = run(model, lambda model, video: model.encode_moments(video), golden["video"])
    assert mean.dtype == jnp.float32
    assert_close(mean, golden["mean"], tolerance=0.3)  # 8 bits of mantissa through 13 convolutions.


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 8, 8, 3), "4 frames"),
        ((1, 3, 3, 4, 3), "3x4 pixels"),
        ((1, 5, 8, 8, 1), r"\[B F H W 3\]"),
        ((5, 8, 8, 3), r"\[B F H W 3\]"),
    ],
)
def test_wrong_videos_are_named(tiny, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tiny.encode, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_wrong_latents_are_named(tiny):
    with pytest.raises(ValueError, match=r"\[B f h w 2\]"):
        jax.eval_shape(tiny.decode, jax.ShapeDtypeStruct((1, 2, 2, 2, 16), jnp.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_residual": True}, "Wan2.2"),
        ({"temperal_downsample": [True]}, "need 3"),
        ({"patch_size": 2}, "must both be 12"),
        ({"z_dim": 8}, "latents_mean has 16 values"),
        ({"block_out_channels": [1]}, "block_out_channels"),
    ],
)
def test_wrong_configs_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        wan_vae.Config.from_dict(fields)


def test_save_writes_the_publishers_files(golden, published, tmp_path):
    wan_vae.save(wan_vae.load(published), tmp_path)
    written = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {f"weights/{name}" for name in written} == {
        k for k in golden if k.startswith("weights/")
    }
    for name, value in written.items():
        np.testing.assert_array_equal(value, golden[f"weights/{name}"])
    values = json.loads((tmp_path / "config.json").read_text())
    original = json.loads(str(golden["config"]))
    ours = {"scale_factor_temporal": 4, "scale_factor_spatial": 8}
    assert values == {k: v for k, v in original.items() if k != "_diffusers_version"} | ours
