"""Prompt files: what is read, and what is refused, all at once."""

import json

import pytest

from configs import world
from worldr1_jax import settings
from worldr1_jax.camera import commands
from worldr1_jax.data import prompts
from worldr1_jax.evaluation import scoring
from worldr1_jax.policies import generate


def _folder(tmp_path, **files: bytes):
    for split in prompts.SPLITS:
        (tmp_path / f"{split}.txt").write_bytes(files.get(split, f"a {split} prompt\n".encode()))
    return tmp_path


def test_folder_is_read_in_file_order(tmp_path):
    folder = _folder(tmp_path, train="A red sphere.\r\n  Камера, два\u2028слова. \nlast".encode())
    assert prompts.read(folder) == prompts.PromptSets(
        train=("A red sphere.", "Камера, два\u2028слова.", "last"),
        dynamic=("a dynamic prompt",),
        test=("a test prompt",),
    )


def test_one_text_file_is_all_train_and_may_carry_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert prompts.read(path) == prompts.PromptSets(train=("one", "two"))


def test_jsonl_holds_splits(tmp_path):
    path = tmp_path / "p.jsonl"
    records = [{"prompt": "a"}, {"prompt": "b", "split": "dynamic"}, {"prompt": "c", "id": 3}]
    path.write_text("\n".join(json.dumps(record) for record in records))
    assert prompts.read(path) == prompts.PromptSets(train=("a", "c"), dynamic=("b",))


def test_every_problem_is_named_at_once_in_one_sentence(tmp_path):
    folder = _folder(tmp_path, train=b"ok\n\n\xff\nok\n\xff\xfe\n\xfe\nok\n", dynamic=b"  \n\n")
    (folder / "test.txt").unlink()
    (folder / "test.txt").mkdir()
    with pytest.raises(ValueError) as error:
        prompts.read(folder)
    message = str(error.value)
    assert "train.txt: not UTF-8 on lines 3, 5-6" in message
    assert "dynamic.txt: empty" in message
    assert "test.txt is no regular file" in message
    assert "\n" not in message and not message.endswith(".")


def test_what_is_not_asked_for_may_be_missing(tmp_path):
    folder = _folder(tmp_path)
    (folder / "dynamic.txt").unlink()
    (folder / "test.txt").unlink()
    assert prompts.read(folder) == prompts.PromptSets(("a train prompt",))
    (folder / "train.txt").unlink()
    with pytest.raises(ValueError, match=r"train\.txt: missing"):
        prompts.read(folder)


LINES = "\ufeffone\n\n  two\u2028three \r\n\t\r\ufefffour\r\n\u200b\n"


def test_every_reader_reads_the_same_lines(tmp_path):
    """Blank lines, ends of lines of three systems, a mark of byte order in the middle."""
    want = ["one", "two\u2028three", "four"]
    (tmp_path / "train.txt").write_bytes(LINES.encode())
    assert list(prompts.read(tmp_path).train) == want
    assert generate.read_prompts(str(tmp_path / "train.txt")) == want
    records = "".join(
        f"{line}{json.dumps({'prompt': prompt, 'video': 'a.mp4'}, ensure_ascii=False)}\n"
        for line, prompt in zip(("\ufeff", "\r\n \n", ""), want, strict=True)
    )
    path = tmp_path / "list.jsonl"
    path.write_bytes(records.encode())
    assert list(prompts.read(path).train) == want
    assert generate.read_prompts(str(path)) == want
    assert scoring.read_list(path) == [(str(tmp_path / "a.mp4"), prompt) for prompt in want]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": null, "video": "a"}', 'no text under "prompt" on line 2'),
        ('{"prompt": 3, "video": "a"}', 'no text under "prompt" on line 2'),
        ('{"video": "a"}', 'no text under "prompt" on line 2'),
        ('{"prompt": " ", "video": "a"}', "blank prompt on line 2"),
        ('{"prompt": "\u3000\u00a0", "video": "a"}', "blank prompt on line 2"),
        ('{"prompt": "a\\u0000b", "video": "a"}', 'control characters in "prompt" on line 2'),
        ('{"prompt": "\\ud800x", "video": "a"}', "half of a surrogate pair"),
        ('"prompt"', "not JSON of an object on line 2"),
        ("[" * 100_000, "not JSON of an object on line 2"),
        ('{"prompt": NaN, "video": "a"}', "not JSON of an object on line 2"),
    ],
)
def test_every_reader_refuses_the_same_records(tmp_path, line, message):
    path = tmp_path / "list.jsonl"
    path.write_text(f'{{"prompt": "a", "video": "b"}}\n{line}\n')
    for reader in (prompts.read, scoring.read_list, lambda path: generate.read_prompts(str(path))):
        with pytest.raises(ValueError, match=message):
            reader(path)


