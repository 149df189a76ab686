"""Bad files of strangers, for bad_inputs.py: headers and archives of weights, LoRA, config.json of
networks, caches of prompts, and videos."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save, save_file

from tests.data import test_text_cache
from tests.measure.tries import Try
from tests.models import test_lora_files
from tests.torch_archive import pack, pth, table
from tests.weights.test_fields import NOT_READ, leaves, wrong
from worldr1_jax import files, media
from worldr1_jax.data import text_cache
from worldr1_jax.models import umt5
from worldr1_jax.models.clip import config as clip
from worldr1_jax.models.clip import tokens
from worldr1_jax.models.da3 import config as da3
from worldr1_jax.models.qwen3_vl import config as qwen3_vl
from worldr1_jax.models.qwen3_vl import names, prompt
from worldr1_jax.models.wan import config as wan_dit
from worldr1_jax.models.wan import lora_files
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.policies import wan_folder
from worldr1_jax.weights import convert

# -- files of weights, for a network of one layer

WEIGHTS = {
    "weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "bias": np.array([1.5, -2, 3, 4], np.float32),
}
TABLE = (("weight", "kernel", "linear"), ("bias", "bias", "copy"))


def _loaded(path: Path) -> dict[str, np.ndarray]:
    layer = nnx.eval_shape(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    convert.load(layer, path, TABLE)
    return {"weight": np.asarray(layer.kernel[...]).T, "bias": np.asarray(layer.bias[...])}


def _as_saved(found: dict[str, np.ndarray]) -> bool:
    """A flipped bit of an idle part may pass; another network may not."""
    return all(np.array_equal(found[name], value) for name, value in WEIGHTS.items())


def _flipped(content: bytes, first: int, last: int, rng: random.Random) -> bytes:
    place, bit = rng.randrange(first, last), rng.randrange(8)
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def _forged(header: Any, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def safetensors(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Cut, flipped and forged headers, and numbers that are none."""
    good = save(WEIGHTS)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    contents = {f"cut at {n}": good[:n] for n in range(0, len(good), 4)}
    contents |= {f"flip {i}": _flipped(good, 0, header, rng) for i in range(110)}
    entry = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
    bias = {"dtype": "F32", "shape": [4], "data_offsets": [48, 64]}
    for field, values in {
        "dtype": ("I32", "U8", "BOOL", "F4", "", 3, None, "F64", "C64", "F8_E4M3", "X" * 1000),
        "shape": ([3, 4], [12], [-4, -3], [2**62, 4], [4, 3, 1], [4.0, 3], None, "43", [], [[4]]),
        "data_offsets": ([0, 47], [1, 49], [48, 0], [0, 2**63], [-1, 47], [0], None, ["0", "48"]),
    }.items():
        for value in values:
            broken = {"weight": entry | {field: value}, "bias": bias}
            contents[f"{field}={str(value)[:40]}"] = _forged(broken)
    for name, whole in {
        "empty": {}, "list": [], "null": None, "nested": b"[" * 100_000, "not JSON": b"{",
        "no bias": {"weight": entry}, "other names": {"w": entry, "b": bias},
        "long length": b"\xff" * 8, "overlap": {"weight": entry, "bias": entry | {"shape": [12]}},
        "twice": b'{"weight":' + json.dumps(entry).encode() + b',"weight":3}',
    }.items():  # fmt: skip
        contents[name] = _forged(whole)
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        for key in WEIGHTS:
            for number in (math.nan, math.inf, -math.inf):
                tensors = {name: value.astype(dtype) for name, value in WEIGHTS.items()}
                tensors[key].flat[-1] = number
                contents[f"{number} in {key}, {np.dtype(dtype).name}"] = save(tensors)
    contents["beyond float32"] = save({k: v.astype(np.float64) * 1e300 for k, v in WEIGHTS.items()})
    yield from _files("safetensors", folder / "model.safetensors", contents, _loaded, _as_saved)


