"""S_meta with a judge, on a tiny random Qwen3-VL with the question's own words."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import world
from tests.splat.test_splat import scene
from worldr1_jax.camera import commands, trajectory
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import qwen3_vl
from worldr1_jax.models.qwen3_vl.config import Config, TextConfig, VisionConfig
from worldr1_jax.nano import check
from worldr1_jax.rewards import judge, meta_view
from worldr1_jax.rewards.base import GAUSSIANS, REWARDS, Evidence, find
from worldr1_jax.rewards.judge import Judge
from worldr1_jax.splat import render as splat
from worldr1_jax.types import Reconstruction
from worldr1_jax.weights import shipped

SIZE, SHOWN = (24, 28), (16, 24)  # of frames, and of what the judge is shown
QUESTION = "How clean? One digit."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen3-VL of patches of 4 px whose output table knows hardly more than digits."""
    path = tmp_path_factory.mktemp("judge")
    size = qwen3_vl.train_tokenizer([QUESTION, "user\n", "assistant\n"], path, 300)
    config = Config(
        TextConfig(size, 16, 32, 2, 2, 1, 8, mrope_section=(2, 1, 1)),
        VisionConfig(2, 16, 32, 2, 4, num_position_embeddings=16, deepstack_visual_indexes=(0,)),
        tie_word_embeddings=False, image_token_id=size - 1, vision_start_token_id=size - 3,
        vision_end_token_id=size - 2, min_pixels=64,
    )  # fmt: skip
    network = nnx.jit(lambda: qwen3_vl.Qwen3VL(config, nnx.Rngs(1)))()
    table = np.zeros((size, 16), np.float32)
    digits = list(qwen3_vl.read_tokens(path, config).digits)
    table[digits] = 2 * np.random.default_rng(0).normal(size=(10, 16))
    network.lm_head.embedding[...] = jnp.asarray(table)
    network.vision.merger.mlp.linear_2.kernel[...] *= 50.0  # it looks at the image
    qwen3_vl.save(network, path)
    return path


def found(batch=2, seed=0):
    """What is found in videos of four frames from almost one place."""
    gaussians, poses, matrices = scene(count=400, opacity=(0.7, 1.0), size=SIZE)
    gaussians = jax.tree.map(lambda leaf: leaf[gaussians.means[:, 0] > -0.35][:256], gaussians)
    four = lambda leaf: jnp.stack([leaf[0]] * 4)  # noqa: E731
    poses, matrices = four(poses), four(matrices)
    depth = splat.render(gaussians, poses[:1], matrices[:1], SIZE, method="exact").depth
    depth = jnp.maximum(four(depth), 1.0)
    one = Reconstruction(depth, jnp.ones_like(depth), poses, matrices, gaussians)
    return jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * batch), one)


@pytest.fixture(scope="module")
def seen():
    """What the judge is shown of them."""
    look = jax.jit(lambda f, path: judge.views(f, path, SHOWN, angle=2.0, method="exact"))
    return jax.device_get(look(found(), evidence().asked))


def evidence(batch=2, name="move_right"):
    videos = jax.random.uniform(jax.random.key(0), (batch, 4, *SIZE, 3))
    path = jnp.asarray(trajectory.path([name], 4))
    texture = jnp.ones((batch, 4))
    return Evidence(videos, jnp.stack([path] * batch), found(batch), texture, renderer="exact")


def scored(reward, seen, mesh=None, prompts=("A red box.", "A blue sphere.")):
    """What the reward makes of videos on a mesh, jitted."""
    mesh = mesh or make_mesh({"data": 1}, jax.devices()[:1])
    graph, state = nnx.split(reward.networks(mesh, "float32")["judge"])

    @jax.jit
    def call(state, seen, asked):
        return reward.score({"judge": nnx.merge(graph, state)}, seen, asked)

    with jax.set_mesh(mesh):
        return jax.device_get(call(state, seen, reward.ask(prompts)))


@pytest.fixture(scope="module")
def reward(folder):
    height, width = SHOWN
    return Judge(str(folder), QUESTION, angle=2.0, height=height, width=width)


@pytest.fixture(scope="module")
def plain(reward):
    return scored(reward, evidence())


