"""A whole model from a folder: both published layouts, what is refused, and the Orbax folder that
later starts restore."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests import tiny, torch_archive
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import umt5
from worldr1_jax.models.wan import config as wan_dit_config
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nn import lora
from worldr1_jax.policies import wan
from worldr1_jax.policies.base import POLICY, TEXT, VAE
from worldr1_jax.weights import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_weights(tmp_path_factory.mktemp("diffusers"), with_da3=False)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture(scope="module")
def model(folder, mesh):
    return wan.load(folder, mesh=mesh, tokens=8)


@pytest.fixture
def original(folder, model, tmp_path, monkeypatch):
    """The same weights in the files of Wan-Video's own release, whose VAE and text encoder have one
    size each, which here is the tiny one."""
    config = model.networks[POLICY].config
    named = {ours: theirs for theirs, ours in wan_dit_config._ORIGINAL_FIELDS.items()}
    fields = {named[k]: v for k, v in config.to_dict().items() if k in named}
    fields |= {"dim": config.dim, "model_type": "t2v", "text_len": 512}
    rows = wan_dit.table(config, "wan")
    convert.save(model.networks[POLICY], tmp_path, rows, {"i": config.num_layers}, fields)
    layers = model.networks[TEXT].config.num_layers
    for name, network, rows in (
        ("Wan2.1_VAE.pth", model.networks[VAE], wan_vae.table(model.networks[VAE].config, "wan")),
        ("models_t5_umt5-xxl-enc-bf16.pth", model.networks[TEXT], umt5.table("wan")),
    ):
        convert.save(network, tmp_path / "written", rows, {"i": layers})
        tensors = load_file(tmp_path / "written/diffusion_pytorch_model.safetensors")
        (tmp_path / name).write_bytes(torch_archive.pth(tensors, ordered=True))
    (tmp_path / "google").mkdir()
    (tmp_path / "google/umt5-xxl").symlink_to(folder / "tokenizer")
    monkeypatch.setattr(wan_vae.Config, "wan2_1", lambda: model.networks[VAE].config)
    monkeypatch.setattr(umt5.Config, "xxl", lambda: model.networks[TEXT].config)
    return tmp_path


def assert_equal(got, want):
    """Bits, dtypes and places of every parameter."""
    leaves = (nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (got, want))
    for a, b in zip(*leaves, strict=True):
        assert a[0] == b[0]
        first, second = (x[1].get_raw_value() for x in (a, b))
        assert first.dtype == second.dtype and first.sharding == second.sharding
        np.testing.assert_array_equal(first, second)


def assert_same_model(got, want):
    assert got.networks.keys() == want.networks.keys() == {POLICY, VAE, TEXT}
    for name, network in got.networks.items():
        assert_equal(network, want.networks[name])
    prompt = ["camera push in. a red sphere"]
    np.testing.assert_array_equal(*(wan.tokenize(m.tokenizer, prompt, 8)[0] for m in (got, want)))


def test_the_original_release_gives_the_same_model(original, model, mesh):
    assert_same_model(wan.load(original, mesh=mesh, tokens=8), model)


def test_prompts_are_cleaned_before_they_are_tokenized(model):
    clean = ["a red sphere", "a red sphere , a box"]
    plain, mask = wan.tokenize(model.tokenizer, clean, 8)
    dirty = [" a\tred \n sphere ", "a red sphere&amp;#44; a box"]
    again, _ = wan.tokenize(model.tokenizer, dirty, 8)
    np.testing.assert_array_equal(plain, again)
    assert mask.sum(1).tolist() == [4, 7] and plain.dtype == np.int32


def test_names_of_the_original_vae_at_its_published_size():
    """As Wan-Video's own network names them: the first and last of each list, and 194 keys."""
    names = {row[0] for row in wan_vae.table(wan_vae.Config.wan2_1(), "wan")}
    assert len(names) == 194
    assert {
        "encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma", "conv1.weight",
        "encoder.downsamples.3.shortcut.weight", "encoder.downsamples.2.resample.1.weight",
        "encoder.downsamples.10.residual.6.bias", "encoder.middle.2.residual.3.gamma",
        "encoder.head.2.weight", "conv2.bias", "decoder.middle.1.to_qkv.weight",
        "decoder.upsamples.3.time_conv.weight", "decoder.upsamples.4.shortcut.weight",
        "decoder.upsamples.11.resample.1.bias", "decoder.upsamples.14.residual.2.weight",
        "decoder.head.0.gamma",
    } <= names  # fmt: skip


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("vae", "lacks vae, its vae"),
        ("tokenizer", "lacks tokenizer, its tokenizer"),
        ("text_encoder", "lacks text_encoder"),
    ],
)
def test_a_missing_part_is_named(folder, tmp_path, gone, message):
    for part in wan.LAYOUTS["diffusers"]:
        if part != gone:
            (tmp_path / part).symlink_to(folder / part)
    with pytest.raises(ValueError, match=message):
        wan.parts(tmp_path)