def archives(folder: Path, rng: random.Random) -> Iterator[Try]:
    """torch's: cut, flipped and forged tables, and calls."""
    good, pickle = pth(WEIGHTS), table(WEIGHTS)
    data = {f"data/{i}": value.tobytes() for i, value in enumerate(WEIGHTS.values())}
    contents = {f"cut at {n}": good[:n] for n in range(0, len(good), 16)}
    tables = {f"flip {i}": _flipped(pickle, 0, len(pickle), rng) for i in range(110)}
    tables |= {f"table cut at {n}": pickle[:n] for n in range(0, len(pickle), 8)}
    for module, name in (("os", "system"), ("builtins", "eval"), ("torch", "load"),
                         ("torch._utils", "_rebuild_tensor"), ("collections", "Counter"),
                         ("numpy", "frombuffer"), ("builtins", "getattr")):  # fmt: skip
        call = f"c{module}\n{name}\n".encode() + b"X\x04\x00\x00\x00true\x85R."
        tables[f"calls {module}.{name}"] = b"\x80\x02" + call
    for name, opcodes in {
        "marks": b"(" * 200_000, "deep tuple": b")" + b"\x85" * 100_000, "dup": b"}2",
        "long": b"\x8b",
        "frame": b"\x95" + b"\xff" * 8, "get": b"h\x05", "inst": b"(ios\nsystem\n",
        "ext": b"\x82\x01",
        "stack global": b"\x8c\x02os\x8c\x06system\x93", "set": b"\x8f", "buffer": b"\x97",
    }.items():  # fmt: skip
        tables[name] = b"\x80\x02" + opcodes + b"."
    contents |= {name: pack({"data.pkl": made, **data}) for name, made in tables.items()}
    contents["no table"] = pack(data)
    contents["short record"] = pack({"data.pkl": pickle, **data, "data/0": bytes(8)})
    contents["no record"] = pack({"data.pkl": pickle})
    contents["big-endian"] = pack({"data.pkl": pickle, "byteorder": b"big", **data})
    contents["deflated"] = pack({"data.pkl": pickle, **data}, compression=8)
    contents["old format"] = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M"
    for key in WEIGHTS:
        for number in (math.nan, math.inf):
            tensors = {name: value.copy() for name, value in WEIGHTS.items()}
            tensors[key].flat[0] = number
            contents[f"{number} in {key}"] = pth(tensors)
    yield from _files("torch archives", folder / "model.pth", contents, _loaded, _as_saved)


