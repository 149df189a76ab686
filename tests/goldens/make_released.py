"""Scores of the released motion profile on fixed paths, computed by the released code.

python tests/goldens/make_released.py <checkout of microsoft/World-R1>

Only the methods that the profile calls are taken out of the checkout's file, so that nothing else
of it has to be installed.
"""

import ast
import sys
from pathlib import Path

import numpy as np

from tests.test_s_traj import FRAMES, path, walk
from worldr1_jax.camera import trajectory

METHODS = (
    "_rotation_geodesic_deg",
    "_total_rotation_deg",
    "_total_translation",
    "_flatten_cos_score",
    "_compute_motion_profile_scores",
)


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Paths asked for and recovered: the commands against themselves, each other and noise."""
    released = trajectory.Magnitudes()
    names = ("push_in", "orbit_left", "pan_right", "move_left", "fixed")
    asked, recovered = [], []
    for index, name in enumerate(names):
        wanted = np.asarray(trajectory.path((name,), FRAMES, magnitudes=released))
        for found in (
            wanted,
            np.asarray(trajectory.path(("orbit_right",), FRAMES, magnitudes=released)),
            walk(index),
            path(name),
        ):
            asked.append(wanted)
            recovered.append(found)
    return np.stack(asked), np.stack(recovered)


def released_profile(checkout: Path):
    """The released method, as a function of (recovered, asked)."""
    tree = ast.parse((checkout / "reward_server" / "reward_3d_backend.py").read_text())
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in METHODS
    ]
    holder = ast.ClassDef("Profile", bases=[], keywords=[], body=found, decorator_list=[])
    module = ast.fix_missing_locations(ast.Module([holder], type_ignores=[]))
    space: dict = {"np": np}
    exec(compile(module, "released", "exec"), space)
    return space["Profile"]()._compute_motion_profile_scores


def main() -> None:
    """Writes released.npz."""
    profile = released_profile(Path(sys.argv[1]))
    asked, recovered = pairs()
    scores = [profile(r, a) for r, a in zip(recovered, asked, strict=True)]
    np.savez(
        Path(__file__).with_name("released.npz"),
        asked=asked, recovered=recovered, scores=np.array(scores, np.float32),
    )  # fmt: skip


if __name__ == "__main__":
    main()
