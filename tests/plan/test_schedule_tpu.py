"""The planner's kernels against published measurements; needs libtpu but no TPU."""

import pytest

from tests.measure import kernels
from worldr1_jax.mesh.chips import CHIPS
from worldr1_jax.plan import schedule

pytest.importorskip("libtpu")


def test_an_attention_kernel_takes_what_was_measured():
    """maxdiffusion's Wan2.1 14B I2V, 720x1280x81, on v6e:2x4 (data 2, context 4): jax's splash
    attention, Ulysses. From its pull requests: 491.22 s for a batch of 2 and 251.45 s for one, of
    40 steps, so that a step takes (491.22 - 251.45) / 40 s. Of it, XLA's operations take 2.085 s
    and links 0.041 s, by the compiler's estimate of maxdiffusion's own program with its own flags.
    The rest are 40 layers of 40 / 4 heads.
    """
    step, others, layers = (491.22 - 251.45) / 40, 2.085 + 0.041, 40
    seconds, flops = kernels.attention("v6e:2x2", heads=10, tokens=75600)
    assert layers * seconds == pytest.approx(step - others, rel=schedule.ERROR)
    assert others + layers * seconds == pytest.approx(step, rel=schedule.ERROR)
    # 0.32 of the peak, and not the 0.6 that heads of 128 might reach on it.
    assert 0.27 < flops / seconds / 918e12 < 0.37


@pytest.mark.parametrize(("topology", "most"), [("v5e:2x2", 1.0), ("v5p:2x2x1", 0.5)])
def test_a_backward_kernel_is_read_and_takes_no_less_than_its_products(topology, most):
    """v5p's runs on one of its two cores."""
    seconds, flops = kernels.attention(topology, heads=2, tokens=2048, backward=True)
    share = flops / seconds / CHIPS[topology.split(":")[0]].peak
    assert 0.7 * most < share < most
