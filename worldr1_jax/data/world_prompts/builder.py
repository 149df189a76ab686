"""The tensorflow-datasets builder of the world prompts; TensorFlow itself is not needed. Install
the extra [tfds].

    builder = WorldPrompts(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    builder.as_data_source("train")[0]["prompt"]        # bytes

Same version, same bytes of every file. `python -m worldr1_jax.data.world_prompts` builds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.writer import ExampleWriter
from tensorflow_datasets.proto import tf_example_pb2

from worldr1_jax.camera import commands
from worldr1_jax.data.world_prompts import checksums, generate
from worldr1_jax.data.world_prompts.generate import Record
from worldr1_jax.data.world_prompts.material import CATEGORIES

CARD = Path(__file__).with_name("README.md")


class WorldPrompts(tfds.core.GeneratorBasedBuilder):
    """Text-only prompts for videos of solid worlds, each with a command for the camera."""

    name = "world_prompts"
    VERSION = tfds.core.Version(generate.VERSION)
    # tensorflow-datasets would find this with importlib_resources, which it does not require.
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=CARD.read_text("utf-8"),
            features=tfds.features.FeaturesDict(
                {
                    "prompt": tfds.features.Text(),
                    "prompt_long": tfds.features.Text(),
                    "category": tfds.features.ClassLabel(names=list(CATEGORIES)),
                    "commands": tfds.features.Sequence(
                        tfds.features.ClassLabel(names=list(commands.PUBLISHED))
                    ),
                    "is_dynamic": np.bool_,
                }
            ),
            license="Apache-2.0",
            disable_shuffling=True,  # the generator has shuffled, by its own seed
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
        made = generate.records()
        checksums.verify(made)
        return {split: self._generate_examples(made[split]) for split in made}

    def _generate_examples(self, records: Iterable[Record]) -> Iterator[tuple[int, dict]]:
        fields = self.info.features
        for index, record in enumerate(records):
            example = dataclasses.asdict(record)
            yield index, {name: example[name] for name in fields}

    def _example_writer(self) -> ExampleWriter:
        return _SameBytes(file_format=self.info.file_format)


class _SameBytes(ExampleWriter):
    """Writes the features of each example in the order of their names.

    Protocol buffers leave the order of a map open, and it differs from process to process.
    """

    def write(self, path, examples):
        def ordered():
            for key, serialized in examples:
                example = tf_example_pb2.Example.FromString(serialized)
                yield key, example.SerializeToString(deterministic=True)

        return super().write(path, ordered())