def indexes(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Of shards, and things that are no regular files."""
    save_file(WEIGHTS, folder / "a.safetensors")
    shards = {"weight": "a.safetensors", "bias": "a.safetensors"}
    for name, whole in {
        "list": [], "no map": {}, "map of numbers": {"weight_map": {"weight": 3}},
        "map is a list": {"weight_map": ["a"]},
        "outside": {"weight_map": {"weight": "/etc/passwd"}},
        "above": {"weight_map": {"weight": "../a.safetensors"}},
        "part": {"weight_map": {"weight": "a.safetensors"}},
        "missing": {"weight_map": {**shards, "bias": "b.safetensors"}},
        "null": {"weight_map": None},
        "more": {"weight_map": {**shards, "other": "a.safetensors"}}, "empty": {"weight_map": {}},
        "lists": {"weight_map": {"weight": ["a.safetensors"]}},
        "surrogate": {"weight_map": {"weight": "\ud800"}},
        "nul": {"weight_map": {"weight": "a\0b"}}, "long": {"weight_map": {"weight": "a" * 5000}},
    }.items():  # fmt: skip
        index = folder / f"x{len(name)}{name[:3]}.safetensors.index.json"
        index.write_text(json.dumps(whole))
        yield Try("shards", name, lambda index=index: _loaded(index))
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "loop.pth").symlink_to("loop.pth")
    (folder / "folder.bin").mkdir()
    for place in (
        "pipe.safetensors",
        "loop.pth",
        "folder.bin",
        "none.pt",
        "a" * 400 + ".pth",
        "x.gguf",
    ):
        yield Try("shards", place[:40], lambda place=place: _loaded(folder / place))
    for url in ("gs://bucket/model.safetensors", "s3://b/x.pth", "https://host/model.safetensors"):
        yield Try("shards", url, lambda url=url: convert.load(nnx.Dict(), url, ()))


def _files(
    kind: str, path: Path, contents: dict[str, bytes], read: Callable[[Path], Any],
    right: Callable[[Any], bool] | None = None,
) -> Iterator[Try]:  # fmt: skip
    """A try for each content, written as its turn comes."""
    for name, content in contents.items():

        def call(content: bytes = content) -> Any:
            path.write_bytes(content)
            return read(path)

        yield Try(kind, name, call, right)


# -- LoRA


def lora(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Every way of naming, with every defect; and fields of LoraConfig."""
    path = folder / "lora.safetensors"

    def read(tensors: dict[str, np.ndarray], metadata: Any = None) -> Any:
        path.unlink(missing_ok=True)
        save_file(tensors, path, metadata)
        return lora_files.load(path, test_lora_files.CONFIG)

    defects: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "nan": lambda x: np.full_like(x, math.nan), "inf": lambda x: np.full_like(x, math.inf),
        "ints": lambda x: x.astype(np.int32), "axes": lambda x: x.T.copy(), "flat": np.ravel,
        "rank 0": lambda x: x[:0], "cut": lambda x: x[:-1].copy(),
        "float64": lambda x: x.astype(np.float64) * 1e300,
        "3 axes": lambda x: x[..., None],
    }  # fmt: skip
    for pattern in test_lora_files.PATTERNS:
        tensors = test_lora_files.renamed(pattern)
        for name, defect in rng.sample(sorted(defects.items()), 4):
            key = rng.choice(sorted(tensors))
            broken = tensors | {key: defect(tensors[key])}
            yield Try("LoRA", f"{name} of {key}", lambda broken=broken: read(broken))
        key = rng.choice(sorted(tensors))
        half = {k: v for k, v in tensors.items() if k != key}
        yield Try("LoRA", f"without {key}", lambda half=half: read(half))
        blocks = test_lora_files.renamed(pattern, blocks=4)
        yield Try("LoRA", f"4 blocks of {pattern}", lambda blocks=blocks: read(blocks))
        twice = tensors | {f"{key}x": tensors[key]}
        yield Try("LoRA", f"and {key}x", lambda twice=twice: read(twice))
    tensors = test_lora_files.renamed(test_lora_files.PATTERNS[3])
    fields = {"r": 2, "lora_alpha": 2.0}
    for name, values in {
        "r": (None, "2", 3, 0, -1, True, math.nan, [2], 10**400),
        "lora_alpha": (None, "2", 1e300, [1], True),
        "rank_pattern": ("x", {"(a+)+$": 2}, {"q": "2"}, {".*.*": 2}, [1], {"to_q": 3}),
        "alpha_pattern": (3, {"(a|a)*": 2}, {"to_q": None}, {"to_q": 1e300}, {"x" * 300: 1}),
        "use_dora": (True, "yes"), "bias": ("all", "lora_only", 3), "peft_type": ("LOHA", None, []),
        "modules_to_save": (["proj_out"],), "init_lora_weights": ("pissa", "olora", {}),
        "use_rslora": ("yes", [1], 0.5), "fan_in_fan_out": (True,), "unheard_of": (1, "x"),
    }.items():  # fmt: skip
        for value in values:
            header = json.dumps({f"transformer.{k}": v for k, v in {**fields, name: value}.items()})
            metadata = {"lora_adapter_metadata": header}
            yield Try("LoRA", f"{name}={str(value)[:60]}", lambda m=metadata: read(tensors, m))
    for header in ("", "[", "[]", "null", "[" * 100_000, '{"transformer.r": NaN}'):
        metadata = {"lora_adapter_metadata": header}
        yield Try("LoRA", f"header {header[:20]}", lambda m=metadata: read(tensors, m))


# -- config.json of networks

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "transformer": (wan_dit.Config, wan_dit.Config.nano().to_dict()),
    "vae": (wan_vae.Config, wan_vae.Config.nano().to_dict()),
    "text_encoder": (umt5.Config, umt5.Config.nano().to_dict()),
    "da3": (da3.Config, da3.Config.nano().to_dict()),
    "clip": (clip.Config, clip.Config.nano(512, 3).to_dict()),
    "qwen3_vl": (qwen3_vl.Config, qwen3_vl.Config.nano().to_dict()),
}

# The towers say it again; transformers and we read the one above them.
PASSED_OVER = ("vision_config.projection_dim", "text_config.projection_dim")


