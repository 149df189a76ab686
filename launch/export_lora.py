"""Trained adapters as safetensors that diffusers and peft load without renaming.

python launch/export_lora.py --config=configs/world.py --adapters=runs/world --workdir=exported

writes exported/pytorch_lora_weights.safetensors, for WanPipeline.load_lora_weights, or with
--form=peft adapter_model.safetensors and adapter_config.json. LoRA that others trained is read as
well, so this also turns one form into another.
"""

import cli
from absl import flags

ADAPTERS = flags.DEFINE_multi_string(
    "adapters", [], "workdir of a run, or a file or folder of LoRA, PATH:0.8 for a strength"
)
KIND = flags.DEFINE_enum("kind", "ema", ("ema", "last"), "which adapters of a run")
FORMS = ("diffusers", "peft", "comfyui")
FORM = flags.DEFINE_enum("form", "diffusers", FORMS, "whose names and files")


def main() -> None:
    """Writes one file of LoRA to workdir."""
    from worldr1_jax import settings
    from worldr1_jax.models.wan import lora_files

    found = settings.load_adapters(settings.read(cli.CONFIG.value), ADAPTERS.value, KIND.value)
    if found is None:
        raise ValueError("--adapters is empty: give the workdir of a run, or a file of LoRA")
    lora_files.save(found, cli.WORKDIR.value, FORM.value)
    print(f"wrote {lora_files.FORMS[FORM.value][0]} to {cli.WORKDIR.value}")


if __name__ == "__main__":
    cli.run(main, workdir="runs/lora")