def test_it_is_the_mean_of_what_the_judge_says_of_both_views(folder, plain, seen):
    images = np.asarray(seen.images)
    assert images.shape == (2, 2, *SHOWN, 3) and np.all(np.asarray(seen.usable))
    ask = judge.make(folder, images_at_once=3)
    each = ask(images.reshape(-1, *SHOWN, 3), QUESTION).reshape(2, 2)
    assert np.all((each > 0) & (each < 1))
    np.testing.assert_allclose(plain["judge"], each.mean(1), rtol=1e-5)
    np.testing.assert_allclose(plain["judge_angle"], 2.0)
    np.testing.assert_allclose(plain["judge_cover"], seen.cover, rtol=1e-6)


def test_what_is_not_shown_is_grey_and_does_not_count(seen):
    shown = np.asarray(seen.shown)
    assert 0.75 <= shown.mean() < 1
    assert np.all(np.asarray(seen.images)[~shown] == judge.GREY)
    np.testing.assert_allclose(seen.cover, shown.mean((2, 3)).min(1), rtol=1e-6)


def test_little_cover_halves_the_angle_once_and_then_there_is_no_grade(reward):
    """Of the second video hardly a thing is left."""
    whole = evidence()
    gaussians = whole.reconstruction.gaussians
    faint = gaussians.opacities * jnp.array([[1.0], [0.01]])
    gaussians = gaussians.replace(opacities=faint)
    found = whole.reconstruction.replace(gaussians=gaussians)
    parts = scored(reward, dataclasses.replace(whole, reconstruction=found))
    assert np.isfinite(parts["judge"][0]) and np.isnan(parts["judge"][1])
    np.testing.assert_allclose(parts["judge_angle"], [2, 1])


def test_a_frame_that_shows_nothing_has_no_grade(reward, plain):
    blank = dataclasses.replace(evidence(), texture=jnp.ones((2, 4)).at[1, 2].set(0))
    got = scored(reward, blank)["judge"]
    assert got[0] == pytest.approx(plain["judge"][0]) and np.isnan(got[1])


def test_an_answer_in_words_is_no_grade(folder, tmp_path):
    """Where every token is as likely, ten of three hundred are digits."""
    network = qwen3_vl.load(folder)
    network.lm_head.embedding[...] *= 0.0
    qwen3_vl.save(network, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert np.isnan(judge.make(tmp_path)(np.zeros((2, *SHOWN, 3)), QUESTION)).all()


def test_sharded_equals_unsharded(reward, plain):
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, jax.devices()[:4])
    got = scored(reward, evidence(), mesh)
    np.testing.assert_allclose(got["judge"], plain["judge"], rtol=1e-4)


def test_the_view_of_the_release_is_that_of_the_farthest_camera(folder):
    seen = evidence()
    poses = seen.reconstruction.camtoworld.at[:, 2, 0, 3].add(0.5)
    reconstruction = seen.reconstruction.replace(camtoworld=poses)
    far = judge.farthest(reconstruction, SIZE, method="exact")
    np.testing.assert_array_equal(far.poses[:, 0], poses[:, 2])
    want = splat.render(
        reconstruction.gaussians, poses[:, 2:3], reconstruction.intrinsics[:, 2:3], SIZE,
        method="exact",
    )  # fmt: skip
    np.testing.assert_allclose(far.images, jnp.clip(want.rgb, 0, 1), atol=1e-6)


def test_the_question_of_the_release_quotes_the_prompt(folder):
    ids, mask = Judge(str(folder), mode="released").ask(["A red box.", "A very blue sphere."])
    tokens = qwen3_vl.read_tokens(folder, qwen3_vl.read_config(folder))
    texts = [tokens.tokenizer.decode(row[kept]) for row, kept in zip(ids, mask, strict=True)]
    assert "A red box." in texts[0] and "A very blue sphere." in texts[1]
    assert ids.shape == mask.shape
    again = Judge(str(folder), mode="released").ask(["another"])[0]
    assert again.shape[1] == ids.shape[1]  # no other program for other prompts


