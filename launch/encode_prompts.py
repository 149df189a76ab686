"""Encodes every prompt of a run once, so that training never holds the text encoder.

python launch/encode_prompts.py --config=configs/world.py:small --config.prompts=prompts \\
    --config.policy.weights=Wan2.1-T2V-1.3B --workdir=prompts/encoded
python launch/tpu_train.py ... --config.policy.text_cache=prompts/encoded
"""

import cli
from absl import flags

BATCH = flags.DEFINE_integer("batch", 8, "prompts at a time; a multiple of the mesh's data x fsdp")


def main() -> None:
    """Writes the cache to workdir: train, dynamic and test prompts, and the negative prompt."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from worldr1_jax import settings
    from worldr1_jax.data import text_cache
    from worldr1_jax.mesh import placement as sharding
    from worldr1_jax.mesh.make import make_mesh
    from worldr1_jax.policies import wan
    from worldr1_jax.policies.stages import TextStage
    from worldr1_jax.weights.shipped import resolve
    from worldr1_jax.workdir.metrics import Progress

    config = cli.CONFIG.value
    if config.mesh.data == -1:
        cli.use_cpu_well(BATCH.value)
    mesh = make_mesh(config.mesh)
    parts = sharding.batch_parts(mesh)
    if BATCH.value < 1 or BATCH.value % parts:
        raise ValueError(f"--batch is {BATCH.value}: the mesh needs a multiple of {parts}")
    if jax.process_count() > 1:
        raise ValueError("encode prompts on one host: a cache is one file")
    texts = settings.texts(config, settings.load_prompts(config))
    made_by = settings.text_fingerprint(config)
    dtype = jnp.dtype(config.policy.dtype)
    encoder, tokenizer = wan.load_text(resolve(config.policy.weights), mesh=mesh, dtype=dtype)
    each = max(BATCH.value // sharding.batch_parts(mesh, "sequences"), 1)
    encode = TextStage(encoder, tokenizer, config.policy.text_tokens, mesh, at_once=each)

    def rows(prompts):
        _, mask = wan.tokenize(tokenizer, prompts, config.policy.text_tokens)
        # The DiT rounds embeddings to this dtype before it uses them: nothing is lost.
        return np.asarray(encode(prompts).astype(dtype)), mask.sum(1)

    unique = len(set(texts))
    progress = Progress(unique, unit="prompt")

    def show(done):
        if done == unique or done * 20 // unique > (done - BATCH.value) * 20 // unique:
            progress.update(done - 1)

    count = text_cache.write(
        cli.WORKDIR.value, texts, rows, made_by=made_by, tokens=config.policy.text_tokens,
        batch=BATCH.value, progress=show,
    )  # fmt: skip
    progress.close()
    print(f"{count} prompts: train with --config.policy.text_cache={cli.WORKDIR.value}")


if __name__ == "__main__":
    cli.run(main, workdir="runs/encoded")
