"""How every launcher starts: flags of a config file, help that names every field, and wrong input
as one sentence instead of a traceback."""

import ctypes
import difflib
import importlib.util
import io
import math
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import config_help
import xla_flags
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags


def _stopped(number: int, *_: object) -> NoReturn:
    """What is on disk is whole, whenever this comes."""
    os.write(2, b"\nstopped; what is on disk is whole, and training goes on from there\n")
    os._exit(128 + number)


for _number in (signal.SIGTERM, signal.SIGINT):  # first of all: imports take seconds
    signal.signal(_number, _stopped)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# transformers only misses torch, which nobody needs here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
HOME = Path(__file__).resolve().parents[1]  # the checkout; or, in a wheel, the package itself
if (HOME / "worldr1_jax").is_dir():
    sys.path.insert(0, str(HOME))  # a checkout works without being installed

from worldr1_jax.mesh import compiler  # noqa: E402

compiler.set_flags()

LONGEST = 600  # characters of an error message; a longer one is cut in its middle
# What a user's config file may end in beside ValueError, which is a refusal of its own.
MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, TypeError,
)  # fmt: skip

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/world.py[:nano|:small|:large]")
WORKDIR = flags.DEFINE_string("workdir", "runs/world", "folder that is written to")
TRACEBACK = flags.DEFINE_bool("traceback", False, "show where in the code wrong input was found")


