"""Prompts to videos: base model or trained adapters, one mp4 each.

python launch/generate.py --config=configs/world.py --prompt="Camera push in. A red sphere."
python launch/generate.py --config=configs/world.py --prompts=prompts.txt --adapters=runs/world
python launch/generate.py --config=configs/world.py:small --config.policy.weights=Wan2.1-T2V-1.3B \\
    --prompts=- --adapters=someones_lora.safetensors --sampler=unipc --workdir=videos < prompts.txt

Whatever the config says can be set: --config.seed, --config.sample.steps, .shift, .guidance,
.negative_prompt, --config.camera.mode (initial, step or none), .strength, --config.frames, .height,
.width, --config.mesh.fsdp. The same prompt, seed and batch give the same bytes.
"""

import cli
from absl import flags

PROMPT = flags.DEFINE_multi_string("prompt", [], "a prompt; may be given more than once")
PROMPTS = flags.DEFINE_string("prompts", "", "text file with a prompt a line; -: standard input")
ADAPTERS = flags.DEFINE_multi_string(
    "adapters",
    [],
    "workdir of a run, or a file or folder of LoRA, PATH:0.8 for a strength; may be given again; "
    "none: the base model",
)
KIND = flags.DEFINE_enum("kind", "ema", ("ema", "last"), "which adapters of a run")
SAMPLER = flags.DEFINE_enum("sampler", "euler", ("euler", "unipc"), "solver of the flow's ODE")
ORDER = flags.DEFINE_integer("order", 2, "of unipc: 1, 2 or 3")
SAMPLES = flags.DEFINE_integer("samples", 1, "videos per prompt", lower_bound=1)
BATCH = flags.DEFINE_integer(
    "batch", 0, "videos at a time; 0: one for each part of the mesh", lower_bound=0
)


def main() -> None:
    """Writes workdir/<words of the prompt>-<its hash>-<number>-<hash of all else>.mp4, each as soon
    as it is made."""
    import jax

    from worldr1_jax import preflight, settings
    from worldr1_jax.camera import trajectory
    from worldr1_jax.files import check_writable
    from worldr1_jax.media import write_mp4
    from worldr1_jax.mesh import placement
    from worldr1_jax.policies import generate
    from worldr1_jax.rollout import unipc
    from worldr1_jax.workdir.metrics import Progress

    config = cli.CONFIG.value
    prompts = [*PROMPT.value, *(generate.read_prompts(PROMPTS.value) if PROMPTS.value else [])]
    prompts = list(dict.fromkeys(prompts))
    if not prompts:
        raise ValueError("there is no prompt: give --prompt='...' or --prompts=file (-: stdin)")
    wanted = len(prompts) * SAMPLES.value
    if config.mesh.data == -1:
        cli.use_cpu_well(BATCH.value or max(wanted, 1))
    found = settings.read(config)
    mesh = settings.make_mesh(found, videos=found.run.videos)
    preflight.check_policy(found)
    if found.policy.adapters:
        raise ValueError("policy.adapters is what training starts from: sample with --adapters")
    if flags.FLAGS["order"].present and SAMPLER.value != "unipc":
        raise ValueError("--order is of --sampler=unipc")
    batch = BATCH.value or placement.batch_parts(mesh)
    trajectory.check_fit(prompts, found.run.frames)
    generate.check(prompts, mesh, found.run.seed, SAMPLES.value, batch)
    solver = None
    if SAMPLER.value == "unipc":
        if found.camera.mode == "step":
            raise ValueError("--sampler=unipc undoes --config.camera.mode=step: use initial")
        solver = unipc.make(found.sample.steps, found.sample.shift, ORDER.value)
    adapters = settings.load_adapters(found, ADAPTERS.value, KIND.value)
    folder = check_writable(cli.WORKDIR.value)
    pipeline = settings.build_pipeline(found, mesh, None, adapters)
    progress = Progress(wanted, unit="video")
    videos = generate.generate(
        pipeline, prompts, seed=found.run.seed, samples=SAMPLES.value,
        batch=batch, solver=solver,
    )  # fmt: skip
    # Another seed, config, solver or LoRA, also of the same path, makes another file.
    made_by = (config.to_json(sort_keys=True), SAMPLER.value, ORDER.value)
    tag = generate.tag(made_by, adapters)
    for done, made in enumerate(videos):
        path = folder / f"{made.name}-{tag}.mp4"
        if jax.process_index() == 0:
            write_mp4(path, made.video, config.fps)
        progress.update(done)
        if jax.process_index() == 0:
            print(path, flush=True)
    progress.close()


if __name__ == "__main__":
    cli.run(main, workdir="runs/videos")
