"""LoRA files against peft and diffusers: each reads what the other side wrote, unrenamed, and the
networks then give the same output, on tiny random weights in float32."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.goldens.make_wan_dit import make_inputs, make_reference, run_reference
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import lora_files
from worldr1_jax.nn import lora

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

FIELDS = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
}
ALL = (r".*",)
CASES = {  # what lora.add is called with, one call after the other: rank, alpha, targets
    "as_trained": [(4, 8.0, lora.ATTENTION)],
    "rank_1": [(1, 3.0, lora.ATTENTION)],
    "odd_scale": [(7, 2.5, (r"blocks\.attn1\.to_q", r"blocks\.attn2\.to_out"))],
    "all_layers": [(3, 12.0, ALL)],
    "ranks_and_alphas": [
        (4, 2.0, lora.ATTENTION),
        (2, 6.0, (r"blocks\.ffn\..*",)),
        (5, 5.0, ("time_proj", "proj_out", r"text_embedder\.linear_2")),
    ],
}
NAMES = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_proj", "proj_out"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_reference(FIELDS, 0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(FIELDS, (3, 4, 6), 7, 0)


@pytest.fixture(scope="module")
def base(published, inputs):
    """The output without LoRA."""
    return run_reference(theirs(published), *inputs)


@pytest.fixture(scope="module", params=CASES)
def written(request, published, inputs, tmp_path_factory):
    """Folder with both forms of our random adapters, and our network's output with them."""
    model = ours(published, request.param)
    folder = tmp_path_factory.mktemp(request.param)
    for form in lora_files.FORMS:
        lora_files.save(model, folder / form, form)
    return folder, run(model, inputs)


def theirs(published):
    return diffusers.WanTransformer3DModel.from_pretrained(published).eval()


def ours(published, case):
    """Our network with random adapters, B not zero."""
    model = wan_dit.load(published)
    for rank, alpha, targets in CASES[case]:
        lora.add(model, rank, alpha, nnx.Rngs(1), targets=targets)
    key = jax.random.key(2)
    for linear in lora.linears(model).values():
        if linear.lora_a is not None:
            key, first, second = jax.random.split(key, 3)
            linear.lora_a[...] = 0.2 * jax.random.normal(first, linear.lora_a.shape)
            linear.lora_b[...] = 0.2 * jax.random.normal(second, linear.lora_b.shape)
    return model


def run(model, inputs):
    return np.asarray(model(*map(jnp.asarray, inputs)))


def error(got, expected, base):
    """Largest difference, relative to the spread of the output and to what LoRA changed in it."""
    changed = np.abs(expected - base).max()
    assert changed > 0.05 * expected.std()
    return np.abs(got - expected).max() / min(changed, expected.std())


def pipeline(transformer):
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(),
    )  # fmt: skip


def by_pipeline(model, folder):
    pipeline(model).load_lora_weights(folder)
    return model


def by_transformer(model, folder):
    model.load_lora_adapter(folder, use_safetensors=True)
    return model


def by_transformer_from_peft(model, folder):
    model.load_lora_adapter(folder, prefix="base_model.model", use_safetensors=True)
    return model


def by_peft(model, folder):
    return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize(
    "form, read",
    [
        ("diffusers", by_pipeline),
        ("diffusers", by_transformer),
        ("peft", by_transformer_from_peft),
        ("peft", by_peft),
    ],
)
def test_they_load_what_we_write(published, inputs, base, written, form, read, caplog):
    folder, expected = written
    model = read(theirs(published), str(folder / form))
    assert not caplog.records  # of keys that were missing or not expected
    off = error(run_reference(model, *inputs), expected, base)
    print(f"{folder.name} {form} {read.__name__} {off:.1e}")
    # float32 sums in another order
    assert off <= 1e-4


