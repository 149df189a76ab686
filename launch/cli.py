"""How every launcher starts: flags of a config file, and wrong input as one sentence instead of a
traceback."""

import ctypes
import importlib.util
import math
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault(
    "TRANSFORMERS_VERBOSITY", "error"
)  # it only misses torch, which nobody needs here
sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # so that configs/ is found from any folder

from worldr1_jax.mesh import compiler

compiler.set_flags()

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/world.py[:nano|:small|:large]")
WORKDIR = flags.DEFINE_string("workdir", "runs/world", "folder of checkpoints, metrics and videos")
TRACEBACK = flags.DEFINE_bool("traceback", False, "show where in the code wrong input was found")


def run(main: Callable[[], object]) -> None:
    """Parses the flags and calls `main`; ValueError ends the program with one sentence and status
    1."""

    def guarded(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # orbax reports every rename at INFO
        try:
            main()
        except ValueError as error:
            if TRACEBACK.value:
                raise
            _stop(str(error))

    app.run(guarded, flags_parser=_parse)


def use_cpu_well_for(config) -> None:
    """`use_cpu_well` for training, unless the config says how the mesh is made."""
    if config.mesh.data == -1:
        use_cpu_well(config.groups * config.group_size)


def use_cpu_well(*divides: int) -> None:
    """Where the host's cores do the work: one device a core, and memory that is not given back.

    A small model's steps keep one core busy whatever the number of threads, but a mesh splits its
    videos over devices. Of n cores, as many are used as divide all of `divides`. Changes nothing
    on accelerators, or when XLA_FLAGS says how many devices there are. Call it before jax is used.
    """
    keep_memory()
    spread_convolutions()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        import jax

        common = math.gcd(*divides)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        jax.config.update(
            "jax_num_cpu_devices", max(n for n in range(1, cores + 1) if common % n == 0)
        )


def keep_memory() -> None:
    """Asks glibc's malloc to keep freed memory for the next step instead of giving it back.

    XLA frees and allocates each buffer anew. By default the large ones are mapped, cleared page by
    page and unmapped every time, which takes over a quarter of the time of nano's backward pass.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc: nothing to set
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    libc.mallopt(m_arena_max, 1)  # other threads' arenas map what is over 64 MB all the same
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 * 2**20)


def spread_convolutions() -> None:
    """Has XLA's own convolutions used on a CPU in place of YNNPACK's.

    Those give a core 64 output channels at a time: of two cores one idles half of the time at 64
    channels and a quarter at 96 or 192.

    An unknown flag would end the process, and this one is experimental: it is set where the library
    has it, and where no accelerator's library, with an XLA of its own, would read it. Call it
    before jax is used.
    """
    others = ("libtpu", "jax_plugins")
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(importlib.util.find_spec, others)):
        return
    flag, flags = "xla_cpu_experimental_ynn_fusion_type", os.environ.get("XLA_FLAGS", "")
    if flag not in flags and _xla_has(flag):
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT".strip()


def _xla_has(flag: str) -> bool:
    spec = importlib.util.find_spec("jaxlib")
    for folder in spec.submodule_search_locations or () if spec else ():
        library = Path(folder) / "libjax_common.so"
        if library.is_file():
            with (
                library.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
            ):
                return text.find(flag.encode()) >= 0
    return False


def _parse(argv: list[str]) -> list[str]:
    if any(word.lstrip("-").startswith("help") for word in argv[1:]):
        return app.parse_flags_with_usage(argv)
    for word in argv[1:]:
        path = word.partition("=")[2].partition(":")[0]
        if word.lstrip("-").startswith("config=") and not Path(path).is_file():
            _stop(f"--config names {path or 'nothing'}, which is no file: try configs/world.py")
    try:
        left = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        _stop(_last_line(error))
    if len(left) > 1:
        _stop(f"'{left[1]}' is no flag: flags look like --config=configs/world.py")
    if CONFIG.value is None:
        _stop("--config is missing: give --config=configs/world.py")
    return left


def _last_line(error: Exception) -> str:
    """absl wraps what a config file raises into pages; the sentence is at the end of them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    text = lines[-1].removeprefix("ValueError: ")
    if isinstance(error, AttributeError | KeyError):
        return f"the config has no field {lines[0].strip(chr(34))}"
    return text


def _stop(text: str) -> None:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(1)
