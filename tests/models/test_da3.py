"""Depth Anything 3 without torch: goldens, geometry, gradients, loading, reconstruct()."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tests.goldens.make_da3 import golden_config
from worldr1_jax.geometry import (
    matrix_to_quaternion,
    quaternion_to_matrix,
    relative_to_first,
    rigid_inverse,
    sh_band,
)
from worldr1_jax.models.da3 import model as da3
from worldr1_jax.models.da3.backbone import bicubic_matrix, reference_frame
from worldr1_jax.models.da3.config import flops
from worldr1_jax.models.da3.gaussians import (
    GaussianConfig,
    decode_cameras,
    gaussians_from,
    move,
    resample_depth,
    rotate_sh,
)
from worldr1_jax.models.da3.heads import corner_matrix
from worldr1_jax.plan import flops as cost
from worldr1_jax.rewards.reconstruct import processed_size, reconstruct

GOLDEN = Path(__file__).parents[1] / "goldens" / "da3.npz"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The golden file, and the network loaded from its weights under the publisher's names."""
    folder = tmp_path_factory.mktemp("da3")
    with np.load(GOLDEN) as file:
        values = dict(file)
    weights = {k[2:]: v for k, v in values.items() if k.startswith("w/")}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(golden_config().to_dict()))
    return values, da3.load(folder), folder


@pytest.fixture(scope="module")
def outputs(golden):
    """Raw outputs, and Gaussians in the network's own axes."""
    values, model, _ = golden

    @nnx.jit
    def run(model, video):
        raw = model.forward(video)
        own, intrinsics = decode_cameras(raw.translation, raw.quaternion, raw.fov, video.shape[2:4])
        return raw, own, intrinsics, model.gaussians_from(raw, own, intrinsics)

    return run(model, jnp.asarray(values["video"]))


def close(ours, theirs):
    """Float32 sums in another order: 1e-4 of the spread is above rounding, below any mistake."""
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.std(theirs), rtol=1e-4)


def test_golden_outputs(golden, outputs):
    values, (raw, own, intrinsics, gaussians) = golden[0], outputs
    close(jnp.concatenate([raw.translation, raw.quaternion, raw.fov], -1), values["out/pose"])
    close(raw.depth, values["out/depth"])
    close(raw.confidence, values["out/confidence"])
    close(own, values["out/camtoworld"])
    close(intrinsics, values["out/intrinsics"])
    close(gaussians.means[:, ::11], values["out/means"])
    close(gaussians.scales[:, ::11], values["out/scales"])
    close(gaussians.opacities[:, ::11], values["out/opacities"])
    close(jnp.swapaxes(gaussians.sh, -1, -2)[:, ::11], values["out/harmonics"])
    quaternions = np.asarray(gaussians.quaternions[:, ::11])
    dots = np.sum(quaternions * values["out/rotations"], axis=-1)
    np.testing.assert_allclose(np.abs(dots), 1.0, atol=1e-5)


def test_reconstruct_starts_at_the_identity_and_moves_everything(golden, outputs):
    values, model, _ = golden
    raw, own, intrinsics, gaussians = outputs
    # Frames in chunks of 2 and 1 here, all at once in `outputs`: the results are the same.
    model = nnx.clone(model)
    model.config = dataclasses.replace(model.config, frame_chunk=2)
    got = reconstruct(model, jnp.asarray(values["video"]), process_size=(14, 21))
    np.testing.assert_allclose(got.camtoworld[:, 0], np.eye(4)[None], atol=1e-5)
    first = np.asarray(own[:, 0])
    back = (
        np.asarray(got.gaussians.means) @ np.swapaxes(first[:, :3, :3], 1, 2)
        + first[:, None, :3, 3]
    )
    close(back, np.asarray(gaussians.means))
    close(got.depth, raw.depth)
    close(got.intrinsics, intrinsics)


