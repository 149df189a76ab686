"""How every launcher starts: flags of a config file, and wrong input as one sentence instead of a
traceback."""

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
