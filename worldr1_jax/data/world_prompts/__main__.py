"""Builds the world prompts, the same bytes every time.

python -m worldr1_jax.data.world_prompts --data_dir=data       # tensorflow-datasets, array_record
python -m worldr1_jax.data.world_prompts --text_dir=prompts    # train.txt, dynamic.txt, test.txt
python -m worldr1_jax.data.world_prompts --measure             # what the prompts are held to
"""

import argparse
import json

from worldr1_jax.data import prompts
from worldr1_jax.data.world_prompts import checksums, generate, measure


def main(arguments: list[str] | None = None) -> None:
    """Writes and prints what the flags ask for, once the text is that of its version."""
    parser = argparse.ArgumentParser(prog="python -m worldr1_jax.data.world_prompts")
    parser.add_argument("--data_dir", help="folder in which world_prompts/VERSION is built")
    parser.add_argument("--text_dir", help="folder for one text file a split, one prompt a line")
    parser.add_argument("--form", choices=("long", "short"), default="long", help="of --text_dir")
    parser.add_argument("--measure", action="store_true", help="print repetition and vocabulary")
    parser.add_argument(
        "--checksums", action="store_true", help="take the text as it is now for its VERSION"
    )
    flags = parser.parse_args(arguments)
    if not (flags.data_dir or flags.text_dir or flags.measure or flags.checksums):
        parser.error("give --data_dir or --text_dir, a folder to write to, or --measure")
    made = generate.records()
    if flags.checksums:
        sums = {split: checksums.checksum(made[split]) for split in made}
        text = json.dumps({"version": generate.VERSION} | sums, indent=1)
        checksums.CHECKSUMS.write_text(text + "\n", "utf-8")
    try:
        checksums.verify(made)
    except ValueError as error:
        parser.error(str(error))
    if flags.text_dir:
        prompts.write(flags.text_dir, generate.prompt_sets(flags.form))
    if flags.data_dir:
        try:
            from worldr1_jax.data.world_prompts import builder
        except ModuleNotFoundError as error:
            parser.error(f"--data_dir needs the extra [tfds], which brings {error.name}")
        dataset = builder.WorldPrompts(data_dir=flags.data_dir, file_format="array_record")
        dataset.download_and_prepare()
        print(f"{dataset.data_dir}: " + ", ".join(f"{len(made[s])} {s}" for s in made))
    if flags.measure:
        for form in ("short", "long"):
            sets = vars(generate.prompt_sets(form))
            for name, texts in ({"all": sum(sets.values(), ())} | sets).items():
                print(form, name, json.dumps(measure.report(texts)))


if __name__ == "__main__":
    main()
