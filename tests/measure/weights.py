"""Parameters of every published network that a run reads, counted from our modules' shapes.

python -m tests.measure.weights     # the table of docs/wan.md
"""

import math
from collections.abc import Callable

import jax
from flax import nnx

from worldr1_jax.models import lpips, umt5
from worldr1_jax.models.da3 import config as da3_config
from worldr1_jax.models.da3 import model as da3
from worldr1_jax.models.wan import dit, vae

NETWORKS: dict[str, Callable[[], nnx.Module]] = {
    "DiT 1.3B": lambda: dit.WanDiT(dit.Config.wan_1_3b(), rngs=nnx.Rngs(0)),
    "DiT 14B": lambda: dit.WanDiT(dit.Config.wan_14b(), rngs=nnx.Rngs(0)),
    "VAE": lambda: vae.WanVAE(vae.Config.wan2_1(), rngs=nnx.Rngs(0)),
    "UMT5-XXL encoder": lambda: umt5.UMT5Encoder(umt5.Config.xxl(), rngs=nnx.Rngs(0)),
    "Depth Anything 3 giant": lambda: da3.DA3(da3_config.Config.giant(), rngs=nnx.Rngs(0)),
    "LPIPS": lambda: lpips.LPIPS(nnx.Rngs(0)),
}


def parameters(make: Callable[[], nnx.Module]) -> int:
    """Numbers in all leaves; nothing is allocated."""
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def main() -> None:
    """Prints a row a network: parameters, and bytes in bfloat16 and float32."""
    for name, make in NETWORKS.items():
        count = parameters(make)
        print(f"{name:24}{count / 1e9:9.3f} B{2 * count / 1e9:9.2f} GB{4 * count / 1e9:9.2f} GB")


if __name__ == "__main__":
    main()
