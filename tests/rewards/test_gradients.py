"""Gradients of the rewards where formulas have corners: finite, and those of finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rewards.test_recon import ideal
from tests.splat.test_splat import SIZE, scene
from worldr1_jax.camera import trajectory as paths
from worldr1_jax.geometry import length, root, rotation_angle
from worldr1_jax.nano import palette
from worldr1_jax.rewards import consistency, likeness, recon, released, trajectory
from worldr1_jax.splat import render as splat


def slope(function, at, direction, step):
    """Central difference along a direction."""
    return (function(at + step * direction) - function(at - step * direction)) / (2 * step)


def agree(function, at, *, step, where=1.0, tolerance=0.03, seed=0):
    """Every gradient is finite, and its product with a direction that is 0 outside `where` (the
    gradient's own, half mixed with noise) is the slope along it."""
    both = jax.jit(jax.value_and_grad(function))
    gradient = both(at)[1]
    assert np.isfinite(gradient).all()
    noise = jax.random.normal(jax.random.key(seed), at.shape)
    direction = where * (gradient / jnp.linalg.norm(gradient) + noise / jnp.linalg.norm(noise))
    direction = direction / jnp.linalg.norm(direction)
    want = float(jnp.sum(gradient * direction))
    got = float(slope(lambda x: both(x)[0], at, direction, step))
    assert got == pytest.approx(want, rel=tolerance)


def test_root_and_length():
    values = jnp.array([0.0, 4.0, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(root(values), [0.0, 2.0, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(jax.grad(lambda v: root(v)[:2].sum())(values)[:2], [0.0, 0.25])
    np.testing.assert_array_equal(jax.grad(lambda v: root(v, 5.0)[1])(values)[1], 0.0)
    vectors = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_array_equal(length(vectors), [0.0, 5.0])
    slopes = jax.grad(lambda v: length(v).sum())(vectors)
    np.testing.assert_allclose(slopes, [[0, 0], [0.6, 0.8]], rtol=1e-6)


def with_flat_patch():
    """Videos with a patch of one gray, and where a change leaves that patch's windows flat. Noise
    elsewhere, or holes of the render would be flat too."""
    video, found = ideal(1)
    video = 0.1 + 0.8 * video + 0.1 * jax.random.uniform(jax.random.key(9), video.shape)
    video = video.at[:, :, :14, :14].set(0.3)
    return video, found, jnp.ones_like(video).at[:, :, :14, :14].set(0.0)


def test_texture_of_a_flat_patch():
    video, _, free = with_flat_patch()
    agree(lambda v: likeness.texture(v).sum(), video, step=0.03, where=free)


def test_s_recon_by_the_video():
    """With the gates of texture and change half open, so that all have a slope."""
    video, found, free = with_flat_patch()
    asks = {"texture_min": 0.5, "change_floor": 0.1, "change_min": 0.9}
    loss = lambda v: recon.s_recon(v, found, **asks)[0].sum()  # noqa: E731
    agree(loss, video, step=0.03, where=free)


def test_s_recon_by_the_reconstruction():
    """No gradient is NaN, whatever it is of; that of the colours has the right slope."""
    video, found, _ = with_flat_patch()
    both = jax.jit(jax.value_and_grad(lambda found: recon.s_recon(video, found)[0].sum()))
    gradient = both(found)[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    along = gradient.gaussians.sh / jnp.linalg.norm(gradient.gaussians.sh)

    def of_colour(sh):
        return both(found.replace(gaussians=found.gaussians.replace(sh=sh)))[0]

    want = float(jnp.linalg.norm(gradient.gaussians.sh))
    assert float(slope(of_colour, found.gaussians.sh, along, 0.03)) == pytest.approx(want, rel=0.03)


def turned(asked, twist):
    """A path [F 4 4] whose frames after the first are moved by small twists [F-1 6]."""
    x, y, z = twist[:, 3:].T
    o = jnp.zeros_like(x)
    generator = jnp.stack([jnp.stack(row, -1) for row in ((o, -z, y), (z, o, -x), (-y, x, o))], -2)
    rotation = jax.scipy.linalg.expm(generator)
    upper = jnp.concatenate([rotation, twist[:, :3, None]], -1)
    step = jnp.concatenate([upper, jnp.broadcast_to(jnp.eye(4)[3:], (len(twist), 1, 4))], -2)
    later = jnp.matmul(asked[1:], step, precision="highest")
    return jnp.concatenate([asked[:1], later])


@pytest.mark.parametrize("score", ["paper", "released", "errors"])
def test_s_traj(score):
    """Frame 0 is always at no distance and no angle; on the very path all of them are."""
    names = ["push_in", "pan_left", "orbit_right", "fixed"]
    asked = [paths.path([name], 5, magnitudes=paths.Magnitudes.nano()) for name in names]
    asked = jnp.asarray(np.stack(asked))

    def loss(twist):
        pair = asked, jax.vmap(turned)(asked, twist)
        if score == "errors":
            return sum(x.sum() for x in trajectory.errors(*pair, depth_scale=4.0).values())
        if score == "released":
            return released.s_traj(*pair).sum()
        return trajectory.s_traj(*pair, depth_scale=4.0).sum()

    exact = jax.jit(jax.grad(loss))(jnp.zeros((4, 4, 6)))
    assert np.isfinite(exact).all()
    if score == "paper":
        np.testing.assert_allclose(exact, 0.0, atol=1e-3)  # the best path there is
    if score != "released":  # its fit by singular values has slopes of its own
        noise = 0.03 * jax.random.normal(jax.random.key(3), (4, 4, 6))
        agree(loss, noise, step=1e-3)


def test_rotation_angle_at_the_identity():
    assert np.isfinite(jax.grad(lambda m: rotation_angle(m))(jnp.eye(3))).all()


def test_mvcs():
    _, found = ideal(1)
    loss = lambda d: consistency.mvcs(d, found.camtoworld, found.intrinsics).sum()  # noqa: E731
    y, x = np.mgrid[: SIZE[0] + 4, : SIZE[1]] / 10
    depth = jnp.asarray(3 + 0.3 * np.sin(x) * np.cos(y), jnp.float32)
    depth = jnp.broadcast_to(depth[: found.depth.shape[2]], found.depth.shape)
    agree(loss, depth * jnp.array([1.0, 1.2])[:, None, None], step=1e-3)


def test_palette_of_black_frames():
    """Black stays without a slope; what is lit has its own."""
    named = palette.targets(["A red sphere and a white box."])
    rng = np.random.default_rng(0)
    video = jnp.asarray(rng.uniform(0.3, 1, (1, 2, 9, 9, 3)), jnp.float32)
    video = video.at[:, :, 3:].set(0.0)
    lit = jnp.ones_like(video).at[:, :, 3:].set(0.0)
    agree(lambda v: palette.palette(v, named).sum(), video, step=1e-3, where=lit)


@pytest.mark.slow
def test_degenerate_gaussians():
    """They are not drawn, have no gradient, and spoil none."""
    good, poses, matrices = scene(count=40, opacity=(0.3, 0.9))
    bad = jax.tree.map(lambda leaf: leaf[:8] * 1.0, good)
    bad = bad.replace(
        quaternions=bad.quaternions.at[0].set(0.0).at[1, 2].set(jnp.nan),
        means=bad.means.at[2].set(jnp.inf).at[3].set(1e30),
        scales=bad.scales.at[4].set(1e12).at[5, 1].set(jnp.inf),
        opacities=bad.opacities.at[6].set(jnp.nan),
        sh=bad.sh.at[7, 3].set(jnp.nan),
    )
    bad = bad.replace(means=bad.means.at[4:].set(jnp.array([0.0, 0.0, 2.0])))
    target = jax.random.normal(jax.random.key(1), (2, *SIZE, 3))

    @jax.jit
    @jax.grad
    def gradient(gaussians):
        return jnp.sum(splat.render(gaussians, poses, matrices, SIZE).rgb * target)

    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), bad, good)
    images = [splat.render(gaussians, poses, matrices, SIZE) for gaussians in (good, both)]
    np.testing.assert_allclose(images[1].rgb, images[0].rgb, atol=1e-6)
    for ours, wanted in zip(*map(jax.tree.leaves, (gradient(both), gradient(good))), strict=True):
        np.testing.assert_array_equal(ours[:8], 0.0)
        np.testing.assert_allclose(ours[8:], wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


@pytest.mark.slow
def test_a_scene_seen_from_beyond_its_near_plane():
    gaussians, poses, matrices = scene(count=40)
    near = splat.render(gaussians, poses, matrices, SIZE, near=1.5)
    camera = jnp.matmul(gaussians.means - poses[0, :3, 3], poses[0, :3, :3], precision="highest")
    cut = gaussians.replace(opacities=jnp.where(camera[:, 2] > 1.5, gaussians.opacities, 0.0))
    wanted = splat.render(cut, poses[:1], matrices[:1], SIZE)
    np.testing.assert_allclose(near.rgb[0], wanted.rgb[0], atol=1e-6)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), gaussians)
    both = splat.render(
        batch, *(jnp.stack([x, x]) for x in (poses, matrices)), SIZE, near=jnp.array([0.01, 1.5])
    )
    np.testing.assert_allclose(both.rgb[1], near.rgb, atol=1e-6)
    whole = splat.render(gaussians, poses, matrices, SIZE)  # another program, which rounds anew
    np.testing.assert_allclose(both.rgb[0], whole.rgb, atol=1e-6)
