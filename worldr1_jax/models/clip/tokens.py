"""Prompts to CLIP's token ids, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from worldr1_jax.files import short
from worldr1_jax.models.clip.config import Config

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
_said: set[Path] = set()  # folders whose first cut prompt has been reported


class Tokenizer:
    """The tokenizer of a folder with tokenizer.json, or with vocab.json and merges.txt.

    Ids are those of transformers' CLIPTokenizer. OpenCLIP's own, of HPSv2, also straightens quotes
    and resolves HTML entities first (ftfy); on plain text both give the same.

    Args:
      folder: where the files are, e.g. that of PickScore_v1 or of openai/clip-vit-large-patch14.
      length: tokens of a prompt, its ends included; `Config.max_position_embeddings`.

    Raises:
      ValueError: a folder without these files.
    """

    def __init__(self, folder: str | Path, length: int = 77):
        self._folder, self._length = Path(folder), length
        self._tokenizer = _read(self._folder)

    def check(self, config: Config) -> None:
        """Raises ValueError for the tokenizer of another network, of which CLIP would read prompts
        at the wrong place, or words that it does not have."""
        tokens = self._tokenizer(["a box"])["input_ids"][0]
        end = max(tokens) if config.eos_token_id is None else config.eos_token_id
        if len(self._tokenizer) > config.vocab_size or tokens[-1] != end:
            raise ValueError(
                f"{self._folder} holds the tokenizer of another network: it has "
                f"{len(self._tokenizer)} tokens and ends with {tokens[-1]}, and CLIP here has "
                f"{config.vocab_size} and reads a prompt at {end}"
            )

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "N T"]:
        """Token ids. A longer prompt is cut and ends with the end token all the same, and the log
        says so once; a shorter one is padded with the end token.

        Raises:
          ValueError: an empty prompt.
        """
        for number, prompt in enumerate(prompts, start=1):
            if not prompt.strip():
                raise ValueError(f"prompt {number} is empty; CLIP compares frames with a sentence")
        found = self._tokenizer(list(prompts))["input_ids"] if prompts else []
        ids = np.empty((len(found), self._length), np.int32)
        for row, tokens in zip(ids, found, strict=True):
            row[:] = tokens[-1]
            kept = tokens[:-1][: self._length - 1]
            row[: len(kept)] = kept
        longest = max(range(len(found)), key=lambda i: len(found[i]), default=0)
        if found and len(found[longest]) > self._length and self._folder not in _said:
            _said.add(self._folder)
            lost = self._tokenizer.decode(found[longest][self._length - 1 : -1])
            logging.warning(
                "CLIP reads %d tokens of a prompt; of '%s' it does not see '%s'",
                self._length, prompts[longest], lost.strip(),
            )  # fmt: skip
        return ids


def _read(folder: Path) -> Any:
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    whole = (folder / TOKENIZER).is_file()
    if not whole and not all((folder / name).is_file() for name in (VOCABULARY, MERGES)):
        raise ValueError(
            f"{folder} holds no tokenizer of CLIP: give a folder with {TOKENIZER}, or with "
            f"{VOCABULARY} and {MERGES}"
        )
    try:
        if whole:
            found = PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER))
        else:
            found = CLIPTokenizer(str(folder / VOCABULARY), str(folder / MERGES))
        tokens = found(["a box"])["input_ids"][0]
    except Exception as error:  # the tokenizers library raises no narrower type
        reason = short(str(error).strip().split("\n")[0]).rstrip(".")
        raise ValueError(f"{folder} holds no tokenizer that can be read: {reason}") from error
    if len(tokens) < 3:  # the ends and a word
        raise ValueError(f"{folder} holds a tokenizer that makes nothing of 'a box'")
    return found