def test_save_load_round_trip_is_exact(golden, tmp_path):
    _, model, _ = golden
    da3.save(model, tmp_path)
    again = da3.load(tmp_path)
    assert again.config == model.config
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(again, nnx.Param), nnx.state(model, nnx.Param)
    )


def test_load_names_what_does_not_fit(golden, tmp_path):
    values = golden[0]
    weights = {k[2:]: v for k, v in values.items() if k.startswith("w/")}
    (tmp_path / "config.json").write_text(json.dumps(golden_config().to_dict()))
    save_file(
        weights | {"model.head.extra": np.zeros(1, np.float32)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"model\.head\.extra"):
        da3.load(tmp_path)
    weights.pop("model.cam_dec.fc_t.bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.cam_dec\.fc_t\.bias"):
        da3.load(tmp_path)


def test_configs():
    for config in (da3.Config.giant(), da3.Config.nano(), golden_config()):
        assert da3.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    published = {
        "__object__": {"name": "DepthAnything3Net"},
        "net": {"name": "vitg", "out_layers": [19, 27, 33, 39], "alt_start": 13, "qknorm_start": 13}
        | {"rope_start": 13, "cat_token": True},
        "head": {
            "dim_in": 3072,
            "output_dim": 2,
            "features": 256,
            "out_channels": [256, 512, 1024, 1024],
        },
        "gs_head": {
            "dim_in": 3072,
            "output_dim": 38,
            "features": 256,
            "out_channels": [256, 512, 1024, 1024],
        },
        "gs_adapter": {"sh_degree": 2, "pred_color": False, "pred_offset_depth": True}
        | {"pred_offset_xy": True, "gaussian_scale_min": 1e-5, "gaussian_scale_max": 30.0},
        "cam_dec": {"dim_in": 3072},
    }
    assert (
        da3.Config.from_dict({"model_name": "da3-giant", "config": published}) == da3.Config.giant()
    )
    nested = {"model_name": "da3nested-giant-large", "config": {"anyview": published, "metric": {}}}
    assert da3.Config.from_dict(nested) == da3.Config.published("da3nested-giant-large")
    without = {k: v for k, v in published.items() if not k.startswith("gs_")}
    assert da3.Config.from_dict({"config": without}).gs_head is None
    with pytest.raises(ValueError, match="gs_adapter"):
        da3.Config.from_dict({"config": {k: v for k, v in published.items() if k != "gs_adapter"}})
    with pytest.raises(ValueError, match="'head'"):
        da3.Config.from_dict({"config": {"net": published["net"]}})
    with pytest.raises(ValueError, match="da3mono-large"):
        da3.Config.from_dict({"model_name": "da3mono-large"})
    with pytest.raises(ValueError, match=r"net\.bogus"):
        da3.Config.from_dict({"config": published | {"net": {"bogus": 1}}})


# Parameters in millions of what is built: all but the camera encoder and the ray branch.
@pytest.mark.parametrize(
    ("name", "millions"),
    [("da3-small", 26.18), pytest.param("da3-giant", 1226.57, marks=pytest.mark.slow)],
)
def test_published_sizes(name, millions):
    """Sizes of every leaf; parity/test_da3.py compares them with the package's."""
    config = da3.Config.published(name)
    model = nnx.eval_shape(lambda: da3.DA3(config, nnx.Rngs(0)))
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    count = sum(int(np.prod(leaf.shape)) for _, leaf in leaves)
    assert abs(count / 1e6 - millions) < 0.01
    assert len(da3.table(config)) == len(leaves)


def test_flops_are_those_of_the_traced_network():
    config = golden_config()
    graph, state = nnx.split(nnx.eval_shape(lambda: da3.DA3(config, nnx.Rngs(0))))
    video = jax.ShapeDtypeStruct((1, 3, 14, 21, 3), jnp.float32)
    traced = jax.make_jaxpr(lambda state, video: nnx.merge(graph, state).forward(video))(
        state, video
    )
    needed = flops(config, 3, (14, 21))
    # Resampling of maps and of the position table is not in it, and is much of a network this
    # small.
    assert 0.75 < needed / cost.jaxpr_flops(traced.jaxpr) <= 1.0
    assert 4e14 < flops(da3.Config.giant(), 81, (294, 504)) < 8e14


def test_without_gaussian_head(golden, outputs, tmp_path):
    """As small, base and large are published."""
    values = golden[0]
    config = dataclasses.replace(golden_config(), gs_head=None)
    weights = {k[2:]: v for k, v in values.items() if k.startswith("w/") and "gs_" not in k}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    model = da3.load(tmp_path)
    got = reconstruct(model, jnp.asarray(values["video"]), process_size=(14, 21))
    close(got.depth, outputs[0].depth)
    assert got.gaussians is None
    with pytest.raises(ValueError, match="no Gaussian head"):
        model.gaussians_from(outputs[0], outputs[1], outputs[2])


def test_the_giant_of_a_nested_model(golden, outputs, tmp_path):
    values = golden[0]
    weights = {k[2:].replace("model.", "model.da3.", 1): v
               for k, v in values.items() if k.startswith("w/")}  # fmt: skip
    weights["model.da3_metric.backbone.pretrained.cls_token"] = np.zeros(1, np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    nested = {"anyview": golden_config().to_dict()["config"], "metric": {}}
    (tmp_path / "config.json").write_text(json.dumps({"config": nested}))
    state = nnx.state(da3.load(tmp_path), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, state, nnx.state(golden[1], nnx.Param))


@pytest.mark.slow
def test_nano_shapes_and_gradients():
    config = da3.Config.nano()
    small = dataclasses.replace(config.net, embed_dim=16, depth=4, out_layers=(0, 1, 2, 3))
    config = dataclasses.replace(config, net=small)
    model = da3.DA3(config, nnx.Rngs(0))
    video = jax.random.uniform(jax.random.key(0), (1, 2, 64, 64, 3))

    def loss(model, video):
        out = model(video)
        return jnp.mean(out.depth) + jnp.mean(out.camtoworld**2) + jnp.mean(
            out.gaussians.means**2
        ), out

    (_, out), grads = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))(model, video)
    assert out.depth.shape == out.confidence.shape == (1, 2, 64, 64)
    assert out.gaussians.means.shape == (1, 2 * 32 * 32, 3)
    assert out.gaussians.sh.shape == (1, 2 * 32 * 32, 1, 3)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    assert float(jnp.abs(grads[1]).max()) > 0


