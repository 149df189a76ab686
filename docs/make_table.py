"""The table of docs/results.md, from the summary.json of several runs.

python docs/make_table.py runs/seed0 runs/seed1           # a column each, Markdown on stdout
python docs/make_table.py --same runs/seed0 runs/seed1    # the base at the policy's own guidance
"""

import argparse
import json
from pathlib import Path

ROWS = {
    "trajectory": "S_traj",
    "recon": "S_recon",
    "total_3d": "S_recon + S_traj",
    "general": "R_gen, nano's CLIP",
    "palette": "colours, not learnt from",
    "meta_view": "S_meta, not learnt from",
    "rot_err": "rotation error, rad",
    "psnr": "PSNR of the re-rendering, dB",
    "change": "movement (change)",
    "texture": "texture",
    "diversity": "diversity within a prompt",
    "diversity_first": "the same of first frames",
}


def cell(row: dict) -> str:
    """Before, after, and the interval of the change, as many digits as the change has sense for."""
    digits = 2 if abs(row["before"]) >= 10 else 3 if abs(row["before"]) >= 0.2 else 4
    low, high = row["paired_ci95"]
    numbers = f"{row['before']:.{digits}f} to {row['after']:.{digits}f}"
    return f"{numbers} [{low:+.{digits}f}, {high:+.{digits}f}]"


def compared(run: dict, same: bool) -> dict:
    """The rows of a run; where the policy's guidance is the base's best, there is one table."""
    return run.get("heldout_same_guidance", run["heldout"]) if same else run["heldout"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="workdirs of finished runs")
    parser.add_argument("--same", action="store_true", help="both at the policy's guidance")
    given = parser.parse_args()
    runs = [json.loads((run / "summary.json").read_text()) for run in given.runs]
    place = "after" if given.same else "before"
    lines = {
        "": [f"seed {run['seed']}" for run in runs],
        "---": ["---"] * len(runs),
        "guidance of the base": [f"{run['heldout_guidance'][place]:g}" for run in runs],
    }
    tables = [compared(run, given.same) for run in runs]
    for name, title in ROWS.items():
        if all(name in rows for rows in tables):  # what older versions did not measure is left out
            lines[title] = [cell(rows[name]) for rows in tables]
    print("\n".join(f"| {title} | {' | '.join(cells)} |" for title, cells in lines.items()))


if __name__ == "__main__":
    main()