def test_a_prompt_that_no_file_could_hold_is_named():
    prompts.check_texts(["a", ""])
    with pytest.raises(ValueError, match=r"prompt 2, '.*', has half of a surrogate"):
        prompts.check_texts(["a", "b\udcff"])
    with pytest.raises(ValueError, match=r"prompt 1, 'b\\n\\x1b\[2J\\udcff', has half"):
        prompts.check_texts(["b\n\x1b[2J\udcff"])  # what it quotes is one line of a screen


def test_what_would_be_read_as_another_prompt_or_split_is_refused(tmp_path):
    for name, content, message in (
        (
            "a.txt",
            'a box\n{"prompt": "a"}\n',
            "a JSON record, which only a .jsonl file may hold on",
        ),
        ("a.txt", "a b".encode("utf-16-le").decode(), "control characters"),
        ("a.jsonl", '{"prompt": "a", "spilt": "test"}', '"spilt" in place of "split" on line 1'),
        ("a.jsonl", '{"prompt": "a", "Split": "test"}', '"Split" in place of "split" on line 1'),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "split": "test"}',
            "test: what is learnt from is not held out, such as 'a'",
        ),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            prompts.read(tmp_path / name)
    (tmp_path / "a.txt").write_text("{a box}\n\u3000\u200e\n")
    assert prompts.read(tmp_path / "a.txt").train == ("{a box}",)


def test_jsonl_problems(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": " "}\n[1]\n{oops\n{"prompt": "a", "split": "x"}')
    with pytest.raises(ValueError) as error:
        prompts.read(path)
    for part in ("blank prompt on line 2", "not JSON of an object on lines 3-4", "on line 5"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("gone.txt", None, "missing"),
        ("gone", None, "missing"),
        ("empty.txt", b"\n\n", "empty"),
        ("empty.jsonl", b"", "empty"),
        ("table.csv", b"a,b", "neither"),
        ("held.jsonl", b'{"prompt": "a", "split": "test"}', 'no prompt of the split "train"'),
    ],
)
def test_unusable_paths(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        prompts.read(tmp_path / name)


def test_prompts_with_unknown_camera_movements_are_named_by_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(
        "Camera pan left. A crane.\nCamera crane up. A cat.\n\nCamera crane up. A dog.\n"
        "Camera push in, then dolly zoom. X\n"
    )
    with pytest.raises(ValueError) as error:
        prompts.read(path, commands.complaint)
    message = str(error.value)
    assert '"crane up"' in message and "on lines 2, 4" in message
    assert '"dolly zoom"' in message and "on line 5" in message
    lines = tmp_path / "mine.jsonl"
    lines.write_text('{"prompt": "Camera zoom in. X"}\n{"prompt": "fine"}')
    with pytest.raises(ValueError, match=r'"zoom in".* on line 1'):
        prompts.read(lines, commands.complaint)


def test_what_is_written_is_read(tmp_path):
    sets = prompts.PromptSets(("a", "b"), ("c",), ("d\u2028e",))
    prompts.write(tmp_path / "new", sets)
    assert prompts.read(tmp_path / "new") == sets


@pytest.mark.parametrize(("name", "longer"), [("world", True), ("world_short", False)])
def test_the_config_field_that_names_ours(name, longer):
    config = world.get_config("nano")
    config.prompts = name
    sets = settings.load_prompts(settings.read(config))
    assert len(sets.train) >= 4000 and len(sets.dynamic) >= 800 and len(sets.test) >= 400
    assert (len(sets.test[0].split()) > 60) == longer
