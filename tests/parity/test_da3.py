"""Depth Anything 3 against depth_anything_3 0.1.1: tiny random weights, float32, every output."""

from __future__ import annotations

import functools
import json
import re
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.goldens import make_da3
from worldr1_jax.models.da3 import model as da3
from worldr1_jax.models.da3.backbone import STRATEGIES, reference_frame
from worldr1_jax.models.da3.config import SIZES
from worldr1_jax.models.da3.gaussians import decode_cameras, gaussians_from, rotate_sh

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("depth_anything_3")

# Both sides are float32 and sum in different orders: 1e-3 of the spread of the values is the
# contract; 1e-5 is usual.
TOLERANCE = 1e-3
CASES = {
    "one_frame": ({}, 1, (56, 56), "saddle_balanced"),
    "two_frames_mlp": ({"ffn": "mlp"}, 2, (28, 42), "saddle_balanced"),
    "three_frames": ({}, 3, (42, 28), "saddle_balanced"),
    "seven_frames": ({}, 7, (28, 42), "saddle_balanced"),
    "middle": ({"sh_degree": 1}, 5, (28, 28), "middle"),
    "first": ({"sh_degree": 0}, 4, (28, 28), "first"),
    "single_tokens": ({"cat_token": False}, 3, (28, 28), "saddle_balanced"),
    "even_start": (
        {"alt_start": 4, "qknorm_start": 2, "rope_start": 3},
        3,
        (28, 28),
        "saddle_balanced",
    ),
}


def close(ours, theirs, name):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{name}: {ours.shape} against {theirs.shape}"
    error = np.abs(ours - theirs).max() / theirs.std()
    assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"
    return error


def load_ours(config, reference, folder, strategy):
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"ref_view_strategy": strategy})
    )
    tensors = {k: np.ascontiguousarray(v) for k, v in make_da3.publisher_tensors(reference).items()}
    save_file(tensors, folder / "model.safetensors")
    return da3.load(folder)


@nnx.jit
def outputs(model, video):
    """Everything that is compared, under the names of `run_reference`, and the taps."""
    size, config = video.shape[2:4], model.config
    images = (video - jnp.array(da3.IMAGENET_MEAN)) / jnp.array(da3.IMAGENET_STD)
    taps = model.backbone(images, strategy=config.ref_view_strategy)
    raw = model.forward(video)
    camtoworld, intrinsics = decode_cameras(raw.translation, raw.quaternion, raw.fov, size)
    gaussians = gaussians_from(
        config.gs_adapter, raw.gaussians, raw.opacity, raw.depth, camtoworld, intrinsics, size
    )
    return {
        "pose": jnp.concatenate([raw.translation, raw.quaternion, raw.fov], axis=-1),
        "depth": raw.depth,
        "confidence": raw.confidence,
        "camtoworld": camtoworld,
        "intrinsics": intrinsics,
        "means": gaussians.means,
        "scales": gaussians.scales,
        "opacities": gaussians.opacities,
        "harmonics": jnp.swapaxes(gaussians.sh, -1, -2),
        "rotations": gaussians.quaternions,
    }, taps


@pytest.mark.parametrize("case", CASES)
def test_every_output(case, tmp_path):
    overrides, frames, (height, width), strategy = CASES[case]
    config = make_da3.tiny_config(**overrides)
    reference = make_da3.make_reference(config, seed=frames)
    model = load_ours(config, reference, tmp_path, strategy)
    video = np.random.default_rng(frames).random((2, frames, height, width, 3), np.float32)
    want = make_da3.run_reference(reference, video, strategy)

    got, taps = outputs(model, jnp.asarray(video))
    errors = {
        name: close(value, want[name], name) for name, value in got.items() if name != "rotations"
    }
    for i, (tokens, camera) in enumerate(taps):
        errors[f"tap{i}"] = close(tokens, want[f"tap{i}"], f"tap{i}")
        errors[f"camera{i}"] = close(camera, want[f"camera{i}"], f"camera{i}")
    # q and -q are one rotation, and both signs occur where w is about 0.
    rotations = np.asarray(got["rotations"])
    assert np.std(want["depth"]) > 0.01 * np.mean(want["depth"]), (
        "a depth this flat would hide a wrong head"
    )
    signs = np.sign(np.sum(rotations * want["rotations"], axis=-1, keepdims=True))
    errors["rotations"] = close(rotations * signs, want["rotations"], "rotations")
    print(case, {k: f"{v:.1e}" for k, v in errors.items()})


