"""Kills a run again and again, and compares its last bits with those of a run that nobody killed.

python -m tests.measure.kills --kills=100    # prints what was killed where, and whether bits differ

The run is tests/tiny.py's, small but whole: its gradient is not zero, and every update is saved. A
kill is SIGKILL, anywhere between the start of the process and its end, or within 0.3 s of an
update's line in metrics.jsonl, where its checkpoint is being written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests import tiny
from tests.launching import QUICK
from worldr1_jax import train

UPDATES = 5
MOST = 8  # kills of one run, which is then left to end
BESIDE_A_SAVE = 0.5  # share of the kills
# A process that has imported everything and computed nothing is forked for each start.
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["tests.tiny", "worldr1_jax.train"])


def run(weights: Path, workdir: Path, cache: Path) -> None:
    """Trains, in a process of its own, which writes to a log until it is gone."""
    os.environ["XLA_FLAGS"] = " ".join(QUICK)  # one device, whatever the parent has
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    log = (workdir.parent / "log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    train.run(tiny.config(weights, num_updates=UPDATES, **{"evaluate.prompts": 0}), str(workdir))


def start(weights: Path, workdir: Path, cache: Path) -> Any:
    """The process of `run`."""
    workdir.mkdir(parents=True, exist_ok=True)
    process = _FORK.Process(target=run, args=(weights, workdir, cache), daemon=True)
    process.start()
    return process


def finished(process: Any) -> None:
    """Waits for a run; RuntimeError unless it ended well."""
    process.join(900)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"a run that nobody killed ended with {process.exitcode}: see its log")


def last(workdir: Path) -> tuple[list[np.ndarray], list[dict[str, float]]]:
    """Leaves of the newest checkpoint, which is that of the last update, and the metrics without
    times."""
    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        assert manager.latest_step() == UPDATES, manager.latest_step()
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(UPDATES, args=wanted)["state"]
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    metrics = [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]
    return tiny.leaves(state), metrics


def killed(
    weights: Path, workdir: Path, cache: Path, rng: random.Random, kills: int, life: float
) -> int:
    """A run that is killed up to `kills` times in its first `life` seconds, and then left to end;
    how many of the kills it met."""
    met = 0
    for _ in range(kills):
        process = start(weights, workdir, cache)
        if rng.random() < BESIDE_A_SAVE:
            _await_a_line(workdir, process)
            time.sleep(rng.uniform(0, 0.3))
        else:
            process.join(rng.uniform(0, life))
        if not process.is_alive():
            finished(process)
            break
        process.kill()
        process.join()
        met += 1
    finished(start(weights, workdir, cache))
    return met


def _await_a_line(workdir: Path, process: Any) -> None:
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    while process.is_alive() and (not path.exists() or path.read_bytes().count(b"\n") <= lines):
        process.join(0.02)


def compare(weights: Path, folder: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    """Runs that are killed `kills` times in all, each against one that is not.

    Returns:
      How many runs there were, and how many ended with other bits.

    Raises:
      AssertionError: a run whose gradient is zero, of which equal bits would say nothing.
    """
    rng, cache = random.Random(seed), folder / "cache"
    finished(start(weights, folder / "warm" / "run", cache))  # compiles
    began = time.monotonic()
    finished(start(weights, folder / "unbroken" / "run", cache))
    life = time.monotonic() - began
    want, lines = last(folder / "unbroken" / "run")
    assert all(line["grad_norm"] > 0 for line in lines), "this run has no gradient"
    met = runs = wrong = 0
    while met < kills:
        workdir = folder / str(runs) / "run"
        more = killed(weights, workdir, cache, rng, min(MOST, kills - met), life)
        leaves, metrics = last(workdir)
        same = metrics == lines and all(
            np.array_equal(a, b) for a, b in zip(leaves, want, strict=True)
        )
        met, runs, wrong = met + more, runs + 1, wrong + (not same)
        print(f"{met} kills, {runs} runs, {wrong} with other bits", flush=True)
    return runs, wrong


def main() -> None:
    """Prints the count; status 1 where bits differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = tiny.save_weights(Path(folder) / "weights")
        runs, wrong = compare(weights, Path(folder), given.kills, given.seed)
    print(f"{given.kills} kills in {runs} runs: {wrong} ended with other bits")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
