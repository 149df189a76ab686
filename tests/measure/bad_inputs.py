"""Some 3,000 bad inputs, one after the other, and how many were not refused as they should be.

python -m tests.measure.bad_inputs                 # all of them; the faults, and a table
python -m tests.measure.bad_inputs --only=videos   # of one kind
python -m tests.measure.bad_inputs --share=0.1     # of every kind a tenth; --seed draws others

tries.py says what counts as a fault: there must be none. All but the launchers' run in this
process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from configs import world
from tests import tiny
from tests.launching import CONFIG, LAUNCH, environment
from tests.measure import bad_files
from tests.measure.tries import FAULTS, Try, count, table
from tests.models import test_lora_files
from tests.test_settings import FREE, SIGNED, changed, flat
from worldr1_jax import preflight, settings, train
from worldr1_jax.algorithms import base as algorithms
from worldr1_jax.camera import commands
from worldr1_jax.data import prompts
from worldr1_jax.evaluation import scoring
from worldr1_jax.policies import adapters, generate
from worldr1_jax.workdir.checkpoint import Checkpointer, compare_config
from worldr1_jax.workdir.lock import Lock
from worldr1_jax.workdir.metrics import MetricsWriter

# -- fields of the config; tests/test_settings.py has other values

NUMBERS = (-2, -1e300, 2**63, 1e308, -math.nan, "1", b"3", [1], {"a": 1}, (1.0, 2.0), 1j)
TEXTS = ("Initial ", "\0", "x" * 10**5, b"initial", 0.5, ("initial",), {"a": 1})
TUPLES = (
    (0, -1),
    (1e308, 1e308),
    ("text", 3),
    ((0, 3),),
    (True, False),
    "0,3",
    {"a": 1},
    (0, 10**400),
)


def fields(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Every field of every algorithm's config."""
    for algorithm in algorithms.ALGORITHMS:
        config = world.get_config(f"nano,{algorithm}")
        for name, value in flat(config):
            if algorithm != "grpo" and not name.startswith("algorithm."):
                continue
            kind = NUMBERS
            if isinstance(value, str | tuple):
                kind = TEXTS if isinstance(value, str) else TUPLES
            for bad in kind if not isinstance(value, bool) else (*NUMBERS[:3], "True", (True,)):
                tried = config.copy_and_resolve_references()
                if _is_free(name, bad) or not changed(tried, name, bad):
                    continue
                label = f"{algorithm} {name}={str(bad)[:40]}"
                yield Try("config fields", label, lambda tried=tried: settings.read(tried))


def _is_free(name: str, value: Any) -> bool:
    """Texts of which files are made are right until they are read, and some numbers signed."""
    text = isinstance(value, str) and (FREE.fullmatch(name) or name == "rewards.judge.question")
    signed = name.startswith("rewards.weights.") or name in SIGNED
    return bool(text) or (signed and value == -2)


