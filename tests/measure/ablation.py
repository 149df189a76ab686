"""The paper's ablation on nano: the whole method, and what it is without each of its parts.

python -m tests.measure.ablation --workdir=runs/ablation              # some hours on two cores
python -m tests.measure.ablation --workdir=runs/ablation --seeds 1    # beside it, another seed
python -m tests.measure.ablation --workdir=runs/ablation --print      # the table of what is there

Every row is a run of the README's recipe, with all of R_3D counted, and the fields of ROWS changed.
What has been run is not run again. The table (arms.table) compares with the whole method. How
trainings differ is not in its intervals; the seeds one by one (--seeds) show that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from configs.world import get_config
from tests.measure import arms

WEIGHTS = "rewards.weights."
NO_RECON, NO_META = {f"{WEIGHTS}recon": 0.0}, {f"{WEIGHTS}meta_view": 0.0}
# What captions are contrasted by is S_traj.
NO_TRAJECTORY = {f"{WEIGHTS}trajectory": 0.0, "algorithm.contrast": 0.0}
NO_PHASE = {"dynamic.dynamic_updates": 0}
WHOLE = "the whole method"
ROWS: Mapping[str, Mapping[str, Any]] = {
    arms.BASE: {},
    WHOLE: {},
    "without S_recon": NO_RECON,
    "without S_meta": NO_META,
    "without S_traj": NO_TRAJECTORY,
    "without R_3D": NO_RECON | NO_META | NO_TRAJECTORY,
    "without R_gen, and so without the phase": {f"{WEIGHTS}general": 0.0} | NO_PHASE,
    "without the periodic phase": NO_PHASE,
    "without the warp": {"camera.mode": "none"},
    "without S_recon and S_meta: nano's default": NO_RECON | NO_META,
}


def config_of(row: str, seed: int, updates: int) -> ml_collections.ConfigDict:
    """The config of a row."""
    config = get_config("nano")
    with config.unlocked():
        config.update_from_flattened_dict(arms.COUNTED | ROWS[row])
        config.seed, config.num_updates, config.evaluate.prompts = seed, updates, 0
    return config


def main() -> None:
    """Runs what has not been run, and prints the table of all that has."""
    args = arms.parser(__doc__.splitlines()[0], tuple(ROWS), updates=40).parse_args()
    measured = arms.run(args, config_of)
    if WHOLE in measured:
        print("\n".join(arms.table(measured, WHOLE)))


if __name__ == "__main__":
    main()
