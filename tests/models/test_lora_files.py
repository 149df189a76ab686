"""LoRA files without torch: what we write we read again, what others name otherwise, and what is
refused. tests/parity/test_lora_files.py compares with peft and diffusers."""

import json
import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import lora_files, lora_names
from worldr1_jax.nn import lora
from worldr1_jax.weights import convert

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
    (tmp_path / "._x.safetensors").touch()  # as macOS leaves beside a copy
    if form == "diffusers":  # whose older readers take the factor 1, whatever the header says
        want = {path: lora.Adapter(x.a, x.b * np.float32(x.scale), 1.0) for path, x in want.items()}
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
        (
            comfy({f"{Q}.diff": np.zeros((16, 16), np.float32)}),
            "changes 'blocks.attn1.to_q.kernel' itself, not by LoRA: fold it",
        ),
        (comfy({f"{Q}.diff_b": np.zeros(2, np.float32)}), r"needs \[16\]"),
        (comfy({f"{Q}.scale_weight": np.zeros(2, np.float32)}), "is the scale of 8-bit weights"),
        (comfy({f"{Q}.alpha": np.array(1e300)}), "not finite"),
        (
            comfy(
                {
                    f"{Q}.alpha": np.array(3e38, np.float32),
                    f"{Q}.lora_up.weight": np.full((16, 2), 9, np.float32),
                }
            ),
            r"is scaled by 1\.5\d+e\+38, beyond float32",
        ),
        (comfy({f"{Q}.alpha": np.array(np.nan, np.float32)}), "not finite"),
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


def renamed(pattern, scale=None, blocks=3):
    """The pairs of two layers under other names, the same for every pattern."""
    rng, tensors = np.random.default_rng(1), {}
    for i in range(blocks):
        for wan, ours in (("self_attn.q", "attn1.to_q"), ("ffn.0", "ffn.net.0.proj")):
            fan_out = DIM if wan == "self_attn.q" else 24
            halves = {"A": rng.normal(size=(2, DIM)), "B": rng.normal(size=(fan_out, 2))}
            for half, value in halves.items():
                name = {"A": "down", "B": "up"}[half]
                key = pattern.format(
                    i=i, wan=wan, flat=wan.replace(".", "_"), ours=ours, half=half, name=name
                )
                tensors[key] = value.astype(np.float32)
    return tensors


PATTERNS = (
    "diffusion_model.blocks.{i}.{wan}.lora_A.weight",
    "diffusion_model.blocks.{i}.{wan}.lora_{name}.weight",
    "model.diffusion_model.blocks.{i}.{wan}.lora_{name}.weight",
    "transformer.blocks.{i}.{ours}.lora_{half}.weight",
    "transformer.blocks.{i}.{ours}.lora_{half}.my-style.weight",
    "transformer.blocks.{i}.{ours}.lora.{name}.weight",
    "transformer.blocks.{i}.{ours}_lora.{name}.weight",
    "blocks.{i}.{ours}.lora_{half}.default.weight",
    "blocks.{i}.{wan}.lora_{half}",
    "pipe.dit.blocks.{i}.{wan}.lora_{half}.weight",
    "lora_unet_blocks_{i}_{flat}.lora_{name}.weight",
    "lora_unet__blocks_{i}_{flat}.lora_{name}.weight",
    "lora_unet_blocks_{i}.{wan}.lora_{name}.weight",
    "lora_transformer_blocks_{i}_{flat}.lora_{name}.weight",
    "lycoris_blocks_{i}_{flat}.lora_{name}.weight",
    "module.blocks.{i}.{wan}.lora_{half}.weight",
    "_orig_mod.blocks.{i}.{wan}.lora_{half}.weight",
    "module._orig_mod.diffusion_model.blocks.{i}.{wan}.lora_{half}.weight",
    "transformer.blocks.{i}._orig_mod.{ours}.lora_{half}.weight",
)


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_names_of_the_wild_are_read(tmp_path, pattern):
    save_file(renamed(pattern), tmp_path / "x.safetensors")
    found = lora_files.load(tmp_path, CONFIG)
    save_file(renamed("{wan}{i}{half}"), tmp_path / "plain")
    plain = load_file(tmp_path / "plain")
    assert list(found) == ["blocks.attn1.to_q", "blocks.ffn.linear_1"]
    for leaf, wan in zip(found, ("self_attn.q", "ffn.0"), strict=True):
        assert found[leaf].scale == 1
        for i in range(3):
            np.testing.assert_array_equal(found[leaf].a[i], plain[f"{wan}{i}A"].T)
            np.testing.assert_array_equal(found[leaf].b[i], plain[f"{wan}{i}B"].T)


