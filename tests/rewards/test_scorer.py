"""Rewards as a library: what they refuse, in which words, and fewer Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rewards.test_recon import ideal
from worldr1_jax.nano import videos as nano_videos
from worldr1_jax.rewards import build, recon
from worldr1_jax.rewards.choice import choose
from worldr1_jax.rewards.function import HostFunction
from worldr1_jax.rewards.meta_view import MetaView
from worldr1_jax.rewards.reconstruct import thinned
from worldr1_jax.rewards.trajectory import Trajectory

VIDEO = np.zeros((2, 3, 32, 32, 3), np.float32)
PATHS = np.tile(np.eye(4, dtype=np.float32), (2, 3, 1, 1))
WEIGHTS = {"recon": 1.0, "trajectory": 1.0, "general": 1.0}
SSIM = {"likeness": "ssim"}
NANO = {"da3": "nano"}
PROMPTS = ["Camera push in. A red sphere."] * 2


@pytest.fixture(scope="module")
def reward():
    return build({"recon": 1.0, "trajectory": 1.0, "mvcs": 0.0}, recon=SSIM, reconstruct=NANO)


@pytest.mark.parametrize(
    "videos, prompts, paths, words",
    [
        (VIDEO[0], PROMPTS, PATHS, r"want|has to be \(B, F, H, W, 3\)"),
        (VIDEO[..., :1], PROMPTS, PATHS, r"has to be \(B, F, H, W, 3\)"),
        (VIDEO.astype(np.uint8), PROMPTS, PATHS, "uint8: they have to be floats"),
        (VIDEO + 255, PROMPTS, PATHS, r"values from 255 to 255: they have to be in \[0, 1\]"),
        (VIDEO - 1, PROMPTS, PATHS, r"values from -1 to -1: they have to be in \[0, 1\]"),
        (VIDEO, PROMPTS[:1], PATHS, "2 videos and 1 prompts"),
        (VIDEO, "ab", PATHS, "prompts are 'ab': they have to be a list of texts"),
        (VIDEO, ["a", "\ud800"], PATHS, "prompt 2, '.*', has"),
        (VIDEO[:, :, :0], PROMPTS, PATHS, "there is nothing to score"),
        (VIDEO[:0], [], PATHS[:0], "there is nothing to score"),
        (VIDEO, [None, b"a"], PATHS, "they have to be a list of texts"),
        (VIDEO.tolist(), PROMPTS, PATHS, "videos is a list: it has to be an array"),
        (VIDEO, PROMPTS, PATHS * 2, "camtoworld has a matrix that is no pose"),
        (VIDEO, PROMPTS, PATHS + np.eye(4)[3], "camtoworld has a matrix that is no pose"),
        (VIDEO, PROMPTS, PATHS * np.diag([1, 1, -1, 1]), "camtoworld has a matrix that is no pose"),
        (VIDEO, PROMPTS, PATHS + np.nan, "camtoworld has a matrix that is no pose"),
        (VIDEO, PROMPTS, PATHS[:, :2], r"camtoworld has the shape \(2, 2, 4, 4\); 2 videos of 3"),
        (VIDEO[:, :1], PROMPTS, PATHS[:, :1], "a camera path needs 2"),
    ],
)
def test_what_does_not_belong_together_is_named(reward, videos, prompts, paths, words):
    with pytest.raises(ValueError, match=words):
        reward(videos, prompts, paths)


def test_what_is_made_as_it_is_scored_is_looked_at_too(reward):
    with pytest.raises(ValueError, match=r"from 255 to 255: they have to be in \[0, 1\]"):
        reward(VIDEO, PROMPTS, PATHS, decode=lambda some, places: some + 255)


def test_a_name_that_is_no_reward_is_not_off(reward):
    with pytest.raises(ValueError, match="off names 'traj': the rewards are recon"):
        reward(VIDEO, PROMPTS, PATHS, off=("traj",))


def test_prompts_that_were_asked_are_those_of_the_videos():
    found = build({"palette": 1.0})
    for asked, words in (
        ({}, "asked lacks the reward 'palette'"),
        (found.ask(PROMPTS[:1]), r"asked is of \[1\] prompts and there are 2 videos"),
    ):
        with pytest.raises(ValueError, match=words):
            found.score(found.networks, VIDEO, PATHS, asked)


@pytest.mark.parametrize(
    "answer, words",
    [
        (["0.5", "0.25"], "the reward judge gave what are no numbers for numpy: they are <U4"),
        ([1j, 2], "they are complex128"),
        (np.array(["2020", "2021"], "datetime64[Y]"), "they are datetime64"),
        ({"a": 1}, "not 'dict'"),
        ([[1], [1, 2]], "inhomogeneous"),
        ([10**400, 1], "too large"),
        ([[1], [2]], r"of the shape \(2, 1\) for 2 videos"),
    ],
)
def test_what_a_judge_may_not_answer(answer, words):
    with pytest.raises(ValueError, match=words):
        HostFunction(lambda *_: answer, "judge").call(VIDEO, PROMPTS, PATHS)


@pytest.mark.parametrize(
    "answer",
    [[None, 2], np.ma.array([1.0, 2.0], mask=[True, False]), jnp.array([jnp.nan, 2], jnp.bfloat16)],
)
def test_what_a_judge_may_leave_open(answer):
    got = HostFunction(lambda *_: answer, "judge").call(VIDEO, PROMPTS, PATHS)
    np.testing.assert_array_equal(got, np.array([np.nan, 2], np.float32))


def test_rewards_of_one_name_are_refused_and_keep_their_sections():
    with pytest.raises(ValueError, match="are called 'trajectory': give yours another"):
        choose({"trajectory": 1.0, Trajectory(mode="segments"): 0.0})
    with pytest.raises(ValueError, match="names 3: it has to be a name, a Reward or a function"):
        choose({3: 1.0})
    with pytest.raises(ValueError, match="are called '<lambda>'"):
        choose({(lambda *_: 0): 1.0, (lambda *_: 1): 1.0})

    def total(videos, prompts, camtoworld):
        return np.ones(len(prompts))

    with pytest.raises(ValueError, match="are called 'total'"):
        choose({total: 1.0})
    both = {"general": 1.0, "trajectory": 1.0}
    found = choose(both, general={"trajectory": 1.0}, trajectory={"depth_scale": 4.0})
    assert found.rewards["trajectory"].depth_scale == 4.0 and found.weights == {"trajectory": 2.0}
    assert set(choose({MetaView(): 1.0}).rewards) == {"meta_view"}


def test_a_reward_without_a_weight_is_left_out():
    assert dict(choose({"palette": 1.0, "judge": None}).weights) == {"palette": 1.0}


@pytest.mark.parametrize("at_once", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1))])
def test_videos_may_be_made_as_they_are_scored(weights, at_once):
    """From what stands for them, here their bytes, some at a time; the scores are the same."""
    options = {"frame_stride": 8, "da3": str(weights / "da3")}
    reward = build(
        WEIGHTS, general="palette", recon=SSIM, reconstruct=options, videos_at_once=at_once
    )
    truth = nano_videos.sample(5, 4)
    videos = np.asarray(truth.video, np.float32) / 255
    want = reward(videos, truth.captions, truth.camtoworld)
    given = []

    def decode(some, places):
        np.testing.assert_array_equal(some, truth.video[places])
        given.append(len(places))
        return jnp.asarray(some, jnp.float32) / 255

    got = reward(truth.video, truth.captions, truth.camtoworld, decode=decode)
    assert given == [at_once or 4] * (4 // (at_once or 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, want)
    with pytest.raises(ValueError, match="have to be floats"):
        reward(truth.video, truth.captions, truth.camtoworld, decode=lambda some, places: some)


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ({"recon": 1.0, "beauty": 1.0}, {}, "names 'beauty'"),
        ({"recon": 0.0}, {}, "all 0"),
        ({"recon": 1.0}, {"recon": {"likeness": "mse"}}, "recon.likeness is 'mse'"),
        ({"recon": 1.0}, {"recon": {"view": 2}}, "rewards.recon has no field 'view'"),
        ({"recon": 1.0}, {"trajectory": {"mode": "fast"}}, "trajectory.mode is 'fast'"),
        ({"recon": 1.0}, {"reconstruct": {"frame_stride": 0}}, "reconstruct.frame_stride is 0"),
        ({"recon": 1.0}, {"beauty": {}}, "names 'beauty'"),
        ({"general": 1.0}, {"general": {"palette": -1.0}}, "rewards.general is"),
    ],
)
def test_unknown_rewards_fields_and_values_are_named(weights, options, words):
    with pytest.raises(ValueError, match=words):
        choose(weights, **options)


@pytest.mark.slow
def test_videos_that_show_nothing_cannot_be_learnt_from():
    """A black one, a gray one, and one with a single black frame: no path is made up for them."""
    options = {"recon": SSIM, "reconstruct": NANO | {"frame_stride": 8}}
    reward = build({"recon": 1.0, "trajectory": 1.0, "mvcs": 0.0}, **options)
    truth = nano_videos.sample(3, 4)
    videos = jnp.asarray(truth.video, jnp.float32) / 255
    videos = videos.at[0].set(0.0).at[1].set(0.5).at[2, 8].set(0.0)
    scores = reward(videos, truth.captions, truth.camtoworld)
    assert scores.valid.tolist() == [False, False, False, True]
    for name in ("trajectory", "trajectory_rotation", "cam_mc", "mvcs"):
        np.testing.assert_array_equal(np.isfinite(scores.parts[name]), scores.valid, name)
    np.testing.assert_array_equal(np.isfinite(scores.total), scores.valid)
    assert (scores.parts["recon"][:2] < 0.01).all()
    # Where the path does not count, S_recon's gate is what keeps them from winning.
    alone = reward(videos, truth.captions, truth.camtoworld, off=("trajectory",))
    assert alone.valid.all() and (alone.total[:2] < 0.01).all()


@pytest.mark.slow
def test_half_precision_changes_scores_little():
    truth = nano_videos.sample(3, 2)
    video = jnp.asarray(truth.video, jnp.float32) / 255
    options = {
        "recon": SSIM, "trajectory": {"depth_scale": 4.0}, "reconstruct": NANO | {"frame_stride": 4}
    }  # fmt: skip
    scores = [
        build({"recon": 1.0, "trajectory": 1.0}, dtype=dtype, **options)(
            video, truth.captions, truth.camtoworld
        )
        for dtype in ("float32", "bfloat16")
    ]
    for name in ("recon", "trajectory"):
        # bfloat16 keeps three digits; 0.002 is the largest of these scores' changes
        np.testing.assert_allclose(scores[1].parts[name], scores[0].parts[name], atol=0.01)


def numbered(frames, per_frame):
    """Two reconstructions whose Gaussians carry the number of their frame as opacity."""
    _, found = ideal()
    found = jax.tree.map(lambda leaf: leaf, found)
    count = frames * per_frame
    gaussians = jax.tree.map(lambda leaf: leaf[:, :count], found.gaussians)
    frame = jnp.tile(jnp.repeat(jnp.arange(float(frames)), per_frame), (2, 1))
    depth = jnp.ones((2, frames, 4, 4))
    return found.replace(depth=depth, gaussians=gaussians.replace(opacities=frame))


def test_gaussians_of_evenly_spaced_frames_stay():
    found = numbered(5, 3)
    kept = thinned(found, 3).gaussians
    assert kept.opacities.tolist() == [[0.0] * 3 + [2.0] * 3 + [4.0] * 3] * 2
    for leaf, whole in zip(jax.tree.leaves(kept), jax.tree.leaves(found.gaussians), strict=True):
        np.testing.assert_array_equal(leaf[:, 3:6], whole[:, 6:9])
    assert thinned(found, None) is found
    everything = thinned(found, 9).gaussians  # more than there are: all
    np.testing.assert_array_equal(everything.means, found.gaussians.means)
    with pytest.raises(ValueError, match="gaussian_frames is 0"):
        thinned(found, 0)
    odd = jax.tree.map(lambda leaf: leaf[:, :-1], found.gaussians)
    with pytest.raises(ValueError, match="equally many a frame"):
        thinned(found.replace(gaussians=odd), 2)


def test_a_scene_seen_whole_by_each_frame_loses_nothing():
    """Both frames' Gaussians are the same scene twice: half of them draw the same picture, up to
    what a second layer adds where the first is not opaque."""
    video, found = ideal()
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf], 1), found.gaussians)
    half = thinned(found.replace(gaussians=twice), 1)
    score, parts = recon.s_recon(video, half)
    np.testing.assert_allclose(score, 1.0, atol=1e-3)
    assert (parts["psnr"] > 60).all()