def test_gaussians_lie_on_the_given_surface():
    """Zero raw channels and proper rays: the centres are the depth map's points."""
    config = GaussianConfig(sh_degree=0, unit_rays=False, slipped_quaternions=False)
    quaternion = jnp.array([[0.1, -0.3, 0.2, 0.9]])
    pose, intrinsics = decode_cameras(
        jnp.array([[[0.5, -0.2, 0.1]]]), quaternion[None], jnp.array([[[0.8, 1.1]]]), (8, 12)
    )
    raw = jnp.zeros((1, 1, 8, 12, config.raw_dim)).at[..., 8].set(1.0)
    depth = 2.0 + jax.random.uniform(jax.random.key(0), (1, 1, 8, 12))
    out = gaussians_from(config, raw, jnp.ones((1, 1, 8, 12)), depth, pose, intrinsics, (8, 12))
    camera = (np.asarray(out.means) - pose[0, 0, :3, 3]) @ pose[0, 0, :3, :3]
    np.testing.assert_allclose(camera[0, :, 2], depth.reshape(-1), rtol=1e-5)
    pixels = camera[0] @ intrinsics[0, 0].T
    pixels = (pixels[:, :2] / pixels[:, 2:]).reshape(8, 12, 2)
    want = np.stack(np.meshgrid(np.arange(12) + 0.5, np.arange(8) + 0.5), axis=-1)
    np.testing.assert_allclose(pixels, want, atol=1e-4)
    turned = quaternion_to_matrix(out.quaternions)
    np.testing.assert_allclose(
        turned[0], np.broadcast_to(pose[0, 0, :3, :3], turned[0].shape), atol=1e-5
    )