def test_flat_names_are_of_one_layer_each():
    """Both layouts without their points, in one table: nothing is in it twice."""
    for layout in ("diffusers", "wan"):
        names = lora_names.linears(layout)
        assert all(lora_names._flat_linears()[n.replace(".", "_")] == names[n] for n in names)


def test_ranks_and_alphas_that_differ_by_block_are_one_stack(tmp_path):
    rng, tensors, want = np.random.default_rng(2), {}, []
    for i, rank in enumerate((2, 5, 1)):
        key = f"diffusion_model.blocks.{i}.self_attn.q"
        a, b = rng.normal(size=(rank, DIM)), rng.normal(size=(DIM, rank))
        tensors[f"{key}.lora_down.weight"] = a.astype(np.float32)
        tensors[f"{key}.lora_up.weight"] = b.astype(np.float32)
        tensors[f"{key}.alpha"] = np.array(3.0, np.float32)
        want.append((b.astype(np.float32) @ a.astype(np.float32)).T * 3 / rank)
    save_file(tensors, tmp_path / "x.safetensors")
    a, b, scale = lora_files.load(tmp_path, CONFIG)["blocks.attn1.to_q"]
    assert a.shape == (3, DIM, 5) and scale == 1 and not a[2, :, 1:].any() and not b[0, 2:].any()
    np.testing.assert_allclose(a @ b, want, rtol=1e-5, atol=1e-5)  # float32 sums of five


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_floats_of_eight_bits_are_read(tmp_path, kind):
    tensors = comfy(dtype=kind)
    save_file(tensors, tmp_path / "x.safetensors")
    a = lora_files.load(tmp_path, CONFIG)["blocks.attn1.to_q"].a
    want = tensors["diffusion_model.blocks.1.self_attn.q.lora_down.weight"].T
    np.testing.assert_array_equal(a[1], want.astype(np.float32))


def test_differences_of_whole_weights_are_added_on_request(tmp_path):
    rng = np.random.default_rng(3)
    shapes = {
        f"{Q}.diff": (DIM, DIM), f"{Q}.diff_b": (DIM,), "diffusion_model.head.head.diff_b": (64,),
        "diffusion_model.blocks.2.norm3.diff": (DIM,),
        "diffusion_model.blocks.1.diff_m": (1, 6, DIM),
        "diffusion_model.blocks.0.modulation.diff_m": (1, 6, DIM),
        "diffusion_model.patch_embedding.diff": (DIM, 16, 1, 2, 2),
        "diffusion_model.time_projection.1.diff": (6 * DIM, DIM),
    }  # fmt: skip
    added = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    save_file(comfy(added), tmp_path / "x.safetensors")
    model = wan_dit.WanDiT(CONFIG, nnx.Rngs(0))
    before = {k: np.asarray(v.get_raw_value()) for k, v in convert.leaves(model).items()}
    lora_files.into(model, tmp_path)
    changed = {
        k: np.asarray(v.get_raw_value()) - before[k]
        for k, v in convert.leaves(model).items()
        if not np.array_equal(v.get_raw_value(), before[k])
    }
    for leaf, place, key in (
        ("blocks.attn1.to_q.kernel", 0, f"{Q}.diff"),
        ("blocks.attn1.to_q.bias", 0, f"{Q}.diff_b"),
        ("proj_out.bias", ..., "diffusion_model.head.head.diff_b"),
        ("blocks.norm2.scale", 2, "diffusion_model.blocks.2.norm3.diff"),
        ("blocks.scale_shift_table", 1, "diffusion_model.blocks.1.diff_m"),
        ("time_proj.kernel", ..., "diffusion_model.time_projection.1.diff"),
    ):
        want = added[key].T if leaf.endswith("kernel") else added[key]
        np.testing.assert_allclose(changed[leaf][place], want, atol=1e-6)
    patch = added["diffusion_model.patch_embedding.diff"].transpose(2, 3, 4, 1, 0)
    np.testing.assert_allclose(changed["patch_embedding.kernel"], patch, atol=1e-6)
    assert len(changed) == 7 and model.blocks.attn1.to_q.lora_a is not None