def test_reconstruction_is_the_published_one_seen_from_the_first_camera(tmp_path):
    config = make_da3.tiny_config()
    reference = make_da3.make_reference(config, seed=5)
    model = load_ours(config, reference, tmp_path, "saddle_balanced")
    video = np.random.default_rng(5).random((1, 3, 28, 28, 3), np.float32)
    want = make_da3.run_reference(reference, video)
    got = nnx.jit(lambda model, x: model(x))(model, jnp.asarray(video))
    inverse = np.linalg.inv(want["camtoworld"][:, :1])
    close(got.camtoworld, inverse @ want["camtoworld"], "camtoworld")
    means = want["means"] @ np.swapaxes(inverse[:, 0, :3, :3], -1, -2) + inverse[:, 0, None, :3, 3]
    close(got.gaussians.means, means, "means")


def test_save_gives_the_publishers_keys(tmp_path):
    config = make_da3.tiny_config()
    reference = make_da3.make_reference(config)
    model = load_ours(config, reference, tmp_path, "saddle_balanced")
    da3.save(model, tmp_path / "again")
    theirs, ours = (
        load_file(tmp_path / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert all(np.array_equal(theirs[k], v) for k, v in ours.items())
    assert all("_aux" in key for key in theirs.keys() - ours.keys())


def test_sh_rotation_is_e3nns():
    pytest.importorskip("e3nn")
    make_da3.make_reference(
        make_da3.golden_config()
    )  # stubs what the package imports and does not use
    from depth_anything_3.utils.sh_helpers import rotate_sh as published

    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(20, 3, 3)))[0]
    rotation = (rotation * np.linalg.det(rotation)[:, None, None]).astype(np.float32)
    rotation[0] = np.eye(3)
    sh = rng.normal(size=(20, 3, 9)).astype(np.float32)
    want = published(torch.from_numpy(sh), torch.from_numpy(rotation)[:, None]).numpy()
    got = np.swapaxes(
        rotate_sh(jnp.swapaxes(jnp.asarray(sh), -1, -2), jnp.asarray(rotation)), -1, -2
    )
    close(got, want, "sh")


@pytest.mark.parametrize("name", SIZES)
def test_presets_are_the_packages_own(name):
    """The package's configuration gives our preset, and its network our leaves, every one."""
    make_da3.make_reference(make_da3.golden_config())
    from depth_anything_3.cfg import create_object, load_config, to_dict_recursive
    from depth_anything_3.registry import MODEL_REGISTRY

    published = load_config(MODEL_REGISTRY[name])
    values = {"model_name": name, "config": to_dict_recursive(published)}
    config = da3.Config.from_dict(json.loads(json.dumps(values)))
    assert config == da3.Config.published(name)
    assert da3.Config.from_dict({"model_name": name}) == config

    # Shapes alone; its constructor reads the values of one small tensor.
    real = mock.patch("torch.linspace", functools.partial(torch.linspace, device="cpu"))
    with torch.device("meta"), real:
        state = create_object(published).state_dict()
    shapes = {f"model.{key}": tuple(value.shape) for key, value in state.items()}
    kept = {k for k in shapes if not any(re.fullmatch(p, k) for p in da3.IGNORE)}
    model = nnx.eval_shape(lambda: da3.DA3(config, nnx.Rngs(0)))
    leaves = {
        ".".join(map(str, path)): leaf.shape
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    table = da3.table(config, "model.da3" if "nested" in name else "model")
    assert {key for key, _, _ in table} == kept
    assert {leaf for _, leaf, _ in table} == leaves.keys()
    for key, leaf, _ in table:  # our axes are in another order
        assert sorted(shapes[key]) == sorted(leaves[leaf]), key


@pytest.mark.parametrize("frames", [3, 7, 81])
def test_reference_frame_is_the_packages(frames):
    make_da3.make_reference(make_da3.golden_config())
    from depth_anything_3.model.reference_view_selector import select_reference_view

    tokens = np.random.default_rng(frames).normal(size=(6, frames, 48)).astype(np.float32)
    for strategy in STRATEGIES:
        want = select_reference_view(torch.from_numpy(tokens)[:, :, None], strategy).tolist()
        ours = reference_frame(jnp.asarray(tokens), strategy).tolist()
        if strategy == "saddle_sim_range":  # both frames of the least similar pair may tie
            unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
            alike = unit @ unit.swapaxes(1, 2)
            span, rows = alike.max(-1) - alike.min(-1), np.arange(len(tokens))
            np.testing.assert_allclose(span[rows, ours], span[rows, want], atol=1e-6)
        else:
            assert ours == want, strategy
