"""Published weights, of either layout, to one folder that later starts restore onto any mesh.

python launch/convert_weights.py --config=configs/world.py:small \\
    --config.policy.weights=Wan2.1-T2V-1.3B --workdir=weights/wan-1.3b
python launch/tpu_train.py --config=configs/world.py:small --config.policy.weights=weights/wan-1.3b

--adapters folds trained adapters into the kernels. --form=diffusers writes safetensors that
diffusers reads instead of Orbax.
"""

import cli
from absl import flags

ADAPTERS = flags.DEFINE_multi_string(
    "adapters",
    [],
    "workdir of a run, or LoRA, to fold into the transformer, PATH:0.8 for a strength",
)
KIND = flags.DEFINE_enum("kind", "ema", ("ema", "last"), "which adapters of a run")
FORM = flags.DEFINE_enum("form", "orbax", ("orbax", "diffusers"), "what is written")


def main() -> None:
    """Writes transformer, vae, text_encoder and tokenizer to workdir."""
    import jax.numpy as jnp

    from worldr1_jax import settings
    from worldr1_jax.policies.base import family
    from worldr1_jax.weights.shipped import resolve

    found = settings.read(cli.CONFIG.value)
    folder = resolve(found.policy.weights)
    folded = family(folder).read_adapters(ADAPTERS.value, folder, KIND.value)
    family(folder).store(
        folder, cli.WORKDIR.value, mesh=settings.make_mesh(found, videos=found.run.videos),
        dtype=jnp.dtype(found.policy.dtype), form=FORM.value,
        adapters=folded.adapters or None, differences=folded.differences or None,
        shift=found.sample.shift,
    )  # fmt: skip
    print(f"--config.policy.weights={cli.WORKDIR.value} starts from these weights")


if __name__ == "__main__":
    cli.run(main, workdir="runs/weights")
