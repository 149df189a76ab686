"""The table of docs/results.md, from the summary.json of several runs.

python docs/make_table.py runs/seed0 runs/seed1    # a column each, Markdown on stdout
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
}


def cell(row: dict) -> str:
    """Before, after, and the interval of the change, as many digits as the change has sense for."""
    digits = 2 if abs(row["before"]) >= 10 else 3 if abs(row["before"]) >= 0.2 else 4
    low, high = row["paired_ci95"]
    numbers = f"{row['before']:.{digits}f} to {row['after']:.{digits}f}"
    return f"{numbers} [{low:+.{digits}f}, {high:+.{digits}f}]"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="workdirs of finished runs")
    runs = [json.loads((run / "summary.json").read_text()) for run in parser.parse_args().runs]
    print("| | " + " | ".join(f"seed {run['seed']}" for run in runs) + " |")
    print("| --- |" + " --- |" * len(runs))
    print("| guidance of the base, its best | " + " | ".join(
        f"{run['heldout_guidance']['before']:g}" for run in runs) + " |")  # fmt: skip
    for name, title in ROWS.items():
        print(f"| {title} | " + " | ".join(cell(run["heldout"][name]) for run in runs) + " |")
    print("| seconds | " + " | ".join(f"{run['seconds']:.0f}" for run in runs) + " |")


if __name__ == "__main__":
    main()