def test_a_missing_file_of_the_original_release_is_named(original, mesh):
    (original / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(ValueError, match=r"lacks Wan2\.1_VAE\.pth, its vae: it needs Wan2\.1_VAE"):
        wan.parts(original)


def test_a_folder_of_neither_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="of neither layout"):
        wan.parts(tmp_path)
    with pytest.raises(ValueError, match="'nowhere' is no folder"):
        wan.parts("nowhere")


def test_a_truncated_file_of_the_original_release_is_named(original, mesh):
    file = original / "models_t5_umt5-xxl-enc-bf16.pth"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"models_t5_umt5-xxl-enc-bf16\.pth cannot be read"):
        wan.load(original, mesh=mesh, tokens=8)


# -- the Orbax folder


@pytest.fixture(scope="module")
def one():
    """A mesh of one device, from which Orbax writes in a tenth of the time of eight."""
    return make_mesh({}, jax.devices()[:1])


@pytest.fixture(scope="module")
def stored(folder, one, tmp_path_factory):
    to = tmp_path_factory.mktemp("stored") / "wan"
    wan.store(folder, to, mesh=one, dtype=jnp.float32)
    return to


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"data": 1}], ids=str
)
def test_a_stored_model_starts_on_any_mesh_with_the_same_bits(folder, stored, sizes):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    want = wan.load(folder, mesh=mesh, tokens=8)
    assert_same_model(wan.load(stored, mesh=mesh, tokens=8), want)
    assert wan.read_configs(stored) == wan.read_configs(folder)


def test_a_stored_model_is_cast_as_published_files_are(folder, stored, mesh):
    want = wan.load(folder, mesh=mesh, tokens=8, dtype=jnp.bfloat16)
    assert want.networks[POLICY].blocks.attn1.to_q.kernel.dtype == jnp.bfloat16
    assert_same_model(wan.load(stored, mesh=mesh, tokens=8, dtype=jnp.bfloat16), want)


def test_adapters_are_folded_into_what_is_stored(folder, model, mesh, tmp_path):
    rng = np.random.default_rng(0)
    kernel = model.networks[POLICY].blocks.attn1.to_q.kernel[...]
    a, b = rng.normal(size=(2, 32, 3)), rng.normal(size=(2, 3, 32))
    adapters = {"blocks.attn1.to_q": lora.Adapter(a, b, 0.5)}
    wan.store(folder, tmp_path / "new", mesh=mesh, dtype=jnp.float32, form="diffusers",
              adapters=adapters)  # fmt: skip
    again = wan.load(tmp_path / "new", mesh=mesh, tokens=8)
    got = again.networks[POLICY].blocks.attn1.to_q.kernel[...]
    np.testing.assert_allclose(got, kernel + 0.5 * a @ b, atol=1e-5)  # float32 sums of three
    with pytest.raises(ValueError, match="has transformer/ already"):
        wan.store(folder, tmp_path / "new", mesh=mesh, dtype=jnp.float32)


def test_damage_to_a_stored_model_is_named(stored, tmp_path):
    part = shutil.copytree(stored / "text_encoder", tmp_path / "text_encoder")

    def refused(message):
        with pytest.raises(ValueError, match=message):
            umt5.load(part)

    config = (part / "config.json").read_text()
    (part / "config.json").write_text(config.replace('"d_ff": 32', '"d_ff": 48'))
    refused(r"'blocks.wi_0.kernel' has shape \[1, 32, 32\], but the config asks for \[1, 32, 48\]")
    (part / "config.json").write_text(config)
    largest = max((f for f in part.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1])
    refused(rf"{largest.name} is {len(content) - 1} bytes long, not {len(content)}")
    largest.unlink()
    refused("is missing, not")
    (part / "leaves.json").unlink()
    refused(r"holds no \.safetensors file")
