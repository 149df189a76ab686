"""The world prompts: what their text is held to, and that it is always the same."""

import functools
import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest

from worldr1_jax.camera import commands
from worldr1_jax.data import prompts
from worldr1_jax.data.world_prompts import (
    builder,
    checksums,
    compose,
    generate,
    material,
    measure,
    phrasing,
)

made = functools.cache(generate.records)  # four seconds, which no other test has to wait for
FORMS = ("prompt", "prompt_long")
STOCK = re.compile(
    r"masterpiece|\b[48]k\b|\bultra-|hyper-?real|photo-?real|highly detailed|cinematic|stunning|"
    r"breathtaking|majestic|\baward|trending|best quality|unreal engine|intricate|vibrant",
    re.IGNORECASE,
)


@functools.cache
def every():
    """All records, in order."""
    return [record for records in made().values() for record in records]


def test_there_are_as_many_as_asked_for():
    counts = {split: len(records) for split, records in made().items()}
    assert counts == generate.COUNTS
    assert counts["train"] >= 4000 and counts["dynamic"] >= 800 and counts["test"] >= 400
    assert {r.category for r in every()} == set(material.CATEGORIES)
    for split, records in made().items():
        assert {r.is_dynamic for r in records} == {
            "train": {False}, "dynamic": {True}, "test": {False, True},
        }[split]  # fmt: skip


@pytest.mark.parametrize("place", range(0, sum(generate.COUNTS.values()), 97))
def test_form(place):
    record = every()[place]
    for text in (record.prompt, record.prompt_long):
        assert commands.parse(text) == record.commands and 1 <= len(record.commands) <= 3
        assert text.startswith(commands.text(record.commands))
    sentence = commands.scene(record.prompt)
    assert sentence.endswith(".") and "." not in sentence[:-1]
    assert not set("{}|/") & set(record.prompt + record.prompt_long)
    assert "  " not in record.prompt_long


@pytest.mark.slow
def test_lengths_and_stock_phrases():
    least, most = compose.LONG_WORDS
    for record in every():
        assert least <= len(measure.words(commands.scene(record.prompt_long))) <= most
        assert 8 <= len(commands.scene(record.prompt).split()) <= 45
        assert not STOCK.search(record.prompt + record.prompt_long), record
        assert not commands.unknown(record.prompt)


def test_the_camera_does_what_the_scene_allows():
    tags = {nucleus.name: nucleus.camera for nucleus in material.read().nuclei}
    for record in every():
        assert not material.CAMERAS[tags[record.scene]] & set(record.commands), record
        assert "fixed" not in record.commands[:-1]


@pytest.mark.parametrize("split", generate.COUNTS)
def test_movements_are_balanced(split):
    asked = Counter(name for record in made()[split] for name in record.commands)
    mean = sum(asked.values()) / len(commands.PUBLISHED)
    # 5%: the chooser evens counts out to a few; the test split asks for each some 80 times.
    assert all(abs(asked[name] - mean) <= 0.05 * mean for name in commands.PUBLISHED), asked


def test_no_scene_is_in_two_splits():
    scenes = [{record.scene for record in records} for records in made().values()]
    assert sum(map(len, scenes)) == len(set.union(*scenes)) >= 700


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", generate.COUNTS)
def test_no_sequence_of_eight_words_in_more_than_one_prompt_of_a_hundred(split, form):
    texts = [getattr(record, form) for record in made()[split]]
    for kind in (texts, [commands.scene(text) for text in texts]):
        sequence, share = measure.most_repeated(kind)
        assert share <= 0.01, sequence


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_no_two_prompts_are_nearly_the_same(form):
    index, first, second = measure.most_alike([commands.scene(getattr(r, form)) for r in every()])
    assert index < 0.4, (first, second)


@pytest.mark.slow
def test_vocabulary():
    distinct, stems = measure.vocabulary(commands.scene(r.prompt_long) for r in every())
    assert distinct >= 10_000 and stems >= 7000
    assert measure.vocabulary(commands.scene(r.prompt_long) for r in made()["train"])[0] >= 8000


def test_measures_on_small_texts():
    texts = ["a b c d", "a b c e", "x y z"]
    assert measure.most_repeated(texts, 3) == ("a b c", pytest.approx(2 / 3))
    assert measure.most_alike(texts) == (pytest.approx(1 / 3), "a b c d", "a b c e")
    assert measure.vocabulary(["The boat", "boats sail, SAILING 3"]) == (5, 3)


