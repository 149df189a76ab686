"""One frame of the warp against the published rules written as a plain loop over pixels.

The published code needs a package of its author's for its image operations, so its rules are
stated here once more, independently: groups are found as sets of copies, in Python.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.camera import noise_warp

pytestmark = pytest.mark.parity


def _loop(offset, weight, flow, subpixel):
    """Coefficient of each source's noise in each output pixel; next offsets and weights."""
    height, width = flow.shape[:2]
    cells = [(y, x) for y in range(height) for x in range(width)]
    lands, residual, groups = {}, {}, {cell: [] for cell in cells}
    for cell in cells:
        move = flow[cell] + offset[cell]
        to = (cell[0] + int(np.rint(move[1])), cell[1] + int(np.rint(move[0])))
        if to in groups:
            lands.setdefault(to, []).append(cell)
            groups[cell].append(("shrink", to))
            residual[cell] = move - np.rint(move)
    for cell in cells:
        back = flow[cell]
        source = (int(np.rint(cell[0] - back[1])), int(np.rint(cell[1] - back[0])))
        if cell not in lands and source in groups:
            groups[source].append(("expand", cell))
    share = {cell: weight[cell] / max(len(groups[cell]), 1) for cell in cells}
    index = {cell: number for number, cell in enumerate(cells)}
    coefficients = np.zeros((len(cells), len(cells)))
    next_weight, next_offset = np.ones((height, width)), np.zeros((height, width, 2))
    for source, copies in groups.items():
        for kind, to in copies:
            scale = 1 / np.sqrt(len(copies))
            if kind == "expand":
                next_weight[to], next_offset[to] = share[source], offset[source]
            else:
                scale *= share[source] / np.sqrt(sum(share[s] ** 2 for s in lands[to]))
            coefficients[index[to], index[source]] += scale
    for to, sources in lands.items():
        next_weight[to] = sum(share[s] for s in sources)
        next_offset[to] = sum(share[s] * residual[s] for s in sources) / next_weight[to]
    next_weight = (next_weight / next_weight.mean() + 1e-5) ** 0.9999
    return coefficients, next_offset if subpixel else offset, next_weight


@pytest.mark.parametrize("subpixel", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_frames_against_a_loop(seed, subpixel):
    rng = np.random.default_rng(seed)
    height, width = 9, 11
    pixels = height * width
    offset, weight = np.zeros((height, width, 2)), np.ones((height, width))
    grid = noise_warp.Grid(jnp.zeros((pixels, 2)), jnp.ones(pixels))
    y, x = np.mgrid[:height, :width] - np.array([height, width])[:, None, None] / 2
    for zoom in (0.2, -0.15, 0.1):
        flow = np.stack([x, y], -1) * zoom + rng.normal(0, 0.4, (height, width, 2)) + 0.6
        coefficients, offset, weight = _loop(offset, weight, flow, subpixel)
        grid, moves = noise_warp.move_grid(grid, jnp.asarray(flow, jnp.float32), subpixel=subpixel)
        ours = noise_warp.move_noise(jnp.eye(pixels), moves, jnp.zeros((pixels, pixels)))
        # 1e-5: float32 against float64, values of order one.
        np.testing.assert_allclose(ours, coefficients, atol=1e-5)
        np.testing.assert_allclose(grid.weight, weight.ravel(), rtol=1e-5)
        np.testing.assert_allclose(grid.offset, offset.reshape(-1, 2), atol=1e-5)
