"""Rewards of videos, usable without the trainer:

    reward = rewards.build(
        {"recon": 1.0, "trajectory": 1.0}, mesh=mesh,
        reconstruct={"da3": "nano"}, recon={"likeness": "ssim"},  # or a folder of Depth Anything 3
    )
    # Scores(parts={name: [B]}, total [B], valid [B])
    scores = reward(videos, prompts, camtoworld)

R = R_3D + R_gen. A part that fails (is not finite) masks its video out; it is never replaced by a
number. base.py says what a reward is.
"""

from worldr1_jax.rewards.base import REWARDS, Evidence, Reward
from worldr1_jax.rewards.scorer import Decode, Scorer, build, choose

__all__ = ["REWARDS", "Decode", "Evidence", "Reward", "Scorer", "build", "choose"]
