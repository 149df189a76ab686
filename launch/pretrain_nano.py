"""Makes the nano weights from nothing, or goes on from weights, one stage at a time. What ships
had three rounds (nano/pretrain.py, STEPS).

# all stages
python launch/pretrain_nano.py --config=configs/world.py --workdir=runs/nano
# measure what ships
python launch/pretrain_nano.py --config=configs/world.py --stage=check
"""

import functools
import json
from pathlib import Path
from typing import Any

import cli
from absl import flags

STAGES = ("vae", "camera", "da3", "policy", "clip", "judge", "check")
STAGE = flags.DEFINE_enum("stage", "all", ("all", *STAGES), "what to train, or check")
VIDEOS = flags.DEFINE_integer("videos", 5000, "training videos")
SEED = flags.DEFINE_integer("seed", 0, "every random choice follows from it")
SCALE = flags.DEFINE_float("scale", 1.0, "multiplies the number of steps of every stage")
START = flags.DEFINE_string(
    "start", "", "folder of weights to go on from (nano: those that ship); empty starts fresh"
)


def main() -> None:
    """Runs the stages in order; each reads what the ones before it wrote to workdir/weights."""
    from worldr1_jax.nano import pretrain
    from worldr1_jax.nano.videos import cached
    from worldr1_jax.weights.shipped import resolve

    cli.use_cpu_well(2)  # divides the batch of every stage
    workdir = Path(cli.WORKDIR.value)
    wanted = STAGES if STAGE.value == "all" else (STAGE.value,)
    stages = [stage for stage in wanted if stage != "check"]
    weights = workdir / "weights"
    if stages:
        # CLIP learns from stills: five of each scene
        choices: dict[str, Any] = {"dynamic_share": 0.15, "every": 4 if stages == ["clip"] else 1}
        see = functools.cache(
            lambda: cached(workdir / "videos", SEED.value, VIDEOS.value, **choices)
        )
        start = resolve(START.value, field="--start") if START.value else None
        options: dict[str, Any] = {"seed": SEED.value, "scale": SCALE.value, "start": start}
        for stage in stages:
            print(f"stage {stage}", flush=True)
            pretrain.run_stage(stage, see, weights, **options)
        pretrain.pack(weights, workdir / "packed")
    if STAGE.value in ("all", "check"):
        check(weights if STAGE.value == "all" else None)


def check(weights: Path | None) -> None:
    """Prints the figures of the given or shipped weights on held-out scenes, as JSON."""
    from worldr1_jax import settings
    from worldr1_jax.nano import check as checks
    from worldr1_jax.nano.videos import sample
    from worldr1_jax.rewards import scorer as scoring
    from worldr1_jax.weights import shipped

    folder = weights or shipped.WEIGHTS
    truth = sample(12345, 96, held_out=True)
    with cli.CONFIG.value.unlocked():
        cli.CONFIG.value.rewards.reconstruct.da3 = str(folder / "da3")
    scorer = scoring.load(settings.read(cli.CONFIG.value).rewards)
    figures = {
        "vae_psnr": checks.vae_psnr(folder / "vae", truth),
        "ground_truth": checks.reconstruction(scorer, truth),
        "noise": checks.noise_scores(scorer, truth),
        "clip": checks.retrieval(folder / "clip", truth),
        "judge": checks.grading(folder / "judge"),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    cli.run(main, workdir="runs/nano")
