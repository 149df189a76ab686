"""The launchers as subcommands, with or without a checkout.

worldr1_jax train --config=configs/world.py
python -m worldr1_jax generate --config=configs/world.py --prompt="Camera push in. A red sphere."

Each runs the script of its name as `python launch/<script>` would. In a checkout that is the one in
launch/; a wheel carries the same files in worldr1_jax/launch (setup.py).
"""

import ast
import runpy
import signal
import sys
from pathlib import Path

NAMES = {"tpu_train": "train"}  # scripts whose subcommand is called otherwise
NOT_COMMANDS = ("cli", "config_help", "xla_flags")


def launchers() -> dict[str, Path]:
    """Subcommand -> script."""
    package = Path(__file__).resolve().parent
    folders = (package.parent / "launch", package / "launch")
    folder = next(f for f in folders if (f / "cli.py").is_file())
    scripts = {NAMES.get(p.stem, p.stem): p for p in sorted(folder.glob("*.py"))}
    return {name: path for name, path in scripts.items() if name not in NOT_COMMANDS}


def main() -> None:
    """Runs the launcher that the first argument names; without one, lists them."""
    scripts = launchers()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # into head or less, as other programs do
        print("usage: worldr1_jax COMMAND --config=configs/world.py [flags]   (COMMAND --help)\n")
        for command, path in scripts.items():
            print(f"  {command:16}{_summary(path)}")
        return
    if name == "--version":
        from worldr1_jax import __version__

        print(__version__)
        return
    if name not in scripts:
        sys.exit(f"error: '{name}' is no command: it is one of {', '.join(scripts)}")
    script = scripts[name]
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path.insert(0, str(script.parent))  # as python does for a script, which imports cli
    runpy.run_path(str(script), run_name="__main__")


def _summary(script: Path) -> str:
    """The first sentence of its docstring."""
    text = ast.get_docstring(ast.parse(script.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    main()