def test_the_text_is_that_of_its_version(tmp_path):
    checksums.verify(made())
    other = tmp_path / "checksums.json"
    other.write_text('{"version": "0.9.0"}')
    with pytest.raises(ValueError, match=r"differ from checksums.json in version, train"):
        checksums.verify(made(), other)


def test_another_seed_makes_other_text_from_the_same_scenes():
    counts = {"train": 800, "dynamic": 160, "test": 240}
    others = generate.generate(material.read(), 1, counts)
    assert {split: len(records) for split, records in others.items()} == counts
    assert not {r.prompt_long for r in others["train"]} & {r.prompt_long for r in every()}


def test_the_builder_writes_the_same_bytes_and_reads_back(tmp_path):
    def build(folder: Path) -> dict[str, str]:
        dataset = builder.WorldPrompts(data_dir=str(folder), file_format="array_record")
        dataset.download_and_prepare()
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        }

    first = build(tmp_path / "one")
    assert first == build(tmp_path / "two") and len(first) >= 6
    dataset = builder.WorldPrompts(data_dir=str(tmp_path / "one"), file_format="array_record")
    for split, records in made().items():
        source = dataset.as_data_source(split)
        assert len(source) == len(records)
        found, record = source[7], records[7]
        assert found["prompt"].decode() == record.prompt
        assert found["prompt_long"].decode() == record.prompt_long
        assert material.CATEGORIES[found["category"]] == record.category
        assert tuple(commands.PUBLISHED[i] for i in found["commands"]) == record.commands
        assert bool(found["is_dynamic"]) == record.is_dynamic


def test_text_files_hold_the_same_prompts(tmp_path):
    sets = generate.prompt_sets("short")
    prompts.write(tmp_path, sets)
    assert prompts.read(tmp_path, commands.complaint) == sets
    assert sets.test[3] == made()["test"][3].prompt
    assert generate.prompt_sets().train[5] == made()["train"][5].prompt_long


@pytest.mark.parametrize(
    ("verb", "participle"),
    [
        ("lies", "lying"), ("lie", "lying"), ("sits", "sitting"), ("flies", "flying"),
        ("crosses", "crossing"), ("press", "pressing"), ("rises", "rising"), ("sees", "seeing"),
        ("tunnels", "tunnelling"), ("gathers", "gathering"), ("leans", "leaning"),
        ("squats", "squatting"), ("goes", "going"), ("dyes", "dyeing"), ("flows", "flowing"),
        ("empties", "emptying"), ("overlaps", "overlapping"), ("touches", "touching"),
    ],
)  # fmt: skip
def test_present_participles(verb, participle):
    assert phrasing.present_participle(verb) == participle


def test_clauses():
    assert phrasing.finite("pots | lie and |drip") == "pots lie and drip"
    assert phrasing.participial("pots | lie and |drip") == "pots lying and dripping"
    assert phrasing.participial("a pail | is half full") == "a pail half full"
    assert phrasing.participial("rice | has the nap of velvet") == "rice with the nap of velvet"
    assert phrasing.participial("the sun | is a coin") is None
    assert phrasing.participial("a door | has opened") is None
    assert (
        phrasing.sentence("a hour of a unicorn and an boat") == "An hour of a unicorn and a boat."
    )


def test_malformed_material_is_named_all_at_once(tmp_path):
    for category in material.CATEGORIES:
        (tmp_path / category).mkdir()
        (tmp_path / category / "x.txt").write_text("")
    (tmp_path / "layout").mkdir()
    for category in material.CATEGORIES[1:]:
        (tmp_path / "layout" / f"{category}.txt").write_text("")
    (tmp_path / "urban" / "x.txt").write_text("# here | sideways\ns a cat sits\nq a | b\n")
    with pytest.raises(ValueError) as error:
        material.read(tmp_path)
    for part in (
        "layout/natural.txt is missing", "'# here | sideways' is not", "'s a cat sits' is not",
        "'q a | b' is not", "urban/x: here: too few lines of subject, foreground",
    ):  # fmt: skip
        assert part in str(error.value)


def test_a_scene_with_too_few_lines_is_named():
    lines = dict.fromkeys("sfmbtl", ("a cat | sits",))
    poor = material.Nucleus("here", "urban", "in a room", "room", lines)
    pieces = [
        material.Nucleus(f"{c}{i}", c, f"at {c} {i}", "open", poor.lines)
        for c in material.CATEGORIES
        for i in range(2)
    ]
    layout = dict.fromkeys(material.CATEGORIES, ("a wall | stands",))
    with pytest.raises(ValueError, match="has too few lines for"):
        generate.generate(material.Material(tuple(pieces), layout), 0)
