"""The nano world's tokenizer: whole words, in the file format that transformers' AutoTokenizer
reads."""

from __future__ import annotations

import itertools
from pathlib import Path

from worldr1_jax.camera import commands
from worldr1_jax.nano import captions

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def vocabulary() -> list[str]:
    """Every word that a nano caption can hold, special tokens first, in a fixed order."""
    texts = [
        *captions.COLORS, *captions.SHAPES, *itertools.chain(*captions.SIZES.values()),
        *captions.RELATIONS, *captions.FLOORS, *captions.PLACES, *captions.MOTIONS,
        *(name.replace("_", " ") for name in commands.NAMES), "camera then a an on floor",
    ]  # fmt: skip
    words = sorted({word for text in texts for word in text.split()})
    return [PAD, END, UNKNOWN, ",", ".", *words]


def build():
    """A transformers tokenizer: lower case, split at spaces and punctuation, `</s>` at the end."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, words[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def save(folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    build().save_pretrained(str(folder))
