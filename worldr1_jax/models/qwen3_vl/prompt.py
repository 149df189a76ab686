"""Questions about images as Qwen3-VL reads them: token ids, without a template engine.

    <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>QUESTION<|im_end|>\\n
    <|im_start|>assistant\\n

Unlike Qwen2-VL's, the published template has no system turn unless it is given one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from worldr1_jax import files
from worldr1_jax.models.qwen3_vl.config import Config

FILE = "tokenizer.json"
SPECIAL = {  # in the order of the published ids
    "pad": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenizer and the ids that prompts are built of."""

    tokenizer: Any  # tokenizers.Tokenizer
    special: dict[str, int]  # by the names of SPECIAL
    digits: tuple[int, ...]  # of 0 to 9

    def ask(
        self, questions: Sequence[str], images: int, per_image: int, length: int | None = None
    ) -> tuple[Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
        """Token ids and mask, padded on the left.

        Args:
          questions: one a row, each about `images` images.
          images: V.
          per_image: tokens of an image (Config.image_tokens of its prepared size).
          length: N; None means that of the longest row.

        Raises:
          ValueError: no question, one that is no text or holds a special token, or rows longer
            than `length`.
        """
        if not questions:
            raise ValueError("questions are empty; give one for each row of images")
        pad = self.special["image_pad"]
        rows = [expand(self._prompt(q, images), pad, per_image) for q in questions]
        longest = max(map(len, rows))
        length = longest if length is None else length
        if longest > length:
            raise ValueError(
                f"a question takes {longest} tokens with its images; length is {length} and has to "
                "be at least that"
            )
        ids = np.full((len(rows), length), self.special["pad"], np.int32)
        mask = np.zeros(ids.shape, bool)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :], mask[i, length - len(row) :] = row, True
        return ids, mask

    def _prompt(self, question: str, images: int) -> list[int]:
        """Ids with one <|image_pad|> an image. Special tokens part the text for the tokenizer, so
        that the pieces' ids are those of the whole."""
        ids = self.special
        if not isinstance(question, str) or not _is_unicode(question):
            raise ValueError(f"the question {files.short(repr(question))} is no text in UTF-8")
        words = self._encode(question)
        found = set(words) & set(ids.values())
        if found:
            name = next(SPECIAL[key] for key, value in ids.items() if value in found)
            raise ValueError(f"the question holds the special token {name}; leave it out")
        picture = [ids["vision_start"], ids["image_pad"], ids["vision_end"]]
        return [
            ids["im_start"], *self._encode("user\n"), *picture * images, *words, ids["im_end"],
            *self._encode("\n"), ids["im_start"], *self._encode("assistant\n"),
        ]  # fmt: skip

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def expand(
    token_ids: Sequence[int] | np.ndarray, image_pad: int, per_image: int
) -> Int[np.ndarray, " N"]:
    """A row of ids with each <|image_pad|> in it `per_image` times."""
    ids = np.asarray(token_ids, np.int32)
    return np.repeat(ids, np.where(ids == image_pad, per_image, 1))


def _is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair stands for a byte that is no text."""
    return text == text.encode("utf-8", "ignore").decode()


def read_tokens(path: str | Path, config: Config) -> Tokens:
    """The tokenizer of a network's folder, checked against its config.

    Raises:
      ValueError: no tokenizer.json, an unreadable one, one that lacks a special token or gives a
        digit more than one token, or ids that are not the config's.
    """
    from tokenizers import Tokenizer

    file = (Path(path).parent if Path(path).is_file() else Path(path)) / FILE
    if not file.is_file():
        raise ValueError(f"{file} is missing: copy the tokenizer's files of the publisher there")
    content = files.read_bytes(file, 256 * files.MIB)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the tokenizers library raises no narrower type
        reason = files.short(str(error).strip().split("\n")[0]).rstrip(".")
        raise ValueError(f"{file} cannot be read as a tokenizer: {reason}") from error
    found = {name: tokenizer.token_to_id(token) for name, token in SPECIAL.items()}
    special = {name: number for name, number in found.items() if number is not None}
    for name, token in SPECIAL.items():
        if name not in special:
            raise ValueError(f"{file} lacks the token {token}: it is no tokenizer of Qwen3-VL")
    for name, field in (
        ("image_pad", "image_token_id"),
        ("vision_start", "vision_start_token_id"),
        ("vision_end", "vision_end_token_id"),
    ):
        if special[name] != getattr(config, field):
            raise ValueError(
                f"{file} has {SPECIAL[name]} at {special[name]}, but config.json's {field} is "
                f"{getattr(config, field)}"
            )
    return Tokens(tokenizer, special, _digits(tokenizer, file, config.text.vocab_size))


def _digits(tokenizer: Any, file: Path, vocabulary: int) -> tuple[int, ...]:
    ids = [tokenizer.encode(digit, add_special_tokens=False).ids for digit in "0123456789"]
    if any(len(one) != 1 for one in ids) or len({one[0] for one in ids}) != 10:
        raise ValueError(f"{file} does not give each of the digits 0 to 9 one token of its own")
    if max(one[0] for one in ids) >= vocabulary:
        raise ValueError(f"{file} has digits beyond the config's vocab_size, {vocabulary}")
    return tuple(one[0] for one in ids)


def train_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int = 512) -> int:
    """Writes a small tokenizer of the publisher's kind (tokenizer.json, tokenizer_config.json):
    byte-level BPE with digits apart, the special tokens last.

    Args:
      texts: what merges are learnt from.
      vocab_size: at most so many tokens; at least 262, for the bytes and the special tokens.

    Returns:
      The size of the vocabulary, for Config.nano.

    Raises:
      ValueError: a vocabulary too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(SPECIAL):
        raise ValueError(
            f"vocab_size is {vocab_size}; it has to be at least {len(alphabet) + len(SPECIAL)}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens(list(SPECIAL.values()))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / FILE))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL["pad"],
        "eos_token": SPECIAL["im_end"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return core.get_vocab_size()
