"""LoRA files without torch: what we write we read again, what others name otherwise, and what is
refused. tests/parity/test_lora_files.py compares with peft and diffusers."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests import tiny
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import lora_files
from worldr1_jax.nn import lora

CONFIG = wan_dit.Config(
    num_attention_heads=2, attention_head_dim=8, text_dim=8, freq_dim=8, ffn_dim=24, num_layers=3
)
DIM = 16


def random(targets=lora.ATTENTION, rank=4, alpha=6.0):
    """Random adapters of the layers that match."""
    rng, found = np.random.default_rng(0), {}
    network = nnx.eval_shape(lambda: wan_dit.WanDiT(CONFIG, nnx.Rngs(0)))
    for path, linear in lora.linears(network).items():
        if any(re.fullmatch(target, path) for target in targets):
            *stack, fan_in, fan_out = linear.kernel.shape
            halves = ((*stack, fan_in, rank), (*stack, rank, fan_out))
            a, b = (rng.normal(size=shape).astype(np.float32) for shape in halves)
            found[path] = lora.Adapter(a, b, alpha / rank)
    return found


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for path in want:
        jax.tree.map(np.testing.assert_array_equal, got[path], want[path])


@pytest.mark.parametrize("form", lora_files.FORMS)
def test_what_is_written_is_read_again(tmp_path, form):
    want = random() | random((r"blocks\.ffn\..*", "proj_out"), rank=2, alpha=3.0)
    lora_files.save(want, tmp_path, form)
    assert_equal(lora_files.load(tmp_path, CONFIG), want)


def comfy(tensors=None, dim=DIM, blocks=3, dtype=np.float32):
    """A file of someone else's: original names, alpha beside the pairs."""
    rng, out = np.random.default_rng(1), {}
    for i in range(blocks):
        key = f"diffusion_model.blocks.{i}.self_attn.q"
        out[f"{key}.lora_down.weight"] = rng.normal(size=(2, dim)).astype(dtype)
        out[f"{key}.lora_up.weight"] = rng.normal(size=(dim, 2)).astype(dtype)
        out[f"{key}.alpha"] = np.array(1.0, np.float32)
    return out | (tensors or {})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_original_names_are_read_and_fp16_is_exact_in_float32(tmp_path, dtype):
    tensors = comfy(dtype=dtype)
    save_file(tensors, tmp_path / "x.safetensors")
    found = lora_files.load(tmp_path, CONFIG)
    assert list(found) == ["blocks.attn1.to_q"]
    a, b, scale = found["blocks.attn1.to_q"]
    assert scale == 0.5 and a.dtype == b.dtype == np.float32
    key = "diffusion_model.blocks.2.self_attn.q"
    np.testing.assert_array_equal(a[2], tensors[f"{key}.lora_down.weight"].T)
    np.testing.assert_array_equal(b[2], tensors[f"{key}.lora_up.weight"].T)


Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (comfy(dim=24), r"shape \[2, 24\], where this network needs \[r, 16\]; was it trained for"),
        (comfy(blocks=5), "is of block 3; this network has 3 blocks"),
        (comfy({f"{Q}.diff": np.zeros(2, np.float32)}), "is a full difference of weights"),
        (comfy({f"{Q}.dora_scale": np.zeros(2, np.float32)}), "belongs to DoRA"),
        (comfy({"nothing": np.zeros(2, np.float32)}), "'nothing' is unknown"),
        (comfy({f"{Q}.alpha": np.zeros(3, np.float32)}), r"needs \[\], one number"),
        (comfy({f"{Q}.lora_up.weight": np.zeros((16, 2), np.int8)}), "stored as int8"),
        (comfy({f"{Q}.lora_up.weight": np.full((16, 2), np.nan, np.float32)}), "not finite"),
        (comfy({f"{Q}.lora_up.weight": np.zeros((16, 3), np.float32)}), r"needs \[16, 2\]"),
        (comfy({"blocks.0.self_attn.k.alpha": np.zeros((), np.float32)}), "mixes two ways"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        lora_files.load(tmp_path, CONFIG)


def test_half_a_pair_and_a_truncated_file_are_named(tmp_path):
    tensors = comfy()
    del tensors[f"{Q}.lora_up.weight"]
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"but not B \(up\) of the same layer"):
        lora_files.load(tmp_path, CONFIG)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read as safetensors"):
        lora_files.load(file, CONFIG)
    with pytest.raises(ValueError, match="does not exist"):
        lora_files.load(tmp_path / "y.safetensors", CONFIG)


def test_attached_and_merged_give_one_answer():
    """Merging rounds x (W + s A B) in another order than x W + s (x A) B: 1e-5 of the spread."""
    model = tiny.fresh(lambda: wan_dit.WanDiT(CONFIG, nnx.Rngs(0)))
    head = model.proj_out.kernel
    head[...] = 0.3 * jax.random.normal(jax.random.key(4), head.shape)
    inputs = (
        jax.random.normal(jax.random.key(1), (1, 1, 4, 4, 16)),
        np.array([500.0], np.float32),
        jax.random.normal(jax.random.key(2), (1, 3, 8)),
    )
    run = nnx.jit(lambda model: model(*inputs))
    base = np.asarray(run(model))
    lora.attach(model, random())
    attached = np.asarray(run(model))
    merged = np.asarray(run(lora.merge(model)))
    assert np.abs(attached - base).max() > 0.1 * base.std()
    assert np.abs(merged - attached).max() <= 1e-4 * attached.std()
    with pytest.raises(ValueError, match=r"'blocks\.attn3' is no linear layer"):
        lora.attach(model, {"blocks.attn3": random()["blocks.attn1.to_q"]})


def test_an_exported_file_has_the_ecosystems_names(tmp_path):
    lora_files.save(random(), tmp_path, "diffusers")
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert tensors["transformer.blocks.2.attn2.to_out.0.lora_A.weight"].shape == (4, DIM)
    assert tensors["transformer.blocks.0.attn1.to_q.lora_B.weight"].shape == (DIM, 4)
    assert len(tensors) == 2 * 3 * 8
    with pytest.raises(ValueError, match="the form of LoRA is 'kohya'"):
        lora_files.save(random(), tmp_path, "kohya")
