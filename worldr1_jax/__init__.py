"""World-R1 in JAX. The rooms in the order in which data flows through them:

settings     the config, checked, and the objects that it asks for
preflight    what else has to be right before anything is loaded
data         prompts: files, groups of K, main and dynamic phases
camera       commands in a prompt -> camera path -> flow -> warped starting noise
policies     models that sample videos, loaded, and compiled on the mesh
rollout      schedule, SDE and CPS steps with log-probabilities, the scan over denoising steps
rewards      reconstruct, re-render, S_recon, S_traj, R_gen, and their masked sum
algorithms   group advantages, losses, and the update (algorithms/update.py: train_step)
train        run(): the loop, top to bottom
evaluation   held-out prompts before and after; video files to rewards, in words
plan         what a pod needs, from the TPU compiler
nano         a small world with known truth, and the networks trained on it

What they stand on: models (Wan2.1, Depth Anything 3, ...), splat (Gaussians to pictures), nn
(layers), weights (their files), mesh (where arrays live), workdir (checkpoints, metrics), and
types, geometry, files, media, timing.
"""

import importlib
from types import ModuleType

__version__ = "0.2.0.dev0"  # the one place; summary.json, pyproject.toml and the wheel read it

__all__ = ["__version__", "camera", "data", "evaluation", "models", "policies", "rewards", "splat"]


def __getattr__(name: str) -> ModuleType:
    """The public rooms, imported when they are first used: `import worldr1_jax` alone costs
    nothing."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
