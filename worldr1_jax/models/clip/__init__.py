"""CLIP: frames and sentences in one space, as HPSv2.1 and PickScore compare them.

From video to cosine:

    network = clip.load("PickScore_v1")                 # or HPS_v2.1_compressed.pt
    words = clip.Tokenizer("PickScore_v1")
    image = network.image(clip.preprocess(frames, network.config, fit="crop"))     # [N D]
    text = network.text(words(["A red sphere on a tiled floor."]))                 # [1 D]
    cosine = image @ text.T

model.py is the network, names.py its files, preprocess.py and tokens.py what goes into it.
"""

from worldr1_jax.models.clip.config import Config, Tower
from worldr1_jax.models.clip.model import CLIP
from worldr1_jax.models.clip.names import PLACES, load, read_config, save, table
from worldr1_jax.models.clip.preprocess import FITS, MEAN, STD, preprocess
from worldr1_jax.models.clip.tokens import Tokenizer

__all__ = [
    "CLIP", "FITS", "MEAN", "PLACES", "STD", "Config", "Tokenizer", "Tower", "load", "preprocess",
    "read_config", "save", "table",
]  # fmt: skip
