"""CLIP without torch: golden of transformers, both layouts, meshes, frames and prompts by hand,
errors."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests import goldens
from tests.goldens.make_clip import PATH, VISION
from tests.torch_archive import checkpoint, pth
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import clip
from worldr1_jax.nano import tokenizer


@pytest.fixture(scope="module")
def golden():
    return goldens.read(PATH)


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """The golden's network, in the files that transformers' save_pretrained wrote."""
    return goldens.publish(golden, tmp_path_factory.mktemp("clip"), "model.safetensors")


@pytest.fixture(scope="module")
def network(published):
    return clip.load(published)


@jax.jit
def embed(network, frames, ids):
    return network.image(frames), network.text(ids)


def inputs(golden):
    return jnp.asarray(golden["frames"]), jnp.asarray(golden["token_ids"])


def open_clip_weights(folder):
    """A folder's tensors under OpenCLIP's names, in its fused attention and its transposes."""
    weights = load_file(folder / "model.safetensors")
    kinds = {leaf: (key, kind) for key, leaf, kind in clip.table()}
    out = {}
    for key, leaf, kind in clip.table("open_clip"):
        theirs, transposed = kinds[leaf][0], kinds[leaf][1] != kind
        for n in range(3 if "{" in key else 1):
            name, source = key.format(i=n, j=n), theirs.format(i=n, j=n)
            if source in weights:
                value = weights[source]
                out[name] = np.ascontiguousarray(value.T) if transposed else value
    for stem in [name.removesuffix(".q") for name in out if name.endswith(".q")]:
        out[stem] = np.concatenate([out.pop(f"{stem}.{x}") for x in "qkv"])
    return out


def test_golden_of_transformers(golden, network):
    image, text = embed(network, *inputs(golden))
    # float32 sums in another order; embeddings are of length 1
    assert np.abs(image - golden["image"]).max() <= 1e-5
    assert np.abs(text - golden["text"]).max() <= 1e-5


def test_open_clip_checkpoint_is_the_same_network(golden, network, published, tmp_path):
    """As HPS_v2.1_compressed.pt: a torch archive with "state_dict" beside plain values."""
    weights = {k: v.astype(np.float16) for k, v in open_clip_weights(published).items()}
    (tmp_path / "tiny.pt").write_bytes(checkpoint(weights))
    config = dataclasses.replace(network.config, eos_token_id=None)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})  # a part of a part of a tensor, on each device
    for path, where in ((tmp_path, None), (tmp_path / "tiny.pt", mesh)):
        again = clip.load(path, config=config, mesh=where)
        pairs = zip(*(jax.tree.leaves(nnx.state(n)) for n in (again, network)), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_array_equal(ours, theirs.astype(np.float16))


def test_pytorch_model_bin(network, published, tmp_path):
    weights = load_file(published / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = np.zeros((1, 12), np.float32)
    (tmp_path / "pytorch_model.bin").write_bytes(pth(weights, ordered=True))
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    again = clip.load(tmp_path)
    assert again.config == network.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(network))


def test_saves_what_it_read(network, published, tmp_path):
    clip.save(network, tmp_path)
    theirs, ours = (load_file(p / "model.safetensors") for p in (published, tmp_path))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    assert clip.read_config(tmp_path) == network.config


def test_bfloat16_is_near_float32(golden, published):
    network = clip.load(published, dtype="bfloat16")
    assert network.text_encoder.blocks.q.kernel.dtype == jnp.bfloat16
    assert network.image_encoder.norm_out.scale.dtype == jnp.float32
    image, text = embed(network, *inputs(golden))
    # 8 bits of mantissa through three layers: the cosine with the exact embedding stays near 1
    assert np.sum(image * golden["image"], -1).min() > 0.999
    assert np.sum(text * golden["text"], -1).min() > 0.999


def test_what_follows_the_first_end_is_not_seen(golden, network):
    _, ids = inputs(golden)
    row = ids[1]  # ends in the middle
    other = row.at[7:].set((row[7:] + 5) % 49)
    again = row.at[10].set(49)  # a second end
    short = network.text(row[None, :7])[0]
    for changed in (other, again):
        np.testing.assert_allclose(network.text(changed[None])[0], short, atol=1e-6)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"context": 2, "tensor": 2}])
def test_every_mesh_gives_the_same(golden, published, sizes):
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    network = clip.load(published, mesh=mesh)
    kernel = network.image_encoder.blocks.linear_1.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == (
        24 // mesh.shape["fsdp"] // mesh.shape["context"], 40 // mesh.shape["tensor"],
    )  # fmt: skip
    frames, ids = (jnp.concatenate([x, x, x])[:8] for x in inputs(golden))
    with jax.set_mesh(mesh):
        image, text = embed(network, frames, ids)
    assert np.abs(image[:3] - golden["image"]).max() <= 1e-5
    assert np.abs(text[:4] - golden["text"]).max() <= 1e-5


def test_gradients_reach_every_leaf(golden, network):
    frames, ids = inputs(golden)

    def loss(network):
        image, text = network.image(frames), network.text(ids)
        return jnp.sum(jnp.exp(network.logit_scale[...]) * image @ text.T * jnp.eye(3, 4))

    for path, leaf in nnx.to_flat_state(nnx.jit(nnx.grad(loss))(network)):
        if path[-2:] != ("k", "bias"):  # a constant added to every key changes no softmax
            assert float(jnp.abs(leaf[...]).max()) > 1e-6, path


def test_published_size_without_memory():
    config = clip.Config.vit_h_14()
    network = nnx.eval_shape(lambda: clip.CLIP(config, nnx.Rngs(0)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(network, nnx.Param)))
    assert count == 986_109_441  # OpenCLIP's own count (tests/parity/test_clip.py)


def test_config_as_published():
    """PickScore_v1's fields: towers twice, the end token's id as it was before 2023."""
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    vision |= {"num_attention_heads": 16, "patch_size": 14, "hidden_act": "gelu"}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    text |= {"num_attention_heads": 16, "hidden_act": "gelu", "eos_token_id": 2}
    values = {"model_type": "clip", "projection_dim": 1024, "text_config": text}
    values |= {"vision_config": {"patch_size": 32}, "vision_config_dict": vision}
    values["text_config_dict"] = None
    config = clip.Config.from_dict(values)
    assert config == clip.Config.vit_h_14()
    assert clip.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    small = clip.Config.from_dict({})  # transformers' defaults
    assert small.vision.hidden_act == "quick_gelu" and small.eos_token_id == 49407


def test_frames_by_hand():
    config = clip.Config.vit_h_14()
    white = np.ones((1, 480, 832, 3), np.float32)
    padded = np.asarray(clip.preprocess(white, config, "pad")) * clip.STD + clip.MEAN
    assert padded.shape == (1, 224, 224, 3)
    np.testing.assert_allclose(padded[0, 47:176], 1, atol=1e-5)  # 129 rows of the frame
    assert np.abs(padded[0, :47]).max() < 1e-6 and np.abs(padded[0, 176:]).max() < 1e-6
    # left third black, right third white: the crop's ends keep 28% of each, squeezing all of it
    frames = np.repeat(np.repeat([0.0, 0.5, 1.0], 128)[None, None, :, None], 224, 1)
    frames = np.repeat(frames, 3, -1)
    for fit, black in (("crop", 48), ("squeeze", 75)):
        row = np.asarray(clip.preprocess(frames, config, fit))[0, 100, :, 0]
        row = row * clip.STD[0] + clip.MEAN[0]
        assert abs(int((row < 0.25).sum()) - black) <= 1 and row[0] < 1e-6 and row[-1] > 1 - 1e-6
    assert clip.preprocess(frames[:, :, :200], config, "crop").shape == (1, 224, 224, 3)


def test_frames_of_the_network_s_own_size_are_only_normalised():
    config = clip.Config.nano(100, 1)
    frames = np.random.default_rng(0).random((2, 48, 48, 3)).astype(np.float32)
    for fit in clip.FITS:
        got = jax.jit(lambda x, fit=fit: clip.preprocess(x, config, fit))(frames)
        np.testing.assert_allclose(got, (frames - clip.MEAN) / clip.STD, atol=1e-6)


def test_prompts_end_once_and_what_is_cut_is_said_once(tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    words = clip.Tokenizer(tmp_path, 6)
    ids = words(["a red sphere", "a red sphere on a tiled floor"])
    assert ids.shape == (2, 6) and ids.dtype == np.int32
    end = ids[0, 3]
    np.testing.assert_array_equal(ids[0, 3:], end)
    assert list(ids[1]).index(end) == 5 and ids[1, 4] == ids[1, 0]  # "a"
    words(["a red sphere on a tiled floor"])
    assert len(said) == 1 and "'tiled floor'" in said[0]
    assert words([]).shape == (0, 6)


def test_refusals_of_files(golden, published, tmp_path):
    def refused(message, weights=None, **fields):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({**json.loads(str(golden["config"])), **fields})
        )
        if weights is not None:
            save_file(weights, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            clip.load(folder)

    weights = load_file(published / "model.safetensors")
    refused("'model_type' is 'siglip'", model_type="siglip")
    refused("hidden_act is 'relu'", vision_config={**VISION, "hidden_act": "relu"})
    refused("multiple of num_attention_heads 5", vision_config={**VISION, "num_attention_heads": 5})
    refused("image_size 3 is smaller than a patch", vision_config={**VISION, "image_size": 3})
    refused("'vision_config.hidden_size' is '24'", vision_config={**VISION, "hidden_size": "24"})
    refused("no fields under 'text_config'", text_config=[3])
    refused("holds no .safetensors")
    refused("unknown keys, such as 'extra'", {**weights, "extra": np.zeros(3, np.float32)})
    refused("shape", {**weights, "logit_scale": np.zeros(3, np.float32)})
    lacking = {k: v for k, v in weights.items() if k != "visual_projection.weight"}
    refused("lacks the key 'visual_projection.weight'", lacking)


def test_refusals_of_checkpoints(network, published, tmp_path):
    weights = open_clip_weights(published)
    file = tmp_path / "other.pt"
    file.write_bytes(checkpoint(weights))
    with pytest.raises(ValueError, match=r"width 24 and patch 4; without a config\.json"):
        clip.load(file)
    file.write_bytes(checkpoint({"conv1.weight": np.zeros((3, 3), np.float32)}))
    with pytest.raises(ValueError, match=r"neither a config\.json beside it nor the names"):
        clip.load(file)
    key = "transformer.resblocks.0.attn.in_proj_bias"
    file.write_bytes(checkpoint({**weights, key: weights[key][:-1]}))
    with pytest.raises(ValueError, match="3 equal parts"):
        clip.load(file, config=network.config)
    (tmp_path / "another.pt").write_bytes(checkpoint(weights))
    with pytest.raises(ValueError, match=r"2 \.pt files; name the one"):
        clip.load(tmp_path, config=network.config)


def test_refusals_of_inputs(network, tmp_path):
    config, frames = network.config, np.zeros((2, 8, 16, 3), np.float32)
    with pytest.raises(ValueError, match="fit is 'stretch'"):
        clip.preprocess(frames, config, "stretch")
    with pytest.raises(ValueError, match="larger than a patch of CLIP, 4 pixels"):
        clip.preprocess(frames[:, :3], config, "pad")
    with pytest.raises(ValueError, match=r"\[N 16 16 3\]"):
        network.image(frames)
    with pytest.raises(ValueError, match="T at most 12"):
        network.text(jnp.zeros((2, 13), jnp.int32))
    with pytest.raises(ValueError, match=r"tokenizer\.json, or with vocab\.json and merges\.txt"):
        clip.Tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        clip.Tokenizer(tmp_path)(["a red box", "  "])
