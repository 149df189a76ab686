"""S_recon: hand numbers for SSIM, an ideal reconstruction, and videos that must not win."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.splat.test_splat import scene
from worldr1_jax.mesh import arrays
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.rewards import consistency, likeness, recon
from worldr1_jax.splat import render as splat
from worldr1_jax.types import Reconstruction

SIZE = (24, 28)
s_recon = jax.jit(recon.s_recon, static_argnames=("views", "perceptual", "texture_min"))


def ideal(batch=2):
    """Videos of two frames that are renders of their own Gaussians."""
    gaussians, poses, matrices = scene(count=200, opacity=(0.5, 1.0), size=SIZE)
    video, depth, _, _ = splat.render(gaussians, poses, matrices, SIZE)
    found = Reconstruction(depth, jnp.ones_like(depth), poses, matrices, gaussians)
    stack = lambda leaf: jnp.stack([leaf] * batch)  # noqa: E731
    video = jnp.clip(video, 0, 1)
    return stack(video), jax.tree.map(stack, found)


def test_ssim_of_constants_by_hand():
    """Flat images: the structure term is 1 and brightness is (2ab + C1) / (a^2 + b^2 + C1)."""
    a, b = jnp.full((9, 9, 3), 0.2), jnp.full((9, 9, 3), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)
    assert float(likeness.ssim(a, b)) == pytest.approx(expected, abs=1e-3)


def test_ssim_of_opposites_by_hand():
    """One 7 px window of a zero-mean pattern and its negative: -(2v - C2) / (2v + C2)."""
    taps = np.exp(-0.5 * ((np.arange(7) - 3) / 1.5) ** 2)
    window = np.outer(taps, taps) / taps.sum() ** 2
    pattern = np.random.default_rng(0).normal(size=(7, 7)) * 0.1
    pattern -= (window * pattern).sum()
    variance = (window * pattern**2).sum()
    images = jnp.asarray(np.repeat(pattern[..., None], 3, -1), jnp.float32)
    expected = (-2 * variance + 9e-4) / (2 * variance + 9e-4)
    assert float(likeness.ssim(images, -images)) == pytest.approx(expected, rel=1e-4)


def test_psnr_by_hand():
    assert float(likeness.psnr(jnp.zeros((4, 4, 3)), jnp.full((4, 4, 3), 0.1))) == pytest.approx(20)
    assert float(likeness.psnr(jnp.ones((4, 4, 3)), jnp.ones((4, 4, 3)))) == pytest.approx(100)


def test_an_ideal_reconstruction_scores_one():
    video, found = ideal()
    score, parts = s_recon(video, found)
    np.testing.assert_allclose(score, 1.0, atol=1e-3)
    assert (parts["psnr"] > 60).all() and (parts["coverage"] > 0.5).all()
    assert set(parts) == {"psnr", "ssim", "coverage", "texture", "texture_least"}


def test_the_same_instants_are_compared():
    """Frames in the wrong order score less, also when only some of them are looked at."""
    video, found = ideal()
    right, _ = s_recon(video, found, views=1)
    wrong, _ = s_recon(video[:, ::-1], found, views=1)
    assert (right > 0.99).all() and (wrong < 0.8).all()


@pytest.mark.slow
@pytest.mark.parametrize(("context", "tensor"), [(2, 2), (4, 1), (1, 2)])
def test_devices_that_hold_the_same_video_share_its_views(context, tensor):
    """All scores and parts are those of one device, also where devices do not divide the views."""
    video, found = ideal()
    three = lambda leaf: jnp.concatenate([leaf, leaf[:, :1]], axis=1)  # noqa: E731
    video, poses, matrices = three(video), three(found.camtoworld), three(found.intrinsics)
    found = found.replace(camtoworld=poses, intrinsics=matrices)
    video = jnp.clip(video + 0.1 * jax.random.normal(jax.random.key(0), video.shape), 0, 1)
    asks = {"change_floor": 0.3, "change_min": 0.5, "moves": jnp.array([True, False])}
    want = jax.jit(lambda v, f: recon.s_recon(v, f, **asks))(video, found)
    sizes = {"data": 2, "context": context, "tensor": tensor}
    mesh = make_mesh(sizes, jax.devices()[: 2 * context * tensor])
    with jax.set_mesh(mesh):
        own = lambda v, f, moves: recon.s_recon(  # noqa: E731
            v, f, shared=("context", "tensor"), **{**asks, "moves": moves}
        )
        got = jax.jit(arrays.each_device(own))(video, found, asks["moves"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_blank_videos_do_not_win():
    """Gray explained by gray walls, and black explained by nothing: SSIM 1, score 0."""
    video, found = ideal()
    empty = found.gaussians.replace(opacities=jnp.zeros_like(found.gaussians.opacities))
    score, parts = s_recon(jnp.zeros_like(video), found.replace(gaussians=empty))
    np.testing.assert_allclose(parts["ssim"], 1.0, atol=1e-5)
    np.testing.assert_allclose(score, 0.0, atol=1e-3)
    video = jnp.zeros_like(video)
    ungated, _ = s_recon(video, found.replace(gaussians=empty), texture_min=0.0)
    np.testing.assert_allclose(ungated, 1.0, atol=1e-5)
    assert float(likeness.texture(jnp.full((1, 2, 24, 24, 3), 0.7)).max()) < 1e-4


def test_the_frame_that_shows_least_is_found_among_all():
    """Also when it is none of those that are rendered again."""
    video, found = ideal()
    _, before = s_recon(video, found, views=1)
    _, after = s_recon(video.at[0, 1].set(0.3), found, views=1)
    assert float(after["texture_least"][0]) < likeness.BLANK < float(before["texture_least"][0])
    np.testing.assert_array_equal(after["texture"], before["texture"])
    np.testing.assert_array_equal(after["texture_least"][1], before["texture_least"][1])


def test_perceptual_distance_replaces_ssim():
    video, found = ideal()
    score, parts = s_recon(video, found, perceptual=lambda a, b: jnp.full(a.shape[0], 0.3))
    np.testing.assert_allclose(score, 0.7, atol=1e-6)
    np.testing.assert_allclose(parts["perceptual"], 0.3, atol=1e-6)


def test_mvcs_of_a_plane_by_hand():
    """A wall at depth 2, and a camera that has come 0.5 closer: depths 2 and 1.5 agree fully.

    With the second depth a tenth too large, the 56 pixels of the first frame that the second one
    sees agree by 1.5 / 1.65, and the 108 of the second by 2 / 2.15.
    """
    depth = jnp.stack([jnp.full((9, 12), 2.0), jnp.full((9, 12), 1.5)])[None]
    poses = jnp.tile(jnp.eye(4), (1, 2, 1, 1)).at[0, 1, 2, 3].set(0.5)
    matrix = jnp.array([[10.0, 0, 6], [0, 10, 4.5], [0, 0, 1]])
    matrices = jnp.tile(matrix, (1, 2, 1, 1))
    np.testing.assert_allclose(consistency.mvcs(depth, poses, matrices), 1.0, atol=1e-5)
    wrong = consistency.mvcs(depth.at[:, 1].multiply(1.1), poses, matrices)
    expected = (56 / 1.1 + 108 * 2 / 2.15) / (56 + 108)
    np.testing.assert_allclose(wrong, expected, atol=1e-4)
    assert np.isnan(consistency.mvcs(depth[:, :1], poses[:, :1], matrices[:, :1])[0])


def test_flaws_weigh_more_when_nothing_moves():
    """With a floor of the change, a flaw in the re-render of one frame over and over costs more
    where a movement is asked for than where none is; a video that is explained keeps its 1."""
    video, found = ideal()
    still = jnp.repeat(video[:, :1], 2, axis=1)
    poses = jnp.repeat(found.camtoworld[:, :1], 2, axis=1)
    moves = jnp.array([True, False])
    moving = jax.jit(partial(recon.s_recon, change_floor=0.1))
    score, _ = moving(still, found.replace(camtoworld=poses), moves=moves)
    assert score[1] > 0.99
    slightly_off = jnp.clip(still + 0.15 * jax.random.normal(jax.random.key(0), still.shape), 0, 1)
    score, _ = moving(slightly_off, found.replace(camtoworld=poses), moves=moves)
    assert score[0] < score[1]
    right, _ = moving(video, found, moves=moves)
    np.testing.assert_allclose(right, 1.0, atol=2e-2)


def test_stillness_can_be_priced_by_a_gate():
    """A video that stands still where movement is asked for gets nothing; half the change asked for
    gets half; where a fixed camera is asked for, and where enough happens, nothing changes."""
    video, found = ideal()
    gated = jax.jit(recon.s_recon, static_argnames="change_min")
    moves = jnp.array([True, False])
    right, _ = gated(video, found, change_min=0.1, moves=moves)
    np.testing.assert_allclose(right, 1.0, atol=1e-3)
    change = 1 - float(likeness.ssim(video[0, 0], video[0, 1]))
    half, _ = gated(video, found, change_min=2 * change, moves=moves)
    np.testing.assert_allclose(half, [0.5, 1.0], atol=1e-3)
    still = jnp.repeat(video[:, :1], 2, axis=1)
    poses = jnp.repeat(found.camtoworld[:, :1], 2, axis=1)
    score, _ = gated(still, found.replace(camtoworld=poses), change_min=0.1, moves=moves)
    np.testing.assert_allclose(score, [0.0, 1.0], atol=1e-3)


def test_failures_stay_nan():
    video, found = ideal()
    broken = found.gaussians.replace(means=found.gaussians.means.at[1, 3, 0].set(jnp.nan))
    score, parts = s_recon(video, found.replace(gaussians=broken))
    assert np.isfinite(score[0]) and np.isnan(score[1]) and np.isnan(parts["psnr"][1])


def test_bad_arguments_are_named():
    video, found = ideal()
    with pytest.raises(ValueError, match="video has shape"):
        recon.s_recon(video[:, :1], found)
    with pytest.raises(ValueError, match="views is 3"):
        recon.s_recon(video, found, views=3)
