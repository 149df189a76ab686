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
    from worldr1_jax.files import check_writable
    from worldr1_jax.mesh import placement
    from worldr1_jax.policies.base import family
    from worldr1_jax.policies.stages import TextStage
    from worldr1_jax.weights.shipped import resolve
    from worldr1_jax.workdir.metrics import Progress

    config = cli.CONFIG.value
    if config.mesh.data == -1:
        cli.use_cpu_well(BATCH.value)
    found = settings.read(config)
    mesh = settings.make_mesh(found, videos=found.run.videos)
    parts = placement.batch_parts(mesh)
    if BATCH.value < 1 or BATCH.value % parts:
        raise ValueError(f"--batch is {BATCH.value}: the mesh needs a multiple of {parts}")
    if jax.process_count() > 1:
        raise ValueError("encode prompts on one host: a cache is one file")
    texts = settings.texts(found, settings.load_prompts(found))
    made_by, tokens = settings.text_fingerprint(found), found.policy.text_tokens
    dtype, folder = jnp.dtype(found.policy.dtype), resolve(found.policy.weights)
    check_writable(cli.WORKDIR.value)
    encoder = family(folder).load_text(folder, mesh=mesh, tokens=tokens, dtype=dtype)
    each = max(BATCH.value // placement.batch_parts(mesh, "sequences"), 1)
    encode = TextStage(encoder, mesh, at_once=each)

    def rows(prompts):
        _, mask = encoder.tokenize(prompts)
        # The DiT rounds embeddings to this dtype before it uses them: nothing is lost.
        return np.asarray(encode(prompts).astype(dtype)), mask.sum(1)

    unique = len(set(texts))
    progress = Progress(unique, unit="prompt")

    def show(done):
        if done == unique or done * 20 // unique > (done - BATCH.value) * 20 // unique:
            progress.update(done - 1)

    count = text_cache.write(
        cli.WORKDIR.value, texts, rows, made_by=made_by, tokens=tokens,
        batch=BATCH.value, progress=show,
    )  # fmt: skip
    progress.close()
    hint = f"{count} prompts: train with --config.policy.text_cache={cli.WORKDIR.value}"
    if found.algorithm.captions > 1:  # rival captions are written while a run goes on
        hint += " --config.algorithm.contrast=0"
    print(hint)


if __name__ == "__main__":
    cli.run(main, workdir="runs/encoded")