def test_quaternions_and_poses_round_trip():
    quaternion = jax.random.normal(jax.random.key(1), (200, 4))
    quaternion = (
        quaternion.at[0]
        .set(jnp.array([0.0, 0.0, 0.0, 1.0]))
        .at[1]
        .set(jnp.array([1.0, 0.0, 0.0, 0.0]))
    )
    unit = quaternion / jnp.linalg.norm(quaternion, axis=-1, keepdims=True)
    back = matrix_to_quaternion(quaternion_to_matrix(quaternion))
    np.testing.assert_allclose(np.abs(np.sum(back * unit, axis=-1)), 1.0, atol=1e-5)
    path, _ = decode_cameras(unit[:6, :3], unit[:6], jnp.ones((6, 2)), (8, 8))
    relative = relative_to_first(path)
    np.testing.assert_allclose(relative[0], np.eye(4), atol=1e-6)
    np.testing.assert_allclose(path[0] @ relative, path, atol=1e-5)


def test_rotated_harmonics_are_the_same_function():
    key_r, key_d, key_c = jax.random.split(jax.random.key(2), 3)
    rotation = quaternion_to_matrix(jax.random.normal(key_r, (4,)))
    directions = jax.random.normal(key_d, (50, 3))
    directions = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    sh = jax.random.normal(key_c, (9, 3))

    def colour(coefficients, d):
        return jnp.concatenate([sh_band(b, d) for b in range(3)], axis=-1) @ coefficients

    got = colour(rotate_sh(sh, rotation), directions @ rotation.T)
    np.testing.assert_allclose(got, colour(sh, directions), atol=1e-5)


def test_move_and_back_is_nothing(outputs):
    gaussians = outputs[3]
    rigid = outputs[1][:, 1]
    there_and_back = move(move(gaussians, rigid), rigid_inverse(rigid))
    for ours, want in zip(jax.tree.leaves(there_and_back), jax.tree.leaves(gaussians), strict=True):
        np.testing.assert_allclose(ours, want, atol=2e-5 * float(jnp.abs(want).max()) + 1e-6)


def test_reference_frame():
    tokens = jax.random.normal(jax.random.key(3), (2, 5, 8))
    assert reference_frame(tokens, "first").tolist() == [0, 0]
    assert reference_frame(tokens, "middle").tolist() == [2, 2]
    angles = jnp.radians(jnp.array([60.0, 90.0, 0.0, 180.0]))
    around = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)[None]
    # Cosines with the others and 0: ranges of 1.37, 0.87, 1.5 and 1.
    assert reference_frame(around, "saddle_sim_range").tolist() == [2]


def test_resampling():
    np.testing.assert_allclose(bicubic_matrix(37, 21).sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(corner_matrix(4, 7)[[0, 2, 6]], np.eye(4)[[0, 1, 3]], atol=1e-6)
    depth = jnp.arange(16.0).reshape(1, 1, 4, 4)
    assert resample_depth(depth, (2, 2))[0, 0].tolist() == [[0, 2], [8, 10]]
    assert resample_depth(depth, (8, 8)).shape == (1, 1, 8, 8)


def test_reconstruct_sizes_and_bad_input(golden):
    model = golden[1]
    assert processed_size(480, 832, 504, 14) == (294, 504)
    assert processed_size(64, 64, 64, 8) == (64, 64)
    video = jnp.zeros((1, 2, 28, 28, 3))
    for arguments, words in (
        (dict(video=video[0]), "B F H W 3"),
        (dict(video=video, frame_stride=0), "frame_stride"),
        (dict(video=video, process_size=(30, 28)), "multiples"),
    ):
        with pytest.raises(ValueError, match=words):
            reconstruct(model, **arguments)
    with pytest.raises(ValueError, match="patch size 7"):
        model.forward(jnp.zeros((1, 2, 30, 28, 3)))
