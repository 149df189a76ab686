"""Qwen3-VL: a network that reads images and a question, and the judge made of it.

config.py  shapes            vision.py  the image tower     prompt.py  questions as token ids
images.py  preprocessing     text.py    the decoder         scoring.py the judge
model.py   the network       names.py   its files and its places on a mesh
"""

from worldr1_jax.models.qwen3_vl.config import Config, TextConfig, VisionConfig
from worldr1_jax.models.qwen3_vl.images import prepare, prepared_size
from worldr1_jax.models.qwen3_vl.model import Qwen3VL
from worldr1_jax.models.qwen3_vl.names import PLACES, load, read_config, save, table
from worldr1_jax.models.qwen3_vl.prompt import Tokens, expand, read_tokens, train_tokenizer
from worldr1_jax.models.qwen3_vl.scoring import grade, judge

__all__ = [
    "PLACES",
    "Config",
    "Qwen3VL",
    "TextConfig",
    "Tokens",
    "VisionConfig",
    "expand",
    "grade",
    "judge",
    "load",
    "prepare",
    "prepared_size",
    "read_config",
    "read_tokens",
    "save",
    "table",
    "train_tokenizer",
]
