"""The cache of prompt embeddings: what it gives back, and what it refuses."""

import json
import resource
import signal

import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from worldr1_jax.data import text_cache

TOKENS, WIDTH = 6, 4
PROMPTS = ["a red sphere", "a box", "", "Camera push in. A box.", "a box"]


def encode(prompts):
    """An encoder whose rows depend on the prompt alone; padded places hold nonsense."""
    text = np.stack(
        [
            np.random.default_rng(len(p)).normal(size=(TOKENS, WIDTH)).astype(np.float32)
            for p in prompts
        ]
    )
    return text.astype(ml_dtypes.bfloat16), np.array(
        [min(TOKENS, 1 + len(p) // 4) for p in prompts]
    )


@pytest.fixture
def encoder(tmp_path):
    """A folder that stands for the encoder's files, one of them large."""
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(5 << 20))
    return folder


def write(folder, made_by, prompts=PROMPTS):
    return text_cache.write(folder, prompts, encode, made_by=made_by, tokens=TOKENS, batch=3)


def test_embeddings_come_back_bit_for_bit_and_zero_beyond_the_prompt(tmp_path, encoder):
    made_by = text_cache.fingerprint([encoder], TOKENS)
    assert write(tmp_path / "cache", made_by) == 4  # one prompt comes twice
    cache = text_cache.TextCache(tmp_path / "cache", made_by=made_by)
    asked = [PROMPTS[3], PROMPTS[1], PROMPTS[1], PROMPTS[2]]
    found = cache(asked)
    text, lengths = encode(asked)
    assert found.dtype == ml_dtypes.bfloat16 and found.shape == (4, TOKENS, WIDTH)
    for row, want, length in zip(found, text, lengths, strict=True):
        np.testing.assert_array_equal(row[:length], want[:length])
        assert not row[length:].any()


def test_a_stale_cache_is_refused(tmp_path, encoder):
    made_by = text_cache.fingerprint([encoder], TOKENS)
    write(tmp_path / "cache", made_by)
    assert text_cache.fingerprint([encoder], TOKENS + 1) != made_by
    weights = bytearray(5 << 20)
    weights[::4096] = b"\x01" * len(weights[::4096])
    (encoder / "model.safetensors").write_bytes(weights)
    changed = text_cache.fingerprint([encoder], TOKENS)
    assert changed != made_by
    with pytest.raises(ValueError, match="is stale"):
        text_cache.TextCache(tmp_path / "cache", made_by=changed)


def test_a_prompt_that_is_not_in_it_is_named(tmp_path):
    write(tmp_path / "cache", "x")
    cache = text_cache.TextCache(tmp_path / "cache", made_by="x")
    with pytest.raises(ValueError, match="lacks 2 of the prompts, such as 'a cat'"):
        cache(["a box", "a cat", "a dog"])


def test_a_cache_cut_short_is_none(tmp_path):
    folder = tmp_path / "cache"
    write(folder, "x")
    (folder / text_cache.INDEX).unlink()
    with pytest.raises(ValueError, match="no complete cache"):
        text_cache.TextCache(folder, made_by="x")
    write(folder, "x")
    index = json.loads((folder / text_cache.INDEX).read_text())
    index["prompts"].append("0")
    (folder / text_cache.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="holds 4 records for 5 prompts"):
        text_cache.TextCache(folder, made_by="x")


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    def broken(prompts):
        text, lengths = encode(prompts)
        text[-1, 0, -1] = np.inf
        return text, lengths

    with pytest.raises(ValueError, match="embedding of '' holds numbers that are not finite"):
        text_cache.write(tmp_path, PROMPTS[:3], broken, made_by="x", tokens=TOKENS, batch=3)
    with pytest.raises(ValueError, match="no complete cache"):
        text_cache.TextCache(tmp_path, made_by="x")


def test_the_files_of_two_caches_are_none(tmp_path):
    """What a copy leaves that stopped between them: as many records, of other prompts."""
    write(tmp_path / "a", "x")
    write(tmp_path / "b", "x", PROMPTS[::-1])
    (tmp_path / "b" / text_cache.RECORDS).rename(tmp_path / "a" / text_cache.RECORDS)
    cache = text_cache.TextCache(tmp_path / "a", made_by="x")
    with pytest.raises(ValueError, match="the record of 'a red sphere' is another's"):
        cache.check(PROMPTS)


def test_a_disk_that_fills_up_is_one_sentence(tmp_path):
    """As a limit on the size of files, of which the system says the same."""
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, whole[1]))
    try:
        with pytest.raises(ValueError, match=r"array_record cannot be written: .*too large"):
            write(tmp_path, "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        signal.signal(signal.SIGXFSZ, former)


def rewritten(folder, change):
    """The cache with other records: `change` of the bytes behind each record's hash."""
    write(folder, "x")
    old = ArrayRecordReader(str(folder / text_cache.RECORDS))
    records = [record[:32] + change(record[32:]) for record in old.read_all()]
    writer = ArrayRecordWriter(str(folder / text_cache.RECORDS), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return text_cache.TextCache(folder, made_by="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: b"\x80\x7f" + r[2:], "embedding of 'a red sphere' holds numbers that are not"),
        (lambda r: b"\xc0\xff" + r[2:], "embedding of 'a red sphere' holds numbers that are not"),
        (lambda r: r[:-1], r"is damaged \('a red sphere' has 31 bytes\)"),
        (lambda r: r * 9, r"is damaged \('a red sphere' has 288 bytes\)"),
    ],
)
def test_embeddings_are_checked_before_a_run_and_as_they_are_read(tmp_path, change, message):
    """Infinity and NaN of bfloat16, and records of other lengths."""
    cache = rewritten(tmp_path, change)
    for read in (cache.check, cache):
        with pytest.raises(ValueError, match=message):
            read(PROMPTS)


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("tokens", "width", "dtype", "prompts")),
        *({"width": width} for width in (0, -1, 10**12, 1.5, "4")),
        *({"dtype": dtype} for dtype in ("int8", "O", "x", 3)),
        {"prompts": [["a"], ["b"], ["c"], ["d"]]},
    ],
    ids=str,
)
def test_an_index_of_nonsense_is_one_sentence(tmp_path, change):
    write(tmp_path, "x")
    path = tmp_path / text_cache.INDEX
    index = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in index.items() if v is not None}))
    with pytest.raises(ValueError, match=r"is damaged \("):
        text_cache.TextCache(tmp_path, made_by="x")


def test_records_of_nonsense_are_one_sentence(tmp_path):
    write(tmp_path, "x")
    (tmp_path / text_cache.RECORDS).write_bytes(b"nonsense" * 1000)
    with pytest.raises(ValueError, match=r"holds 0 records for 4 prompts"):
        text_cache.TextCache(tmp_path, made_by="x").check(PROMPTS)
    (tmp_path / text_cache.INDEX).write_text("[")
    with pytest.raises(ValueError, match=r"index\.json is not valid JSON"):
        text_cache.TextCache(tmp_path, made_by="x")


def test_hidden_files_are_no_part_of_an_encoder(encoder):
    made_by = text_cache.fingerprint([encoder], TOKENS)
    (encoder / "._model.safetensors").write_bytes(b"x")
    assert text_cache.fingerprint([encoder], TOKENS) == made_by


def test_a_missing_encoder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no file"):
        text_cache.fingerprint([tmp_path / "nowhere"], TOKENS)