def whole_configs(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Fields that read() cannot know to be wrong: files, and what goes together with what."""
    weights = tiny.save_weights(folder / "weights")
    run = _run(folder / "run", weights)
    long = "a" * 5000
    for name, values in {
        "policy.weights": ("nowhere", "", "gs://bucket/x", long, "/dev/null", str(folder), "a\0b",
            "\ud800"),
        "rewards.reconstruct.da3": ("nowhere", "", "gs://b/x", str(folder), str(weights / "vae"),
            "\0"),
        "policy.text_cache": ("nowhere", "gs://b/x", str(folder), long, "\0"),
        "prompts": ("", "nowhere", "gs://b/x", str(folder), "/dev/zero", long, "a\0b",
            "\ud800.txt"),
        "sample.negative_prompt": ("\ud800",),
        "frames": (6, 2, 4), "height": (40, 8, 33), "width": (8, 40), "groups": (3,),
        "mesh.data": (3, 64, 2**31), "mesh.tensor": (8, 3), "mesh.context": (3,),
        "sample.videos_at_once": (3,), "train.minibatches": (3, 16), "train.microbatches": (3, 64),
        "algorithm.window_range": ((0, 4), (3, 4)), "sample.steps": (1, 2), "seed": (5,),
        "fps": (math.inf,),
        "policy.lora_rank": (8,), "group_size": (2,), "rewards.weights.recon": (0.5,),
        "camera.strength": (0.9,),
        "rewards.hps.weights": ("nowhere", "nano.pt"), "rewards.recon.likeness": ("lpips",),
        "policy.adapters": ("nowhere", "gs://b/x", str(folder), "\0", "/dev/zero",
            str(weights / "vae")),
    }.items():  # fmt: skip
        for value in values:
            config = tiny.config(weights, num_updates=3, **_asked(name) | {name: value})
            label = f"{name}={value!r}"[:60]
            yield Try(
                "configs and workdirs", label, lambda c=config: train.run(c, str(run)), kept=run
            )


def _asked(name: str) -> dict[str, Any]:
    """What has to be so for a field to count."""
    general = {"rewards.general.hps": 1.0} if name.startswith("rewards.hps") else {}
    return {"mesh.data": 1 if "at_once" in name else 8, **general}


def _run(folder: Path, weights: Path) -> Path:
    """A workdir that looks like a run's."""
    config = json.loads(tiny.config(weights, num_updates=3, **{"mesh.data": 8}).to_json())
    with Checkpointer(folder, config=config) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(4)}, data={}, meta={})
    (folder / "metrics.jsonl").write_text('{"update": 0}\n')
    (folder / "summary.json").write_text('{"updates": 1}\n')
    return folder


# -- workdirs


