"""Covariance, projection, extent and spherical harmonics against gsplat's own torch functions."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
reference = pytest.importorskip("gsplat.cuda._torch_impl")

import jax  # noqa: E402

from tests.splat.test_splat import SIZE, scene  # noqa: E402
from worldr1_jax import geometry  # noqa: E402
from worldr1_jax.splat import projection  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5  # float32 on both sides, other orders of summation


def tensor(array):
    return torch.from_numpy(np.array(array))


def close(ours, theirs, tolerance=TOLERANCE):
    theirs = theirs.numpy()
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


def test_covariance():
    gaussians, _, _ = scene(count=500)
    theirs, _ = reference._quat_scale_to_covar_preci(
        tensor(gaussians.quaternions), tensor(gaussians.scales), compute_preci=False
    )
    close(projection.covariance(gaussians.quaternions, gaussians.scales), theirs)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_harmonics(degree):
    gaussians, _, _ = scene(count=500)
    sh = gaussians.sh[:, : (degree + 1) ** 2]
    directions = projection._unit(gaussians.means)
    theirs = reference._spherical_harmonics(degree, tensor(directions), tensor(sh))
    close(geometry.harmonics(sh, directions), theirs)


def test_projection():
    gaussians, poses, matrices = scene(count=2000)
    covariance = projection.covariance(gaussians.quaternions, gaussians.scales)
    height, width = SIZE
    radii, means, depths, conics, _ = reference._fully_fused_projection(
        tensor(gaussians.means),
        tensor(covariance),
        torch.linalg.inv(tensor(poses)),
        tensor(matrices),
        width,
        height,
        near_plane=0.01,
    )
    ours = jax.vmap(lambda pose, k: projection.project(gaussians, pose, k, SIZE))(poses, matrices)
    visible = np.asarray(ours.visible)
    assert visible.sum() > 1000
    # gsplat's torch version ignores opacity and rounds boxes up, so it sees a superset.
    assert (radii.numpy() > 0).all(-1)[visible].all()
    rows = np.asarray(ours.rows)[visible]
    kept = torch.from_numpy(visible)
    # Means are compared in pixels of the image: far outside it they reach thousands of pixels.
    close(rows[:, :2], means[kept])
    close(rows[:, -1], depths[kept])
    error = np.abs(rows[:, 2:5] - conics[kept].numpy())
    scale = np.abs(conics[kept].numpy()).max(-1, keepdims=True)
    # A conic is an inverse: its relative error is the covariance's times its condition number.
    assert np.quantile(error / scale, 0.99) <= TOLERANCE
    assert (error / scale).max() <= 1e-3


def test_extent():
    """Half sides of boxes. Their torch version takes 3.33 standard deviations whatever the opacity
    and rounds up; their CUDA has the rule that is ours, which is applied here to their variances.
    """
    gaussians, poses, matrices = scene(count=2000)
    height, width = SIZE
    solid = gaussians.replace(opacities=gaussians.opacities * 0 + 1.01)  # 3.33 binds above 1.004
    covariance = tensor(projection.covariance(gaussians.quaternions, gaussians.scales))
    views = torch.linalg.inv(tensor(poses))
    camera = (tensor(gaussians.means), covariance, views)
    means, covariance_c = reference._world_to_cam(*camera)
    _, flat = reference._persp_proj(means, covariance_c, tensor(matrices), width, height)
    deviations = torch.sqrt(torch.diagonal(flat, dim1=-2, dim2=-1) + projection.EPS2D).numpy()
    rounded, *_ = reference._fully_fused_projection(
        *camera, tensor(matrices), width, height, near_plane=projection.NEAR
    )

    def radii(gaussians):
        def one(pose, k):
            return projection.project(gaussians, pose, k, SIZE)

        views = jax.vmap(one)(poses, matrices)
        return np.asarray(views.radii), np.asarray(views.visible)

    ours, visible = radii(solid)
    assert visible.sum() > 1000
    np.testing.assert_allclose(ours[visible], 3.33 * deviations[visible], rtol=TOLERANCE)
    whole = np.ceil(ours[visible])
    edge = np.abs(ours[visible] - np.round(ours[visible])) < TOLERANCE * ours[visible]
    assert ((whole == rounded.numpy()[visible]) | edge).all()
    ours, visible = radii(gaussians)
    sigmas = np.minimum(3.33, np.sqrt(2 * np.log(np.asarray(gaussians.opacities) * 255)))
    wanted = sigmas[None, :, None] * deviations
    np.testing.assert_allclose(ours[visible], wanted[visible], rtol=TOLERANCE)