def trained(published, **changes):
    """Their network with random LoRA of the given config."""
    model = theirs(published)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": NAMES} | changes)
    model.add_adapter(config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    return model


CONFIGS = {
    "plain": {},
    "rank_1": {"r": 1, "lora_alpha": 0.5},
    "patterns": {
        "rank_pattern": {"proj_out": 2, "ffn.net.2": 3},
        "alpha_pattern": {r"blocks\.1\.attn1\.to_q": 1, "attn2.to_k": 11},
    },
    "rank_stabilised": {"use_rslora": True, "r": 9},
    "one_block": {"layers_to_transform": [1], "layers_pattern": "blocks"},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_we_load_what_they_write(published, inputs, base, tmp_path, config):
    model = trained(published, **CONFIGS[config])
    expected = run_reference(model, *inputs)
    weights = peft.get_peft_model_state_dict(model)
    settings = model.peft_config["default"]
    diffusers.WanPipeline.save_lora_weights(
        tmp_path / "pipeline", weights, transformer_lora_adapter_metadata=settings.to_dict()
    )
    model.save_lora_adapter(tmp_path / "transformer")
    wrapped = peft.PeftModel(theirs(published), settings)
    peft.set_peft_model_state_dict(
        wrapped, {f"base_model.model.{key}": value for key, value in weights.items()}
    )
    wrapped.save_pretrained(tmp_path / "peft")
    network = wan_dit.load(published)
    found, *others = (
        lora_files.load(tmp_path / form, network.config)
        for form in ("pipeline", "transformer", "peft")
    )
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, found, other)
    off = error(run(lora.attach(network, found), inputs), expected, base)
    print(f"{config} {off:.1e}")
    assert off <= 1e-4  # float32 sums in another order


@pytest.mark.parametrize("form", ["comfy", "comfy_alpha", "kohya"])
def test_original_names_mean_what_diffusers_takes_them_for(published, inputs, base, tmp_path, form):
    """Pairs on every linear layer of the blocks, in the ways in which trainers name them."""
    rng, tensors = np.random.default_rng(4), {}
    dim, hidden, rank = 48, FIELDS["ffn_dim"], 3
    sizes = {"ffn.0": (dim, hidden), "ffn.2": (hidden, dim)}
    names = [f"{attn}.{part}" for attn in ("self_attn", "cross_attn") for part in "qkvo"]
    for i in range(FIELDS["num_layers"]):
        for name in (*names, *sizes):
            key = f"diffusion_model.blocks.{i}.{name}"
            if form == "kohya":
                key = f"lora_unet_blocks_{i}_{name}".replace(".", "_")
            down, up = ("lora_A", "lora_B") if form == "comfy" else ("lora_down", "lora_up")
            fan_in, fan_out = sizes.get(name, (dim, dim))
            a, b = rng.normal(0, 0.2, (rank, fan_in)), rng.normal(0, 0.2, (fan_out, rank))
            tensors[f"{key}.{down}.weight"] = a.astype(np.float32)
            tensors[f"{key}.{up}.weight"] = b.astype(np.float32)
            if form != "comfy":
                tensors[f"{key}.alpha"] = np.array(1 + i, np.float32)
    save_file(tensors, tmp_path / "trained.safetensors")
    reference = by_pipeline(theirs(published), str(tmp_path / "trained.safetensors"))
    expected = run_reference(reference, *inputs)
    got = run(lora_files.into(wan_dit.load(published), tmp_path), inputs)
    off = error(got, expected, base)
    print(f"{form} {off:.1e}")
    assert off <= 1e-4  # float32 sums in another order


def test_a_merged_network_loads_in_diffusers(published, inputs, base, tmp_path):
    model = ours(published, "ranks_and_alphas")
    expected = run(model, inputs)
    wan_dit.save(lora.merge(model), tmp_path)
    off = error(run_reference(theirs(tmp_path), *inputs), expected, base)
    print(f"merged {off:.1e}")
    assert off <= 1e-4  # float32 sums in another order


def test_the_folder_is_written_as_peft_writes_it(published, tmp_path):
    """Same keys, shapes and fields; peft writes more fields, all at their defaults."""
    model = ours(published, "as_trained")
    lora_files.save(model, tmp_path / "ours")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=NAMES[:4])
    peft.PeftModel(theirs(published), config).save_pretrained(tmp_path / "theirs")
    got, want = (load_file(tmp_path / side / "adapter_model.safetensors") for side in
                 ("ours", "theirs"))  # fmt: skip
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    assert got.keys() == want.keys()
    fields = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    here = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert here.keys() <= fields.keys()
    read = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    assert (read.r, read.lora_alpha, read.peft_type) == (4, 8, "LORA")