def configs(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Fields with wrong values, fields left out or unknown, and files that are no objects."""
    path = folder / "config.json"

    def read(kind: Any, content: bytes) -> Any:
        path.write_bytes(content)
        return convert.config_of(kind, folder)

    for part, (kind, values) in CONFIGS.items():
        for place, value in leaves(values):
            if place[-1] in NOT_READ or ".".join(place) in PASSED_OVER or value is None:
                continue
            for bad in rng.sample(wrong(value), min(3, len(wrong(value)))):
                broken = copy.deepcopy(values)
                _at(broken, place)[place[-1]] = bad
                name, made = f"{part} {'.'.join(place)}={bad!r}", _json(broken)
                yield Try("config.json", name, lambda k=kind, m=made: read(k, m))
            short = copy.deepcopy(values)
            del _at(short, place)[place[-1]]
            name, made = f"{part} without {'.'.join(place)}", _json(short)
            yield Try("config.json", name, lambda k=kind, m=made: read(k, m), lambda _: True)
        for content in (b"", b"[]", b"null", b"3", b'"x"', b"{", b"\xff", b"[" * 100_000, b"{}{}",
                        b'{"a": NaN}', b'{"num_layers": 1e999}',
                        _json({"model_name": []})):  # fmt: skip
            # Where all fields are published defaults, as CLIP's, none is needed.
            ok = (lambda _: True) if content in (b"{}", _json({"model_name": []})) else None
            yield Try(
                "config.json",
                f"{part} is {content[:20]!r}",
                lambda k=kind, c=content: read(k, c),
                ok,
            )


def _at(values: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    for name in place[:-1]:
        values = values[name]
    return values


def _json(values: Any) -> bytes:
    return json.dumps(values).encode()


# -- caches of prompts


def caches(folder: Path, rng: random.Random) -> Iterator[Try]:
    """index.json and records of encode_prompts."""
    made = folder / "cache"
    test_text_cache.write(made, "x")
    index = json.loads((made / text_cache.INDEX).read_bytes())
    records = (made / text_cache.RECORDS).read_bytes()

    def read(changes: Any, content: bytes = records) -> Any:
        text = changes if isinstance(changes, bytes) else _json(index | changes)
        (made / text_cache.INDEX).write_bytes(text)
        (made / text_cache.RECORDS).write_bytes(content)
        cache = text_cache.TextCache(made, made_by="x")
        cache.check(test_text_cache.PROMPTS)
        return cache(test_text_cache.PROMPTS)

    hashes = index["prompts"]
    for name, values in {
        "tokens": (0, -1, "6", None, 1.5, 10**12, [6], True),
        "width": (0, -4, "4", None, 3, 10**12, {}),
        "dtype": ("int8", "object", "", None, 3, "float64", "<U4", "bfloat17", ["f"]),
        "prompts": (None, 3, [], hashes[1:], [*hashes, "x"], [[h] for h in hashes], {"a": 1},
            [hashes[0]] * 4),
        "made_by": ("y", None, 3, []),
    }.items():  # fmt: skip
        for value in values:
            yield Try("text cache", f"{name}={str(value)[:40]}", lambda c={name: value}: read(c))
    for text in (b"", b"[]", b"{}", b"{", b"null", b"[" * 100_000, b"\xff\xfe"):
        yield Try("text cache", f"index is {text[:10]!r}", lambda t=text: read(t))
    for cut in (0, 10, len(records) // 2, len(records) - 1):
        yield Try("text cache", f"records cut at {cut}", lambda c=cut: read({}, records[:c]))


# -- videos


def videos(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Cut, scripted, too large, uneven, and no files at all."""
    clip_path = folder / "clip.mp4"
    media.write_mp4(clip_path, np.random.default_rng(0).random((9, 32, 32, 3)), 8)
    good = clip_path.read_bytes()
    scripts = {
        "concat": b"ffconcat version 1.0\nfile clip.mp4\n",
        "m3u8": b"#EXTM3U\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n",
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 1234 RTP/AVP 96\n",
        "dash": b"<MPD><Period/></MPD>",
        "text": b"hello\n" * 100, "empty": b"", "zeros": bytes(10_000),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(50),
        "srt": b"1\n00:00:00,000 --> 00:00:01,000\nhi\n",
        "wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
    }  # fmt: skip
    contents = scripts | {
        f"cut at {n}": good[:n] for n in range(40, len(good) - 1, len(good) // 12)
    }
    _ffmpeg(["-i", str(clip_path), str(folder / "clip.gif")])
    moving = (folder / "clip.gif").read_bytes()
    scripts |= {f"cut at {n}": moving[:n] for n in range(2000, len(moving) - 1, len(moving) // 12)}
    for suffix in (".mp4", ".gif"):
        some = contents if suffix == ".mp4" else scripts
        yield from _files("videos", folder / f"x{suffix}", some, lambda p: media.read_video(p, 9))
    for name, arguments in {
        "uneven.mp4": ["testsrc=s=32x32:r=10:d=1", "-vf", "select='not(mod(n,3)*mod(n,2))'",
            "-fps_mode", "vfr"],
        "long.mp4": ["testsrc=s=32x32:r=10:d=3"],
        "small.mp4": ["testsrc=s=6x6:r=10:d=0.5", "-c:v", "mpeg4"],
        "large.mp4": ["color=s=8192x8192:r=10:d=0.9", "-preset", "ultrafast"],
        "sound.mp4": ["sine=d=1"],
        "flat.mp4": ["testsrc=s=32x32:r=10:d=0.5,setsar=2"],
    }.items():  # fmt: skip
        _ffmpeg(["-f", "lavfi", "-i", *arguments, str(folder / name)])
        yield Try("videos", name, lambda n=name: media.read_video(folder / n, 9))
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    for place in (
        "pipe.mp4",
        "folder.mp4",
        "loop.mp4",
        "device.mp4",
        "none.mp4",
        "a" * 300 + ".mp4",
        "a\0b.mp4",
    ):
        yield Try("videos", place[:40], lambda p=place: media.read_video(folder / p, 9))
    for name in (
        "concat:a|b",
        "http://127.0.0.1/x.mp4",
        "pipe:0",
        "file:/etc/passwd",
        "-i",
        "tcp://h:1",
        "",
        "/dev/stdin",
    ):
        yield Try("videos", name, lambda n=name: media.read_video(n, 9))
    for fps in (0, -1, math.nan, math.inf, 1e400):
        yield Try(
            "videos",
            f"fps {fps}",
            lambda f=fps: media.write_mp4(clip_path, np.zeros((2, 16, 16, 3)), f),
        )
    for shape in ((2, 16, 16), (0, 16, 16, 3), (2, 16, 16, 4), (2, 0, 16, 3)):
        yield Try(
            "videos", f"shape {shape}", lambda s=shape: media.write_mp4(clip_path, np.zeros(s), 8)
        )
    yield Try(
        "videos", "nan", lambda: media.write_mp4(clip_path, np.full((2, 16, 16, 3), math.nan), 8)
    )


def _ffmpeg(arguments: list[str]) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def texts(folder: Path, rng: random.Random) -> Iterator[Try]:
    """JSON that is none, as every small file is read."""
    for name, content in {
        "deep list": b"[" * 10**6, "deep object": b'{"a":' * 10**5,
        "huge number": b'{"a": ' + b"9" * 10**5 + b"}",
        "infinity": b'{"a": Infinity}', "float": b'{"a": 1e400}',
        "utf-16": '{"a": 1}'.encode("utf-16"),
        "half": b'{"a": "\\', "list": b"[1]", "text": b'"a"', "two": b"{} {}",
        "latin": b'{"a": "\xe9"}',
    }.items():  # fmt: skip
        yield from _files("JSON", folder / "x.json", {name: content}, files.read_json)


def tokenizers(folder: Path, rng: random.Random) -> Iterator[Try]:
    """Of Wan, CLIP and Qwen3-VL; and what Qwen3-VL says of images."""
    path, config = folder / "tokenizer.json", qwen3_vl.Config.nano()
    readers: dict[str, Callable[[Path], Any]] = {
        "wan": wan_folder.load_tokenizer,
        "clip": tokens.Tokenizer,
        "qwen3_vl": lambda where: prompt.read_tokens(where, config),
    }
    empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    contents = {
        "empty": b"", "list": b"[]", "null": b"null", "no fields": b"{}",
        "cut": b'{"version": "1.0", ',
        "deep": b"[" * 100_000, "bytes": b"\xff\xfe\x00", "no vocabulary": _json(empty),
        "numbers": _json({"version": 1, "model": 3}),
        "code": _json(empty | {"auto_map": {"x": "y"}}),
        "merges": _json(empty | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}}),
    }  # fmt: skip
    for name, read in readers.items():
        for what, content in contents.items():

            def call(content: bytes = content, read: Callable[[Path], Any] = read) -> Any:
                path.write_bytes(content)
                return read(folder)

            yield Try("tokenizers", f"{name}: {what}", call)
        yield Try("tokenizers", f"{name}: none", lambda r=read: r(folder / "none"))
    (folder / "config.json").write_bytes(_json(config.to_dict()))
    good = config.preprocessor_dict()
    for field, value in (("size", 3), ("size", {}),
                         ("size", {"shortest_edge": "x", "longest_edge": 1}),
                         ("patch_size", None), ("image_mean", "x"), ("min_pixels", [1]),
                         ("max_pixels", 10**30), ("min_pixels", -1)):  # fmt: skip
        made = _json(good | {field: value})
        yield from _preprocessed(folder, f"{field}={value}", made)
    for content in (b"", b"[]", b"null", b"[" * 100_000, b"\xff"):
        yield from _preprocessed(folder, str(content[:9]), content)


def _preprocessed(folder: Path, name: str, content: bytes) -> Iterator[Try]:
    path = folder / "preprocessor_config.json"
    yield from _files("tokenizers", path, {name: content}, lambda _: names.read_config(folder))
