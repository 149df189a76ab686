"""The README's moving picture, from the two contact sheets that every training run ends with.

python docs/make_pictures.py --sheets=runs/world/videos    # of a run of yours; both are copied here
python docs/make_pictures.py                               # of the sheets that are committed

A sheet has a row a prompt: its caption, and below it frames of one video from first to last. The
picture plays them: the base policy on the left, the trained one on the right, the same noise.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent / "pictures"
SHEETS = ("heldout_before.png", "heldout_after.png")
CELL, CAPTION = 128, 18  # px, of a frame and of the line above it: see media.contact_sheet
COLUMNS = 2  # pairs side by side
GAP = 6  # px between pairs
MILLISECONDS = 160  # a frame; the last one stays four times as long


def rows(sheet: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Captions [caption, width, 3] and frames [prompts, frames, cell, cell, 3] of a sheet."""
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    height, width = pixels.shape[:2]
    if height % (CAPTION + CELL) or width % CELL:
        raise ValueError(f"{sheet} is {width}x{height} px: its rows are not those of a nano run")
    strips = pixels.reshape(-1, CAPTION + CELL, width, 3)
    cells = strips[:, CAPTION:].reshape(len(strips), CELL, width // CELL, CELL, 3)
    return list(strips[:, :CAPTION]), cells.transpose(0, 2, 1, 3, 4)


def moving(before: Path, after: Path) -> list[Image.Image]:
    """The frames of the picture."""
    captions, old = rows(before)
    _, new = rows(after)
    if old.shape != new.shape:
        raise ValueError(f"{before.name} and {after.name} differ in size: they are of two runs")
    frames = []
    for number in range(old.shape[1]):
        lines = []
        for first in range(0, len(old), COLUMNS):
            line = []
            for prompt in range(first, min(first + COLUMNS, len(old))):
                pair = np.concatenate([old[prompt, number], new[prompt, number]], axis=1)
                text = captions[prompt][:, : pair.shape[1]]
                block = np.concatenate([text, pair])
                line.append(np.pad(block, ((0, GAP), (0, GAP), (0, 0)), constant_values=255))
            lines.append(np.concatenate(line, axis=1))
        frames.append(Image.fromarray(np.concatenate(lines)).quantize(256))
    return frames


def main() -> None:
    """Writes docs/pictures/before_after.gif, and the sheets that it was made from beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sheets", type=Path, default=HERE, help="folder with heldout_*.png")
    folder = parser.parse_args().sheets
    for name in SHEETS:
        if not (folder / name).is_file():
            parser.error(f"{folder} lacks {name}: give the folder videos of a finished run")
        if folder.resolve() != HERE:
            shutil.copyfile(folder / name, HERE / name)
    first, *rest = moving(*(HERE / name for name in SHEETS))
    waits = [MILLISECONDS] * len(rest) + [4 * MILLISECONDS]
    path = HERE / "before_after.gif"
    first.save(path, save_all=True, append_images=rest, duration=waits, loop=0, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
