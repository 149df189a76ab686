"""Scores of the released motion profile, and of all of the released S_traj, on fixed paths, by the
released code.

python tests/goldens/make_released.py <checkout of microsoft/World-R1>

Only the methods that S_traj calls are taken out of the checkout's file, and its alignment of poses
out of the depth-anything-3 package, of which it is a copy; that one needs evo.
"""

import ast
import json
import sys
import types
import typing
from pathlib import Path

import numpy as np

from tests.rewards.test_s_traj import FRAMES, path, walk
from worldr1_jax.camera import trajectory

METHODS = (
    "_rotation_geodesic_deg",
    "_total_rotation_deg",
    "_total_translation",
    "_flatten_cos_score",
    "_compute_motion_profile_scores",
    "_parse_camera_matrix",
    "_ensure_homogeneous_matrix",
    "_trajectory_frame_keys",
    "_select_frame_indices",
    "_extract_target_camera_poses",
    "_resample_pose_sequence",
    "_align_pose_sequence_to_first",
    "_compute_camera_motion_score",
)
FEW = 5  # frames; from six on, the release fits to random halves of them, unseeded


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


def few_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Paths of FEW frames: what is recovered is the path asked for in other units and axes with
    some noise, another command, or a walk."""
    rng = np.random.default_rng(5)
    released, nano = trajectory.Magnitudes(), trajectory.Magnitudes.nano()
    turn = np.asarray(trajectory.path(("orbit_left",), FRAMES, magnitudes=released))[-1]
    asked, recovered = [], []
    for index, names in enumerate(FEW_COMMANDS):
        wanted = np.asarray(trajectory.path(names, FEW, magnitudes=released))
        like = np.asarray(trajectory.path(names, FEW, magnitudes=nano))
        noisy = (turn @ like).copy()
        noisy[:, :3, 3] += 0.02 * rng.normal(size=(FEW, 3))
        other = np.asarray(trajectory.path(("orbit_right",), FEW, magnitudes=nano))
        for found in (noisy, other, walk(index)[:FEW]):
            asked.append(wanted)
            recovered.append(found)
    return np.stack(asked), np.stack(recovered).astype(np.float32)


FEW_COMMANDS = (
    ("push_in",), ("orbit_left",), ("pan_right",), ("move_left",), ("fixed",),
    ("push_in", "orbit_left"), ("move_right", "push_in"),
)  # fmt: skip


def released_methods(checkout: Path):
    """An object with the released methods."""
    tree = ast.parse((checkout / "reward_server" / "reward_3d_backend.py").read_text())
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in METHODS
    ]
    holder = ast.ClassDef("Profile", bases=[], keywords=[], body=found, decorator_list=[])
    module = ast.fix_missing_locations(ast.Module([holder], type_ignores=[]))
    space: dict = {"np": np, "json": json, **vars(typing)}
    exec(compile(module, "released", "exec"), space)
    return space["Profile"]()


def lend_alignment() -> None:
    """Puts the package's modules where the released method imports them from."""
    from depth_anything_3.utils import geometry, pose_align

    utils = "reward_server.depth_anything_3.utils"
    for name in ("reward_server", "reward_server.depth_anything_3", utils):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[f"{utils}.geometry"], sys.modules[f"{utils}.pose_align"] = geometry, pose_align


def main() -> None:
    """Writes released.npz."""
    released = released_methods(Path(sys.argv[1]))
    lend_alignment()
    asked, recovered = pairs()
    profile = released._compute_motion_profile_scores
    scores = [profile(r, a) for r, a in zip(recovered, asked, strict=True)]
    few_asked, few_recovered = few_pairs()
    few_scores = []
    for wanted, found in zip(few_asked, few_recovered, strict=True):
        prediction = types.SimpleNamespace(extrinsics=np.linalg.inv(found))
        few_scores.append(released._compute_camera_motion_score(prediction, wanted)[0])
    np.savez(
        Path(__file__).with_name("released.npz"),
        asked=asked, recovered=recovered, scores=np.array(scores, np.float32),
        few_asked=few_asked, few_recovered=few_recovered,
        few_scores=np.array(few_scores, np.float32),
    )  # fmt: skip


if __name__ == "__main__":
    main()
