"""Networks, each with its publisher's names and a strict loader; a folder or a file each."""

from worldr1_jax.models import da3, lpips, umt5
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae

__all__ = ["da3", "lpips", "umt5", "wan_dit", "wan_vae"]
