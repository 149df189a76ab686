"""Scores videos: a table on the screen, and everything in workdir/scores.json.

python launch/score.py --config=configs/world.py --video=a.mp4 --prompt="Camera push in. A sphere."
python launch/score.py --config=configs/world.py --list=videos.jsonl --pictures --workdir=scores

The list has a line {"video": "a.mp4", "prompt": "..."} for each video. Videos of any size and of up
to --config.frames frames. --pictures writes workdir/<number>-<video>.png: frames, their re-renders,
depth, and the camera path asked for against the one recovered. scores.json is written every ten
seconds and at the end: a long list that is stopped keeps what it had then.
"""

import cli
from absl import flags

VIDEO = flags.DEFINE_multi_string("video", [], "an mp4 file; may be given more than once")
PROMPT = flags.DEFINE_multi_string("prompt", [], "the prompt of each --video, in the same order")
LIST = flags.DEFINE_string("list", "", ".jsonl file of videos and prompts")
PICTURES = flags.DEFINE_bool("pictures", False, "write a picture for each video")

FIRST, LAST = ("total", "recon", "trajectory"), ("psnr", "ssim", "rot_err", "trans_err")


def main() -> None:
    """Scores one video after the other; those that cannot be judged say why."""
    from worldr1_jax import settings
    from worldr1_jax.evaluation import scoring
    from worldr1_jax.files import check_writable
    from worldr1_jax.workdir.metrics import Progress

    config = cli.CONFIG.value
    if len(VIDEO.value) != len(PROMPT.value):
        raise ValueError(
            f"there are {len(VIDEO.value)} --video and {len(PROMPT.value)} --prompt: give one "
            "prompt a video"
        )
    pairs = list(zip(VIDEO.value, PROMPT.value, strict=True))
    pairs += scoring.read_list(LIST.value) if LIST.value else []
    if not pairs:
        raise ValueError("there is no video: give --video and --prompt, or --list=file.jsonl")
    found = settings.read(config)
    found.rewards.check()
    folder = check_writable(cli.WORKDIR.value)
    scorer = settings.build_scorer(found, settings.scoring_mesh(found))
    scored = scoring.score(
        scorer, pairs, magnitudes=found.camera.units, most_frames=found.run.frames,
        with_pictures=PICTURES.value,
    )  # fmt: skip
    rows = scoring.keep(scored, folder, Progress(len(pairs), unit="video"))
    shown = dict.fromkeys((*FIRST, *found.rewards.reported(), *LAST))
    print(scoring.table(rows, scoring.named(rows, [*shown])), flush=True)
    scoring.check_any(rows)


if __name__ == "__main__":
    cli.run(main, workdir="runs/scores")
