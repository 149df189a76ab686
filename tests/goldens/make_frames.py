"""Writes frames.npz: pictures as depth_anything_3 0.1.1 prepares them for its network.

Run as `python -m tests.goldens.make_frames` where depth_anything_3 (--no-deps) and OpenCV are
installed. The package's processor imports torchvision and imageio for steps that are not run here.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from unittest import mock

import numpy as np

PATH = Path(__file__).with_name("frames.npz")
PATCH = 14
# Height, width, longest side: area then cubic, area twice, cubic twice, one of either, portrait,
# sides that are right already.
CASES = (
    (120, 208, 126),
    (100, 208, 126),
    (30, 52, 126),
    (33, 126, 126),
    (208, 120, 126),
    (45, 63, 70),
    (42, 70, 70),
)


def name(height: int, width: int, longest: int) -> str:
    """Of a case in the file."""
    return f"{height}x{width}_{longest}"


def picture(height: int, width: int) -> np.ndarray:
    """[H W 3] uint8: edges, waves of several lengths and noise."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    rng = np.random.default_rng(height * 1000 + width)
    waves = [np.sin(x / a + y / b) for a, b in ((3, 7), (9, -5), (20, 11))]
    image = 128 + 60 * np.stack(waves, axis=-1) + rng.normal(0, 10, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] = (255, 0, 30)
    return image.clip(0, 255).astype(np.uint8)


@functools.cache
def _processor():
    unused = {"torchvision", "torchvision.transforms", "imageio"} - sys.modules.keys()
    sys.modules.update({name: mock.MagicMock() for name in unused})
    from depth_anything_3.utils.io.input_processor import InputProcessor

    for name in unused:  # others ask what they find here for its version
        del sys.modules[name]
    return InputProcessor()


def published(image: np.ndarray, longest: int) -> np.ndarray:
    """[h w 3] uint8 as the package's processor gives it to the network, before it is normalised."""
    from PIL import Image

    processor = _processor()
    bounded = processor._resize_image(Image.fromarray(image), longest, "upper_bound_resize")
    return np.asarray(processor._make_divisible_by_resize(bounded, PATCH))


def main() -> None:
    """Writes the file beside this one."""
    np.savez_compressed(PATH, **{name(*c): published(picture(*c[:2]), c[2]) for c in CASES})


if __name__ == "__main__":
    main()
