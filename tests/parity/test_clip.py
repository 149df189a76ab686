"""CLIP against OpenCLIP (HPSv2.1's code) and transformers (PickScore's), on tiny random weights in
float32; frames and prompts against torch, Pillow and both tokenizers."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import sys
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens.make_clip import TEXT, VISION, make_inputs, make_reference, run_reference
from worldr1_jax.models import clip

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# open_clip imports torchvision for what reads images, which nothing here calls; its wheel needs
# the CUDA build of torch.
_TORCHVISION = ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc")
with mock.patch.dict(sys.modules, {f"torchvision{n}": mock.MagicMock() for n in _TORCHVISION}):
    open_clip = pytest.importorskip("open_clip.model")
    open_clip_tokens = pytest.importorskip("open_clip.tokenizer")

QUICK = {"hidden_act": "quick_gelu"}
CASES = {  # changes to vision and text, length of embeddings, tokens of a prompt, seed
    "base": ({}, {}, 20, 12, 0),
    "quick": (QUICK, QUICK, 16, 9, 1),
    "wide": ({"hidden_size": 40, "image_size": 28, "patch_size": 14}, {"hidden_size": 24}, 8, 5, 2),
    "one_layer": ({"num_hidden_layers": 1}, {"num_hidden_layers": 1, "eos_token_id": 2}, 12, 12, 3),
}
# float32 sums in another order; embeddings are of length 1
TOLERANCE = 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("archive", [False, True])
def test_matches_transformers(case, archive, tmp_path):
    vision, text, projection, length, seed = CASES[case]
    reference = make_reference(vision, text, projection, seed)
    reference.save_pretrained(tmp_path)
    if archive:  # as PickScore_v1 has it beside its safetensors file
        (tmp_path / "model.safetensors").unlink()
        torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    side = {**VISION, **vision}["image_size"]
    frames, ids = make_inputs(side, TEXT["vocab_size"], length, seed)
    image, words = run_reference(reference, frames, ids)
    network = clip.load(tmp_path)
    assert np.abs(network.image(jnp.asarray(frames)) - image).max() <= TOLERANCE
    assert np.abs(network.text(jnp.asarray(ids)) - words).max() <= TOLERANCE
    assert float(network.logit_scale[...]) == reference.logit_scale.item()


SHAPES = {  # vision (image, patch, width, heads, layers), text (length, width, heads, layers)
    "base": ((16, 4, 24, 4, 3), (12, 16, 2, 2), 20, 0),
    "heads_of_80": ((28, 14, 160, 2, 2), (7, 64, 4, 1), 32, 1),
    "deep": ((15, 5, 32, 2, 6), (16, 24, 3, 5), 8, 2),
}


def _open_clip(case):
    (side, patch, width, heads, depth), (length, text_width, text_heads, text_depth), out, seed = (
        SHAPES[case]
    )
    torch.manual_seed(seed)
    vision = {
        "image_size": side, "patch_size": patch, "width": width, "head_width": width // heads,
        "layers": depth,
    }  # fmt: skip
    text = {
        "context_length": length, "vocab_size": 50, "width": text_width, "heads": text_heads,
        "layers": text_depth,
    }  # fmt: skip
    model = open_clip.CLIP(out, vision, text).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                norm = "ln_" in name and name.endswith("weight")
                parameter.normal_(1.0 if norm else 0.0, 0.2)
    config = clip.Config(
        clip.Tower(width, 4 * width, depth, heads),
        clip.Tower(text_width, 4 * text_width, text_depth, text_heads),
        out,
        image_size=side,
        patch_size=patch,
        vocab_size=50,
        max_position_embeddings=length,
    )
    return model, config, seed


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("half", [False, True])
def test_matches_open_clip(case, half, tmp_path):
    """From a checkpoint laid out as HPS_v2.1_compressed.pt, in float32 and in its float16."""
    model, config, seed = _open_clip(case)
    if half:
        model = model.half().float()
    state = model.half().state_dict() if half else model.state_dict()
    torch.save({"epoch": 3, "name": "tiny", "state_dict": state}, tmp_path / "tiny.pt")
    model = model.float()
    frames, ids = make_inputs(config.image_size, 50, config.max_position_embeddings, seed)
    with torch.no_grad():
        image = model.encode_image(torch.from_numpy(frames).permute(0, 3, 1, 2), normalize=True)
        words = model.encode_text(torch.from_numpy(ids).long(), normalize=True)
    network = clip.load(tmp_path, config=config)
    assert np.abs(network.image(jnp.asarray(frames)) - image.numpy()).max() <= TOLERANCE
    assert np.abs(network.text(jnp.asarray(ids)) - words.numpy()).max() <= TOLERANCE


def test_names_of_the_published_size():
    """ViT-H/14 as OpenCLIP builds it has the names and shapes that the table reads."""
    folder = Path(open_clip.__file__).parent / "model_configs"
    published = json.loads((folder / "ViT-H-14.json").read_text())
    with torch.device("meta"):
        model = open_clip.CLIP(
            published["embed_dim"], published["vision_cfg"], published["text_cfg"]
        )
    config = clip.Config.vit_h_14()
    block = model.visual.transformer.resblocks[0]
    assert block.attn.num_heads == config.vision.num_attention_heads
    assert model.transformer.resblocks[0].attn.num_heads == config.text.num_attention_heads
    assert isinstance(block.mlp.gelu, torch.nn.GELU)  # exact
    assert block.ln_1.eps == config.vision.layer_norm_eps
    assert sum(p.numel() for p in model.parameters()) == 986_109_441
    depths = config.vision.num_hidden_layers, config.text.num_hidden_layers
    named = {
        re.sub(r"(in_proj_\w+)\.[qkv]$", r"\1", key).format(i=i, j=j)
        for key, _, _ in clip.table("open_clip")
        for i, j in itertools.product(*map(range, depths))
    }
    assert named == set(model.state_dict())


def test_saved_folder_is_read_by_transformers(tmp_path):
    reference = make_reference({}, {}, 20, 5)
    reference.save_pretrained(tmp_path / "theirs")
    clip.save(clip.load(tmp_path / "theirs"), tmp_path / "ours")
    again = transformers.CLIPModel.from_pretrained(tmp_path / "ours").state_dict()
    for key, value in reference.state_dict().items():
        assert torch.equal(again[key], value), key


@pytest.mark.parametrize("size", [(480, 832), (129, 97), (64, 64), (512, 512), (224, 300)])
def test_frames_as_hpsv2_takes_them(size):
    """Floats first, the longest side to 224, zeros around it, then mean and deviation."""
    frames = np.random.default_rng(0).random((2, *size, 3)).astype(np.float32)
    scale = 224 / max(size)
    new = [round(n * scale) for n in size]
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pixels = torch.nn.functional.interpolate(
        pixels, new, mode="bicubic", align_corners=False, antialias=True
    )
    rows, columns = 224 - new[0], 224 - new[1]
    around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    pixels = torch.nn.functional.pad(pixels, around).permute(0, 2, 3, 1).numpy()
    want = (pixels - clip.MEAN) / clip.STD
    got = clip.preprocess(frames, clip.Config.vit_h_14(), "pad")
    assert np.abs(got - want).max() <= 1e-4  # torch sums in another order; values up to 4


@pytest.mark.parametrize("size", [(480, 832), (832, 480), (129, 97), (224, 224), (300, 301)])
def test_frames_as_pickscore_takes_them(size):
    """transformers' image processor, which reads 8 bits through Pillow."""
    # noise that overshoots nowhere: Pillow also cuts between its two passes
    frames = np.random.default_rng(1).integers(64, 192, (2, *size, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil()
    want = processor(list(frames), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    got = clip.preprocess(frames.astype(np.float32) / 255, clip.Config.vit_h_14(), "crop")
    # Pillow rounds to 8 bits after each pass: at most one and a half steps
    assert np.abs(got - want).max() <= 1.5 / 255 / clip.STD.min()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """vocab.json and merges.txt of the published tokenizer, from the file that OpenCLIP ships."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = open_clip_tokens.SimpleTokenizer()
    with gzip.open(open_clip_tokens.default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    # OpenCLIP writes its special tokens as "<start_of_text>"; the published files do not
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(
        json.dumps({names.get(word, word): i for word, i in ours.encoder.items()})
    )
    return folder


PROMPTS = [
    "A red sphere left of a tall blue box on a tiled floor in a brick room.",
    "It's 1985: the café's lights — 37 of them — don't flicker!",
    "  Many   spaces,\nand CAPITALS  ",
    "a long road " * 40,
]


def test_tokens_match_open_clip(vocabulary):
    want = open_clip_tokens.SimpleTokenizer()(PROMPTS).numpy()
    got = clip.Tokenizer(vocabulary)(PROMPTS)
    end = (want == 49407).argmax(1)
    np.testing.assert_array_equal((got == 49407).argmax(1), end)
    for row in range(len(PROMPTS)):  # behind the end OpenCLIP pads with 0, and nobody looks
        np.testing.assert_array_equal(got[row, : end[row] + 1], want[row, : end[row] + 1])


def test_tokens_match_transformers(vocabulary, tmp_path):
    """From the two files, and from the one that transformers makes of them."""
    theirs = transformers.CLIPTokenizer(
        str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt")
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    want = theirs(PROMPTS, padding="max_length", truncation=True, max_length=77)["input_ids"]
    for folder in (vocabulary, tmp_path):
        np.testing.assert_array_equal(clip.Tokenizer(folder)(PROMPTS), want)