def test_our_question_names_no_camera():
    assert not commands.parse(judge.QUESTION)
    words = set(judge.QUESTION.lower().replace(".", " ").split())
    moves = {word for name in commands.NAMES for word in name.split("_")} - {"in", "out", "up"}
    assert not words & (moves | {"camera", "prompt", "orbit", "motion"})
    assert "{" not in judge.QUESTION
    page = Path(__file__).parents[2] / "docs" / "rewards.md"
    assert f"> {judge.QUESTION}\n" in page.read_text()


def test_its_size_is_the_networks_own(folder):
    config = Config.qwen3_vl_4b()
    assert Judge("nano")._size(config, (294, 504)) == (288, 512)
    assert Judge("nano")._size(config, (64, 64)) == (256, 256)
    assert Judge("nano", height=480, width=832)._size(config, (294, 504)) == (480, 832)
    assert Judge("nano")._size(Config.nano(), (64, 64)) == (64, 64)


def test_described_is_of_the_published_size():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    network = Judge().described(mesh, "bfloat16")["judge"]
    kernel = network.text.blocks.gate.kernel.get_raw_value()
    assert kernel.shape == (36, 2560, 9728) and kernel.dtype == jnp.bfloat16
    # a plan has no tokenizer
    ids, _ = Judge()._ids(144)
    assert np.sum(ids == network.config.image_token_id) == 144


def test_refusals(folder, tmp_path):
    assert "judge" in REWARDS and find("judge") is Judge and Judge.needs == GAUSSIANS
    for weights in ("", "nowhere"):
        with pytest.raises(ValueError, match=rf"rewards\.judge\.weights is '{weights}': give"):
            Judge(weights).check()
    with pytest.raises(ValueError, match="height is 32 and width 0"):
        Judge(str(folder), height=32)
    with pytest.raises(ValueError, match="would resize to 16 and 24"):
        Judge(str(folder), height=17, width=23).check()
    with pytest.raises(ValueError, match="mode is 'best'"):
        Judge(str(folder), mode="best")
    with pytest.raises(ValueError, match="angle is 0"):
        Judge(str(folder), angle=0.0)
    with pytest.raises(ValueError, match=r"rewards\.judge: .* holds? the special token"):
        Judge(str(folder), "What is <|im_end|>?").check()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"rewards\.judge: .*'llama'"):
        Judge(str(tmp_path)).check()
    with pytest.raises(ValueError, match="images have the shape"):
        judge.make(folder)(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="1 images and 2 questions"):
        judge.make(folder)(np.zeros((1, *SHOWN, 3)), ["a", "b"])


def test_images_that_are_none_and_questions_that_are_no_texts(folder):
    ask, images = judge.make(folder), np.zeros((1, *SHOWN, 3), np.float32)
    for wrong, question, words in (
        (images.astype(np.uint8), "a", r"images are uint8: they have to be floats in \[0, 1\]"),
        (images + 255, "a", "values from 255 to 255"),
        (images - 1, "a", "values from -1 to -1"),
        (images[:, :0], "a", "images have the shape"),
        (images, "\ud800", "is no text in UTF-8"),
        (images, [None], "the question None is no text"),
    ):
        with pytest.raises(ValueError, match=words):
            ask(wrong, question)
    with pytest.raises(ValueError, match="images_at_once is 0: it has to be 1 or more"):
        judge.make(folder, images_at_once=0)


@pytest.mark.parametrize("name", ["judge", "hps", "pickscore"])
def test_a_nano_network_that_is_not_there_is_named_by_its_field(monkeypatch, tmp_path, name):
    """A field that the config has."""
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path)
    assert "weights" in world.get_config("nano").rewards[name]
    with pytest.raises(ValueError, match=rf"^rewards\.{name}\.weights is 'nano', and this copy"):
        find(name)(weights="nano").check()


def test_the_exam_is_that_of_the_meta_view(seen):
    poses, _ = meta_view.exam(found(), evidence().asked, 2.0)
    np.testing.assert_allclose(seen.poses, poses, atol=1e-6)


@pytest.mark.slow
def test_the_nano_judge_grades_as_the_damage_is():
    figures = check.grading(shipped.WEIGHTS / "judge")
    assert figures["spearman"] >= 0.8 and figures["answered"] == 1