def peft_file(folder, **settings):
    """A pair on each block with peft's config beside it."""
    tensors = renamed("base_model.model.blocks.{i}.{ours}.lora_{half}.weight")
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("pattern", "scales"),
    [
        ("attn1.to_q", (3, 3, 3)),
        (r"blocks\.1\.attn1\.to_q", (2, 3, 2)),
        (r"^blocks\.\d+\.attn1\.to_q$", (3, 3, 3)),
        ("blocks.[0-9]+.attn1.to_q", (3, 3, 3)),
        ("blocks.*to_q", (3, 3, 3)),
        ("to_v", (2, 2, 2)),
    ],
)
def test_patterns_of_names_give_alphas(tmp_path, pattern, scales):
    found = lora_files.load(peft_file(tmp_path, alpha_pattern={pattern: 6}), CONFIG)
    plain = lora_files.load(peft_file(tmp_path, alpha_pattern={}), CONFIG)
    got, base = found["blocks.attn1.to_q"], plain["blocks.attn1.to_q"]
    for i in range(3):
        np.testing.assert_allclose(got.b[i] * got.scale, base.b[i] * scales[i], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rank_pattern": {"(a+)+b": 2}},
            r"has the pattern '\(a\+\)\+b' in 'rank_pattern'; what is",
        ),
        ({"rank_pattern": {"(a|a)*b": 2}}, "has the pattern"),
        ({"rank_pattern": {".*.*.*x": 2}}, "has the pattern"),
        ({"rank_pattern": {"a" * 300: 2}}, "has the pattern"),
        ({"rank_pattern": [1]}, "has no patterns of layers' names"),
        ({"rank_pattern": {str(i): 2 for i in range(3000)}}, "has no patterns of layers' names"),
        ({"alpha_pattern": {"to_q": "x"}}, "has no number for 'to_q'"),
        ({"alpha_pattern": {"to_q": 1e300}}, r"is scaled by 5e\+299, beyond float32"),
        ({"alpha_pattern": {"to_q": 10**400}}, "has no number for 'to_q'"),
        ({"lora_alpha": math.nan}, "NaN is no number"),
        ({"lora_alpha": 1e39}, "is scaled by 5e"),
        ({"lora_alpha": True}, "lacks the number 'lora_alpha'"),
        ({"r": "2"}, "lacks the number 'r'"),
        ({"bias": "all"}, "cannot honour"),
        ({"use_dora": True}, "cannot honour"),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        lora_files.load(peft_file(tmp_path, **settings), CONFIG)


def test_two_adapters_in_a_file_are_refused(tmp_path):
    tensors = renamed("blocks.{i}.{ours}.lora_{half}.one.weight")
    tensors |= renamed("blocks.{i}.{ours}.lora_{half}.two.weight")
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds two adapters"):
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
    model = wan_dit.WanDiT(CONFIG, nnx.Rngs(0))
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
    lora_files.save(random(), tmp_path, "comfyui")
    tensors = load_file(tmp_path / "comfyui_lora.safetensors")
    key = "diffusion_model.blocks.2.cross_attn.o"
    assert tensors[f"{key}.lora_A.weight"].shape == (4, DIM) and tensors[f"{key}.alpha"] == 6
    with pytest.raises(ValueError, match="is a URL"):
        lora_files.save(random(), "gs://bucket/lora")
    with pytest.raises(ValueError, match="the form of LoRA is 'kohya'"):
        lora_files.save(random(), tmp_path, "kohya")