def run(main: Callable[[], object], workdir: str = "runs/world") -> None:
    """Parses the flags and calls `main`; wrong input ends the program with one sentence and status
    1.

    Args:
      main: may raise ValueError for a field or file that is wrong, and OSError for a path that
        cannot be read or written. Anything else is an error of ours and keeps its traceback.
      workdir: default of --workdir, a folder of this launcher's own.
    """
    flags.set_default(WORKDIR, workdir)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that it cannot show ends no run
        sys.stdout.reconfigure(errors="backslashreplace")

    def guarded(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        # Orbax prints the traceback of what it raises as well, which is said in a sentence.
        logging.get_absl_handler().addFilter(lambda record: "/orbax/" not in record.pathname)
        try:
            _check_backend()
            from worldr1_jax.workdir.stop import listening

            with listening(_stopped):
                main()
        except (ValueError, OSError) as error:
            if TRACEBACK.value:
                raise
            _stop(sentence(error))

    app.run(guarded, flags_parser=_parse)


def use_cpu_well_for(config) -> None:
    """`use_cpu_well` for training, unless the config says how the mesh is made."""
    if config.mesh.data == -1:
        train = config.get("train", {})  # whose steps the devices have to share, too
        parts = math.prod(max(train.get(name, 1), 1) for name in ("minibatches", "microbatches"))
        use_cpu_well(max(config.groups * config.group_size // parts, 1))


def use_cpu_well(*divides: int) -> None:
    """Where the host's cores do the work: one device a core, and memory that is not given back.

    A small model's steps keep one core busy whatever the number of threads, but a mesh splits its
    videos over devices. Of n cores, as many are used as divide all of `divides`. Changes nothing
    on accelerators, or when XLA_FLAGS says how many devices there are. Call it before jax is used.
    """
    keep_memory()
    spread_convolutions()
    wait_for_slow_threads()
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
    channels and a quarter at 96 or 192. Call it before jax is used.
    """
    xla_flags.add("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")


def wait_for_slow_threads() -> None:
    """Gives the devices of a busy CPU 20 minutes to meet in a collective, not XLA's 40 seconds.

    They are threads. On a laptop that sleeps or swaps, one is late, not dead, and XLA would end the
    process with "Expected 2 threads to join the rendezvous". Call it before jax is used.
    """
    xla_flags.add("xla_cpu_collective_call_warn_stuck_timeout_seconds", "120")
    xla_flags.add("xla_cpu_collective_call_terminate_timeout_seconds", "1200")


def _check_backend() -> None:
    """Raises ValueError for a JAX_PLATFORMS that jax itself would end with a traceback."""
    for name in filter(None, os.environ.get("JAX_PLATFORMS", "").split(",")):
        package = "libtpu" if name == "tpu" else "jax_plugins"
        given = name == "cpu" or (name == "tpu" and "TPU_LIBRARY_PATH" in os.environ)
        if not given and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"JAX_PLATFORMS names '{name}', for which nothing is installed: set it to cpu, or "
                "install jax[tpu] or jax[cuda12]"
            )


# -- flags


def _parse(argv: list[str]) -> list[str]:
    config, argv = _take_config(argv)
    if any(word in ("-h", "--help", "--helpshort", "--helpfull") for word in argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # into head or less, as other programs do
        print(_help(config or str(HOME / "configs" / "world.py")))
        sys.exit(0)
    if not config:
        _stop("--config is missing: give --config=configs/world.py")
    found = _load(config)
    try:
        left = flags.FLAGS([argv[0], f"--config={config}", *argv[1:]])
    except flags.UnrecognizedFlagError as error:
        _stop(_hint(error.flagname, found))
    except (AttributeError, KeyError):
        _stop(_unknown_field(argv, found))
    except (flags.Error, TypeError, ValueError, OSError) as error:
        _stop(_last_line(error))
    if len(left) > 1:
        _stop(f"'{left[1]}' is no flag: flags look like --config=configs/world.py")
    for flag in (flags.FLAGS["workdir"], *_own()):
        values = flag.value if isinstance(flag.value, list) else [flag.value]
        if flag.default != "" and any(isinstance(v, str) and not v.strip() for v in values):
            _stop(f"--{flag.name} is empty: give it a value, or leave it out")
    return left


def _own() -> list[flags.Flag]:
    """The flags of the launcher that runs."""
    return flags.FLAGS.flags_by_module_dict().get(sys.argv[0], [])


def _take_config(argv: list[str]) -> tuple[str, list[str]]:
    """The config file with its variant, and the other words.

    A file that is not found from here is looked for beside the launchers, so that
    configs/world.py works from any folder and without a checkout.
    """
    config, rest = "", []
    words = iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if name not in ("-config", "--config"):
            rest.append(word)
            continue
        config = value if given else next(words, "")
        path, colon, variant = config.partition(":")
        if not Path(path).is_file():
            if not path or not (HOME / path).is_file():
                _stop(f"--config names {path or 'nothing'}, which is no file: try configs/world.py")
            config = f"{HOME / path}{colon}{variant}"
    return config, rest


def _load(config: str) -> ConfigDict:
    """What the config file makes of its variant; where it makes none, the program ends. The file is
    run here for its faults, and once more by config_flags."""
    path, _, variant = config.partition(":")
    try:
        make = runpy.run_path(path).get("get_config")
        found = make(*filter(None, [variant])) if make else _stop(f"{path} has no get_config")
    except SyntaxError as error:
        place = f"{error.filename} line {error.lineno}" if error.filename else path
        _stop(f"{place} is no Python: {error.msg}")
    except ValueError as error:
        _stop(f"{path}: {error}")
    except MISTAKES as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f" line {frame.lineno}" for frame in frames if frame.filename == path]
        _stop(f"{path}{''.join(lines[-1:])}: {type(error).__name__}: {error}")
    if not isinstance(found, ConfigDict) or not hasattr(found.get("mesh"), "data"):
        _stop(f"{path}: get_config returns no config: begin with a copy of configs/world.py")
    return found


def _help(config: str) -> str:
    """The launcher's docstring, its flags, and every field of the config."""
    found = _load(config)
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "flags:"]
    for flag in [*(flags.FLAGS[name] for name in ("config", "workdir", "traceback")), *_own()]:
        default = "" if flag.default in (None, []) else flag.default
        text = flag.help.partition("\n")[0].removesuffix(";")  # absl adds how to repeat it
        lines.append(config_help.line(f"--{flag.name}={default}", text))
    lines += [
        "",
        f"fields of {config}:",
        config_help.describe(config.partition(":")[0], found, _meanings(found)),
    ]
    return "\n".join(lines)


def _meanings(config: ConfigDict) -> dict[str, str]:
    """What the fields of the config's algorithm mean, which differ from one to the next."""
    from worldr1_jax.algorithms import base

    name = config.get("algorithm", {}).get("name")
    found = config_help.attributes(base.load(name)) if name in base.ALGORITHMS else {}
    return {f"algorithm.{field}": text for field, text in found.items()}


def _hint(flag: str, found: ConfigDict) -> str:
    """What a flag that does not exist may have meant."""
    near = difflib.get_close_matches(flag, list(flags.FLAGS), n=1, cutoff=0.8)
    field = config_help.nearest(flag, found, exact=bool(near))
    meant = f"--config.{field}" if field else f"--{near[0]}" if near else ""
    return f"--{flag} is no flag: " + (f"do you mean {meant}?" if meant else "see --help")


def _unknown_field(argv: list[str], found: ConfigDict) -> str:
    """The first --config.name that the config does not have."""
    known = {name for name, _ in config_help.fields(found)}
    for word in argv:
        name = word.partition("=")[0].lstrip("-")
        if name.startswith("config.") and name.removeprefix("config.") not in known:
            near = config_help.nearest(name, found)
            return f"the config has no field {name.removeprefix('config.')}" + (
                f": do you mean --config.{near}?" if near else ": see --help"
            )
    return "a flag names a field that the config does not have: see --help"


# -- errors


def _last_line(error: Exception) -> str:
    """absl wraps what a config file raises into pages; the sentence is at the end of them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    return lines[-1].removeprefix("ValueError: ")


def sentence(error: ValueError | OSError) -> str:
    """What is said of an error: OSErrors name their file first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _stop(text: str) -> NoReturn:
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)
