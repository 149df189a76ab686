"""HPSv2.1 and PickScore as rewards: numbers by hand, on a tiny random CLIP with nano's words."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import clip
from worldr1_jax.nano import tokenizer
from worldr1_jax.rewards import preference
from worldr1_jax.rewards.base import REWARDS, Evidence, find
from worldr1_jax.rewards.preference import Hps, PickScore

PROMPTS = [
    "Camera push in. A red sphere on a tiled floor in a brick room.",
    "A blue box on a wooden floor under a blue sky.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of 12 pixels with the nano world's tokenizer beside it."""
    path = tmp_path_factory.mktemp("clip")
    tower = clip.Tower(16, 32, 2, 2)
    config = clip.Config(
        tower, tower, 8, image_size=12, patch_size=4, vocab_size=len(tokenizer.vocabulary()),
        max_position_embeddings=16, eos_token_id=tokenizer.vocabulary().index(tokenizer.END),
    )  # fmt: skip
    clip.save(nnx.jit(lambda: clip.CLIP(config, nnx.Rngs(0)))(), path)
    tokenizer.save(path)
    return path


def videos(seed=0):
    return jax.random.uniform(jax.random.key(seed), (2, 9, 10, 16, 3))


def scored(reward, mesh, evidence):
    """What the reward makes of two videos on a mesh, jitted."""
    networks = {name: nnx.split(net) for name, net in reward.networks(mesh, "float32").items()}
    graphs = {name: graph for name, (graph, _) in networks.items()}

    @jax.jit
    def call(states, evidence, asked):
        merged = {name: nnx.merge(graphs[name], state) for name, state in states.items()}
        return reward.score(merged, evidence, asked)

    states = {name: state for name, (_, state) in networks.items()}
    with jax.set_mesh(mesh):
        return call(states, evidence, reward.ask(PROMPTS))


def one_device():
    return make_mesh({"data": 1}, jax.devices()[:1])


def evidence(frames):
    return Evidence(frames, jnp.broadcast_to(jnp.eye(4), (*frames.shape[:2], 4, 4)))


def test_scores_by_hand():
    image = jnp.array([[[1.0, 0], [0, 1]], [[0.6, 0.8], [0.6, 0.8]]])
    text = jnp.array([[1.0, 0], [0, 1]])
    np.testing.assert_allclose(preference.hps(image, text), [0.5, 0.8], rtol=1e-6)
    scale = jnp.log(100.0)
    np.testing.assert_allclose(
        preference.pickscore(image, text, scale), [50 / 26, 80 / 26], rtol=1e-6
    )
    frames = jnp.arange(9.0)[None, :, None, None, None] * jnp.ones((2, 9, 1, 1, 3))
    assert list(preference.evenly(frames, 3)[0, :, 0, 0, 0]) == [0, 4, 8]
    assert preference.evenly(frames, 100).shape == frames.shape


@pytest.mark.parametrize("kind", [Hps, PickScore])
def test_the_reward_is_the_mean_cosine(folder, kind):
    reward, frames = kind(str(folder), frames=3), videos()
    got = scored(reward, one_device(), evidence(frames))[reward.name]
    network, words = clip.load(folder), clip.Tokenizer(folder, 16)
    ids = jnp.asarray(words([PROMPTS[0].split(". ")[1], PROMPTS[1]]))

    @jax.jit
    def cosines(frames):
        return (
            network.image(clip.preprocess(frames, network.config, reward.fit)) @ network.text(ids).T
        )

    for row in range(2):
        want = cosines(frames[row, ::4])[:, row].mean()
        if kind is PickScore:
            want = want / 0.07 / 26  # the temperature with which CLIP begins
        np.testing.assert_allclose(got[row], want, rtol=1e-4)  # float32 in another order


def test_a_mesh_gives_the_same_and_a_broken_video_only_breaks_its_own(folder):
    frames = videos().at[1, 4].set(jnp.nan)
    reward = Hps(str(folder), frames=3)
    alone = scored(reward, one_device(), evidence(frames))["hps"]
    mesh = make_mesh({"data": 2, "context": 2, "tensor": 2})
    spread = scored(reward, mesh, evidence(frames))["hps"]
    np.testing.assert_allclose(alone, spread, rtol=1e-5)
    assert np.isfinite(alone[0]) and np.isnan(alone[1])


def test_gradients_reach_the_frames_that_are_seen(folder):
    reward = Hps(str(folder), frames=3)
    network = reward.networks(one_device(), "float32")
    asked = reward.ask(PROMPTS)

    def loss(frames):
        return reward.score(network, evidence(frames), asked)["hps"].sum()

    moved = np.abs(jax.jit(jax.grad(loss))(videos())).max((0, 2, 3, 4)) > 0
    assert list(np.flatnonzero(moved)) == [0, 4, 8]


def test_a_prompt_that_is_all_camera_is_kept(folder):
    reward = Hps(str(folder))
    same = reward.ask(["Camera pan left.", PROMPTS[0]])
    words = clip.Tokenizer(folder, 16)
    np.testing.assert_array_equal(same[0], words(["Camera pan left."])[0])
    np.testing.assert_array_equal(same[1], words([PROMPTS[0].split(". ")[1]])[0])


def test_described_is_of_the_published_size(folder):
    network = Hps(str(folder)).described(make_mesh({"fsdp": 4, "tensor": 2}), "bfloat16")["clip"]
    kernel = network.text_encoder.blocks.linear_1.kernel.get_raw_value()
    assert kernel.shape == (24, 1024, 4096) and kernel.dtype == jnp.bfloat16
    assert kernel.sharding.shard_shape(kernel.shape) == (24, 256, 2048)


@pytest.mark.parametrize("name", ["hps", "pickscore"])
def test_refusals(folder, tmp_path, name):
    kind = find(name)
    assert name in REWARDS and kind.name == name
    for weights in ("", "nowhere"):
        with pytest.raises(ValueError, match=rf"rewards\.{name}\.weights is '{weights}'"):
            kind(weights).check()
    with pytest.raises(ValueError, match="fit is 'stretch'"):
        kind(str(folder), fit="stretch")
    with pytest.raises(ValueError, match="frames is 0"):
        kind(str(folder), frames=0)
    with pytest.raises(ValueError, match=rf"rewards\.{name}: .* holds no tokenizer"):
        kind(str(folder), tokenizer=str(tmp_path)).check()
    dataclasses.replace(kind(str(folder))).check()


@pytest.mark.parametrize("change", [{"eos_token_id": 2}, {"vocab_size": 40}, {"eos_token_id": 0}])
def test_the_tokenizer_of_another_network_is_refused(folder, change):
    words, config = clip.Tokenizer(folder, 16), clip.read_config(folder)
    words.check(config)
    with pytest.raises(ValueError, match="holds the tokenizer of another network"):
        words.check(dataclasses.replace(config, **change))
