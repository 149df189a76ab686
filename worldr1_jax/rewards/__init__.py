"""Rewards of videos, usable without the trainer:

    reward = rewards.build({"recon": 1.0, "trajectory": 1.0, "general": 1.0}, da3="nano", mesh=mesh)
    # Scores(parts={name: [B]}, total [B], valid [B])
    scores = reward(videos, prompts, camtoworld)

R = R_3D + R_gen. A part that fails (is not finite) masks its video out; it is never replaced by a
number.
"""

from worldr1_jax.rewards.scorer import MODES, NAMES, NEEDS_3D, Decode, Reward, build, check

__all__ = ["MODES", "NAMES", "NEEDS_3D", "Decode", "Reward", "build", "check"]