def workdirs(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Folders that are none, damaged, or somebody else's."""
    weights = folder / "nowhere"
    run = _run(folder / "run", weights)
    config = json.loads((run / "config.json").read_text())
    (folder / "file").touch()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("/nowhere/at/all")
    takes: tuple[Callable[[Any], Any], ...] = (
        Checkpointer, lambda p: Lock(p).__enter__(), MetricsWriter,
        lambda p: adapters.load_all([str(p)], test_lora_files.CONFIG),
    )  # fmt: skip
    for place in (
        "file",
        "file/x",
        "loop",
        "loop/x",
        "a" * 300,
        "dangling/x",
        "nul\0",
        "/proc/x",
        "gs://b/x",
        "s3://b",
    ):
        path = place if "://" in place else str(folder / place)
        for number, take in enumerate(takes):
            yield Try("workdirs", f"{place[:20]} {number}", lambda t=take, p=path: t(p))
    for content in (
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"{}",
        b'{"policy": 3}',
        b'{"seed": NaN}',
    ):
        yield from _written(run, "config.json", content, lambda: compare_config(run, config))
    for name, value in rng.sample(list(_flat(config)), 80):
        if name.partition(".")[0] in preflight.MAY_CHANGE or name in preflight.MAY_CHANGE:
            continue
        other = json.loads(json.dumps(config))
        *parts, last = name.split(".")
        holder = other
        for part in parts:
            holder = holder[part]
        holder[last] = [value, "other"]
        yield Try(
            "workdirs",
            f"another {name}",
            lambda o=other: compare_config(run, o, preflight.MAY_CHANGE),
            kept=run,
        )
    for line in (
        b"x\n",
        b"[]\n",
        b"{}\n",
        b'{"update": "a"}\n',
        b'{"update": null}\n',
        b"\xff\n",
        b"[" * 10**5 + b"\n",
    ):
        yield from _written(run, "metrics.jsonl", line, lambda: MetricsWriter(run, 1))
    for lock in (b"", b"x", b"[]", b'{"host": 3, "pid": "x"}'):

        def twice(lock: bytes = lock) -> None:
            with Lock(run):
                (run / "lock").write_bytes(lock)
                Lock(run).__enter__()

        yield Try("workdirs", f"held, lock says {lock!r}", twice)


def checkpoints(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Each file of one cut, gone, or with a flipped bit: damage is named, or does no harm."""
    run, broken = _run(folder / "run", folder), folder / "broken"
    changes: dict[str, Callable[[bytes], bytes] | None] = {
        "cut": lambda content: content[: len(content) // 2],
        "gone": None,
        "flip": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    }
    stored = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
    for path in stored:
        for name, change in changes.items():

            def call(path: Path = path, change: Any = change) -> Any:
                shutil.rmtree(broken, ignore_errors=True)
                shutil.copytree(run, broken)
                there = broken / path.relative_to(run)
                content = there.read_bytes()
                there.unlink()
                if change:
                    there.write_bytes(change(content))
                with Checkpointer(broken) as saved:
                    return saved.restore_latest({"a": jnp.zeros(4)})

            yield Try("checkpoints", f"{name} {path.name}", call, _unharmed)


def _unharmed(restored: Any) -> bool:
    return restored is None or bool((restored.state["a"] == 1).all())


def _written(run: Path, name: str, content: bytes, call: Callable[[], Any]) -> Iterator[Try]:
    good = (run / name).read_bytes()
    (run / name).write_bytes(content)
    yield Try("workdirs", f"{name} is {content[:30]!r}", call, kept=run)
    (run / name).write_bytes(good)


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# -- prompts

BYTES = {
    "empty": b"", "blank": b"\n \r\n\t\n", "mark alone": b"\xef\xbb\xbf",
    "zero width": "\u200b\n\u2060\n".encode(),
    "utf-16": "A box.\n".encode("utf-16"), "utf-32": "A box.\n".encode("utf-32"),
    "latin": b"A caf\xe9.\n",
    "surrogate": b"A \xed\xa0\x80.\n", "half a character": b"A box.\nA \xe2\x82\n",
    "zip": b"PK\x03\x04\xff\xfe\xfd",
    "zoom": b"A box.\nCamera zoom in. A box.\n", "not": b"Camera does not pan left. A box.\n",
    "stray": b"A box. The camera pans left.\n", "angle": b"Camera pan left -30 degrees. X\n",
}  # fmt: skip
LINES = (
    b"x", b"3", b"null", b"[]", b"{", b"{}", b'{"prompt": null}', b'{"prompt": 3}',
    b'{"prompt": ""}',
    b'{"prompt": " "}', b'{"prompt": ["a"]}', b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "split": "dev"}', b'{"prompt": "a", "spilt": "test"}',
    b'{"prompt": "a", "split": null}', b'{"prompt": "a", "split": []}',
    b'{"prompt": "a", "x": NaN}',
    b'{"prompt": "a"} {"prompt": "b"}', b'{"text": "a"}', b"[" * 10**5,
    b'{"prompt": "Camera zoom in. A"}', TEST_ALONE := b'{"prompt": "a", "split": "test"}',
)  # fmt: skip


def prompt_files(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Contents in every place, and places that are none."""
    readers: dict[str, Callable[[Path], Any]] = {
        "read": lambda p: prompts.read(p, commands.complaint),
        "generate": lambda p: generate.read_prompts(str(p)),
        "list": scoring.read_list,
    }
    yield from _kept_prompts(folder)
    for name, content in BYTES.items():
        for split in prompts.SPLITS:
            place = folder / f"{name}{split}"
            prompts.write(place, prompts.PromptSets(("A box.",), ("A box.",), ("A cube.",)))
            (place / f"{split}.txt").write_bytes(content)
            yield Try("prompt files", f"{split}.txt {name}", lambda p=place: readers["read"](p))
        (folder / "one.txt").write_bytes(content)
        for reader in ("read", "generate"):
            yield Try(
                "prompt files", f"{reader} {name}", lambda r=reader: readers[r](folder / "one.txt")
            )
    for line in LINES:
        (folder / "one.jsonl").write_bytes(line + b"\n")
        for reader, read in readers.items():
            all_splits = reader == "generate" and line == TEST_ALONE
            yield Try(
                "prompt files", f"{reader} {line[:40]!r}", lambda r=read: r(folder / "one.jsonl"),
                right=["a"].__eq__ if all_splits else None,
            )  # fmt: skip
    os.mkfifo(folder / "pipe.txt")
    (folder / "folder.jsonl").mkdir()
    (folder / "loop.txt").symlink_to("loop.txt")
    for place in (
        "pipe.txt",
        "folder.jsonl",
        "loop.txt",
        "none",
        "none.txt",
        "a" * 300 + ".txt",
        "x.csv",
        "nul\0.txt",
    ):
        for reader, read in readers.items():
            yield Try(
                "prompt files", f"{reader} {place[:20]}", lambda r=read, p=place: r(folder / p)
            )
    for url in ("gs://b/x.txt", "https://h/x.jsonl", "/dev/zero", "/dev/null"):
        for reader, read in readers.items():
            yield Try("prompt files", f"{reader} {url}", lambda r=read, u=url: r(u))


def _kept_prompts(folder: Path) -> Iterator[Try]:
    """Unusual, and right: they have to be read as they are."""
    wanted = ("A box.", "A ball\u2028here.")
    for name, content in {
        "marked": "\ufeffA box.\nA ball\u2028here.\n", "CRLF": "A box.\r\nA ball\u2028here.",
        "CR": "A box.\rA ball\u2028here.\r",
        "blank lines": "\n\nA box.\n\u200b\n A ball\u2028here. \n\n",
    }.items():  # fmt: skip
        (folder / f"{name}.txt").write_bytes(content.encode())
        yield Try(
            "prompt files",
            name,
            lambda p=folder / f"{name}.txt": prompts.read(p).train,
            lambda got: got == wanted,
        )


# -- camera clauses

WRONG = (
    "Camera does not {0}. A box.", "Camera never {0}. A box.", "Camera won't {0}. A box.",
    "Camera {0}, not {1}. A box.", "Camera {0} or {1}. A box.",
    "Camera {0} instead of {1}. A box.", "Camera {0} -30 degrees. A box.",
    "Camera {0} 400 degrees. A box.", "Camera {0} 0 degrees. A box.",
    "Camera {0} 10-20 degrees. A box.",
    "Camera {0} while zooming out. A box.", "Camera {0}, zoom in. A box.",
    "Camera zoom in, {0}. A box.",
    "Camera {0} twice. A box.", "Camera {0} unless it rains. A box.",
    "Camera {0} in reverse. A box.",
    "Camera {0} slowly quickly. A box.", "Camera {0} 1e9 degrees. A box.",
    "Camera {0} NaN degrees. A box.",
    "A box. The camera {0}.", "Camera {0}, dolly zoom. A box.", "Camera {0} until {1}. A box.",
    "Camera refuses to {0}. A box.", "Camera hardly {0}. A box.", "Camera operator {0}. A box.",
    "Camera {0} minus 30 degrees. A box.", "Camera {0} ‑30 degrees. A box.",
    "Camera {0} .5 degrees. A box.", "Camera {0} two times. A box.", "Camera {0} with a {1}. X",
    "Camera {0} at high speed. A box.", "Camera {0} and a cat {1}. A box.", "<camera>{0} X",
    "Camera {0} to reveal a dog that {1}. A box.", "A box. The camera zooms in.",
)  # fmt: skip
RIGHT = (
    "Camera {0}. A box.", "camera {0}. A box.", "CAMERA {0}. A box.", "\ufeffCamera {0}. A box.",
    "\u200eCamera {0}. A box.",
    "\u200b\u2060Camera {0}. A box.", '"Camera {0}." A box.', "“Camera {0}.” A box.",
    "- Camera {0}. A box.",
    "1. Camera {0}. A box.", "* Camera {0}. A box.", "[Camera {0}] A box.", "Camera: {0}. A box.",
    "**Camera** {0}. A box.", "Camera ({0}). A box.", "Camera motion: {0}. A box.",
)  # fmt: skip


def clauses(folder: Path, rng: random.Random) -> Iterator[Try]:
    """What asks for what no camera here can do; and the commands in clothes of every kind."""
    for name in commands.NAMES:
        other = rng.choice([n for n in commands.NAMES if n not in (name, "fixed")])
        words = [n.replace("_", " ") for n in (name, other)]
        for text in WRONG:
            if name != "fixed" or "{1}" in text or "zoom" in text:
                asked = text.format(*words)
                yield Try("camera clauses", asked, lambda a=asked: commands.understood(a))
        for text in RIGHT:
            asked = text.format(*words)
            yield Try(
                "camera clauses",
                asked,
                lambda a=asked: commands.parse(a),
                lambda got, n=name: got == (n,),
            )
        both = f"Camera {words[0]}; {words[1]}. A box."
        yield Try(
            "camera clauses",
            both,
            lambda a=both: commands.parse(a),
            lambda got, w=(name, other): got == w,
        )
    for verb in ("pan", "move", "orbit"):
        for here, there in (("left", "right"), ("right", "left")):
            asked = f"Camera {verb}s from {here} to {there}. A box."
            yield Try(
                "camera clauses",
                asked,
                lambda a=asked: commands.parse(a),
                lambda got, w=f"{verb}_{there}": got == (w,),
            )


# -- launchers

FLAGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("tpu_train", ("--config.frames=abc",)), ("tpu_train", ("--config.train.lr=1",)),
    ("tpu_train", ("--processes=two",)), ("tpu_train", ("--config.seed=-1", "--workdir=RUN")),
    ("tpu_train", ("--config.prompts=/dev/null", "--workdir=RUN")), ("tpu_train", ("extra",)),
    ("tpu_train", ("--distributed", "--coordinator=nowhere", "--processes=2", "--process=5")),
    ("generate", ("--prompt=Camera zoom in. A box.",)),
    ("generate", ("--prompt=A box.", "--workdir=FILE")),
    ("generate", ("--prompt=A box.", "--samples=0")),
    ("generate", ("--prompt=A box.", "--adapters=nowhere")), ("generate", ("--prompt=",)),
    ("generate", ("--prompt=A box.", "--workdir=")),
    ("generate", ("--prompts=-",)),
    ("score", ("--video=none.mp4", "--prompt=A box.", "--workdir=FILE")),
    ("score", ("--list=none.jsonl",)), ("encode_prompts", ("--batch=0",)),
    ("encode_prompts", ("--workdir=FILE",)),
    ("convert_weights", ("--workdir=FILE",)), ("export_lora", ("--adapters=RUN:nan",)),
    ("export_lora", ("--adapters=RUN", "--workdir=FILE")), ("plan_pod", ("--topology=v9:1",)),
)  # fmt: skip


def launchers(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Wrong flags, each in a process of its own."""
    run = _run(folder / "run", folder)
    (folder / "file").touch()
    for script, arguments in FLAGS:
        given = [
            a.replace("RUN", str(run)).replace("FILE", str(folder / "file")) for a in arguments
        ]

        def call(script: str = script, given: list[str] = given) -> None:
            command = [sys.executable, str(LAUNCH / f"{script}.py"), f"--config={CONFIG}", *given]
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment(),
                input="",
                capture_output=True,
                text=True,
                check=False,
            )
            text = done.stderr.strip()
            if done.returncode == 1 and text.startswith("error: ") and "Traceback" not in text:
                raise ValueError(text.removeprefix("error: "))
            if done.returncode:
                raise RuntimeError(f"status {done.returncode}: {text[-300:]}")

        yield Try("launchers", f"{script} {' '.join(arguments)}", call, kept=run)


KINDS: dict[str, Callable[[Path, random.Random], Iterator[Try]]] = {
    "fields": fields, "configs": whole_configs, "workdirs": workdirs, "checkpoints": checkpoints,
    "prompts": prompt_files, "clauses": clauses, "safetensors": bad_files.safetensors,
    "archives": bad_files.archives, "shards": bad_files.indexes, "json": bad_files.texts,
    "lora": bad_files.lora, "networks": bad_files.configs, "caches": bad_files.caches,
    "tokenizers": bad_files.tokenizers, "videos": bad_files.videos, "launchers": launchers,
}  # fmt: skip


def tries(kinds: list[str], share: float = 1.0, seed: int = 0) -> Iterator[Try]:
    """Inputs of these kinds, or a random share of each."""
    for kind in kinds:
        rng, chosen = random.Random(seed), random.Random(seed + 1)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            for one in KINDS[kind](Path(folder), rng):
                if chosen.random() < share:
                    yield one


def main() -> None:
    """Prints every fault, and the table; status 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    counts = count(tries(given.only, given.share, given.seed))
    print(table(counts))
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(any(found in FAULTS for _, found in counts))


if __name__ == "__main__":
    main()
