"""What rewards.reconstruct.frame_stride costs in score and saves in time, on held-out nano scenes.

python -m tests.measure.cost_of_frame_stride [--scenes=64] [--rounds=3]

A reward has to rank: so beside the scores of true videos it gives those of the same videos with
every frame jittered by up to 1 px (S_recon) and against the path of another scene (S_traj), how
often the true one wins, and the correlation with the scores at stride 4, for which nano's 3D
network was made: it has seen 5 frames at a time, and a stride of 1 gives it 17.
"""

from __future__ import annotations

import argparse
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from tests.measure.corruptions import jitter
from worldr1_jax.nano import videos
from worldr1_jax.rewards.scorer import build

STRIDES = (1, 2, 4, 8)
MADE_FOR = 4
JITTER = 0.25  # of truth_of_rewards' 4 px


def measure(stride: int, clips: np.ndarray, bad: np.ndarray, asked: np.ndarray, rounds: int):
    """Scores of the true clips, of the jittered ones and against other paths, and seconds."""
    reward = build(
        {"recon": 1.0, "trajectory": 1.0}, recon={"likeness": "ssim"},
        reconstruct={"da3": "nano", "frame_stride": stride}, trajectory={"depth_scale": 4.0},
    )  # fmt: skip
    prompts = [""] * len(clips)  # which neither reads
    true, worse = (jnp.asarray(x, jnp.float32) for x in (clips, bad))
    scores = reward(true, prompts, asked).parts
    jittered = reward(worse, prompts, asked).parts
    other = reward(true, prompts, np.roll(asked, 1, axis=0)).parts
    taken = []
    for _ in range(rounds):
        start, busy = time.perf_counter(), _processor_seconds()
        jax.block_until_ready(reward(true, prompts, asked))
        taken.append((time.perf_counter() - start, _processor_seconds() - busy))
    rows = {
        "recon": np.asarray(scores["recon"]), "recon_bad": np.asarray(jittered["recon"]),
        "trajectory": np.asarray(scores["trajectory"]),
        "trajectory_bad": np.asarray(other["trajectory"]), "psnr": np.asarray(scores["psnr"]),
    }  # fmt: skip
    return rows, np.median(taken, axis=0)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Prints a line a stride."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    truth = videos.sample(77, args.scenes, held_out=True)
    clips = truth.video / 255.0
    rng = np.random.default_rng(0)
    bad = np.stack([jitter(clip, JITTER, rng) for clip in clips])
    found = {s: measure(s, clips, bad, truth.camtoworld, args.rounds) for s in STRIDES}
    print(f"{args.scenes} held-out scenes of {videos.FRAMES} frames; 'true wins' against jittered")
    print("frames and against another scene's path")
    print(
        f"{'stride':<8}{'frames':<8}{'S_recon':<18}{'wins':<7}{'r':<7}{'PSNR':<8}"
        f"{'S_traj':<18}{'wins':<7}{'r':<7}{'seconds':<9}processor seconds"
    )
    for stride, (rows, (wall, cpu)) in found.items():
        cells = []
        for name in ("recon", "trajectory"):
            mean, worse = rows[name].mean(), rows[f"{name}_bad"].mean()
            wins = (rows[name] > rows[f"{name}_bad"]).mean()
            r = np.corrcoef(rows[name], found[MADE_FOR][0][name])[0, 1]
            cells.append(f"{f'{mean:.3f} ({worse:.3f})':<18}{wins:<7.2f}{r:<7.2f}")
        frames = -(-videos.FRAMES // stride)
        psnr = f"{rows['psnr'].mean():<8.2f}"
        print(f"{stride:<8}{frames:<8}{cells[0]}{psnr}{cells[1]}{wall:<9.2f}{cpu:.2f}")


if __name__ == "__main__":
    main()
