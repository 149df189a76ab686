"""A whole model from a folder: both published layouts, what is refused, and the Orbax folder that
later starts restore."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests import torch_archive
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import umt5
from worldr1_jax.models.wan import config as wan_dit_config
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nn import lora
from worldr1_jax.policies import wan, wan_folder
from worldr1_jax.policies.base import POLICY, TEXT, VAE, family
from worldr1_jax.weights import convert


@pytest.fixture(scope="module")
def folder(weights):
    return weights


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
    for part in wan_folder.LAYOUTS["diffusers"]:
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


# -- folders of other models, and code in folders

T2V = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.35.0",
    "boundary_ratio": None,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def linked(folder, to):
    for part in wan_folder.LAYOUTS["diffusers"]:
        (to / part).symlink_to(folder / part)
    return to


def test_the_index_of_a_text_to_video_pipeline_is_read(folder, tmp_path):
    linked(folder, tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(T2V))
    assert wan.parts(tmp_path)["vae"] == tmp_path / "vae"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "'transformer_2' = "),
        ({"boundary_ratio": 0.875}, "'boundary_ratio' = 0.875: Wan2.1's .* needs it null"),
        ({"expand_timesteps": True}, "'expand_timesteps' = True"),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, "'image_encoder' = 'CLIPVision"),
        ({"vae": ["diffusers", "AutoencoderKLQwenImage"]}, "'vae' = .* needs 'AutoencoderKLWan'"),
        ({"transformer": ["diffusers", "WanVACETransformer3DModel"]}, "'transformer' = 'WanVACE"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "needs 'UMT5EncoderModel'"),
        ({"_class_name": "WanImageToVideoPipeline"}, "is of 'WanImageToVideoPipeline': what is"),
        ({"_class_name": "WanVACEPipeline"}, "is of 'WanVACEPipeline'"),
        ({"something_new": 3}, "'something_new' = 3"),
    ],
)
def test_the_index_of_another_pipeline_is_refused_by_name(folder, tmp_path, change, message):
    linked(folder, tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(T2V | change))
    with pytest.raises(ValueError, match=message):
        wan.parts(tmp_path)


@pytest.mark.parametrize(
    "name", ["transformer_2", "high_noise_model", "low_noise_model", "Wan2.2_VAE.pth"]
)
def test_a_part_of_another_model_is_refused_by_name(folder, tmp_path, name):
    linked(folder, tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"has {name}, the .* of Wan2\.2-"):
        wan.parts(tmp_path)


def test_a_transformer_of_more_channels_than_latents_is_refused(folder, tmp_path):
    """As of Wan2.2's image-to-video, which has no other field that text-to-video has not."""
    linked(folder, tmp_path)
    (tmp_path / "transformer").unlink()
    (tmp_path / "transformer").mkdir()
    config = json.loads((folder / "transformer/config.json").read_text()) | {"in_channels": 36}
    (tmp_path / "transformer/config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="has 36 channels in and 16 out, and the latents of the VAE"
    ):
        wan.read(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizers_own_code_is_not_run(folder, tmp_path, monkeypatch, file):
    """Whatever stands on standard input."""
    tokenizer = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    path = tokenizer / file
    values = json.loads(path.read_text()) if path.exists() else {"model_type": "mine"}
    values |= {"auto_map": {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.C"}}
    path.write_text(json.dumps(values | {"tokenizer_class": "Own"}))
    (tokenizer / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    with pytest.raises(ValueError, match=rf"{file} names code to run \('auto_map'\)"):
        wan_folder.load_tokenizer(tokenizer)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "[" * 100_000, r"tokenizer\.json is not valid JSON: it is nested too"),
        ("tokenizer.json", "{}", "holds no tokenizer that transformers can read"),
        ("tokenizer.json", None, "holds no tokenizer that transformers can read"),
    ],
)
def test_a_broken_tokenizer_is_named(folder, tmp_path, file, content, message):
    tokenizer = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    (tokenizer / file).unlink()
    if content is not None:
        (tokenizer / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        wan_folder.load_tokenizer(tokenizer)


@pytest.mark.parametrize("field", ["pad_token", "eos_token"])
def test_a_tokenizer_that_does_not_pad_and_end_prompts_is_refused(folder, tmp_path, field):
    tokenizer = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    del config[field]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds no tokenizer of UMT5's kind: it has to have a"):
        wan_folder.load_tokenizer(tokenizer)


def test_a_prompt_without_its_end_is_refused(folder, tmp_path):
    tokenizer = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    (tokenizer / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(ValueError, match="end every prompt with its end token"):
        wan_folder.load_tokenizer(tokenizer)


def test_the_tokenizer_of_another_encoder_is_refused(folder, one, monkeypatch):
    monkeypatch.setattr(wan, "_UNUSED", -1)
    with pytest.raises(ValueError, match=r"has 57 tokens, and the text encoder beside it 57: they"):
        wan.load_text(folder, mesh=one, tokens=8)


def test_a_class_that_is_no_text_is_of_no_family(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": ["WanModel"]}')
    with pytest.raises(ValueError, match=r"is a \['WanModel'\]: it has to be one of"):
        family(tmp_path)


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
    assert wan.read(stored) == wan.read(folder)


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


@pytest.mark.parametrize(
    "part, file, content, words",
    [
        ("scheduler", "scheduler/scheduler_config.json", "{}", "of its scheduler names no class"),
        ("scheduler", "scheduler/scheduler_config.json", None, "does not exist"),
        ("tokenizer", "tokenizer/tokenizer_config.json", '{"tokenizer_class": 3}', "its tokenizer"),
    ],
)
def test_a_pipeline_that_cannot_be_described_is_known_before_it_is_converted(
    folder, one, tmp_path, part, file, content, words
):
    for name in ("transformer", "vae", "text_encoder", "tokenizer"):
        if name != part:
            (tmp_path / name).symlink_to(folder / name)
    (tmp_path / part).mkdir()
    if content:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        wan.store(tmp_path, tmp_path / "new", mesh=one, dtype=jnp.float32, form="diffusers")
    assert not list((tmp_path / "new").iterdir())


def test_a_number_that_is_not_finite_is_found_in_a_stored_model(folder, one, tmp_path):
    model = umt5.load(folder / "text_encoder", mesh=one)
    model.norm_out.scale[...] = model.norm_out.scale[...].at[-1].set(jnp.nan)
    convert.store(model, tmp_path, model.config.to_dict())
    with pytest.raises(ValueError, match=r"'norm_out\.scale' holds numbers that are not finite"):
        umt5.load(tmp_path, mesh=one)


def test_a_bucket_is_no_folder(folder, one):
    for to in ("gs://bucket/wan", "gs:/bucket/wan"):
        with pytest.raises(ValueError, match="is a URL"):
            wan.store(folder, to, mesh=one, dtype=jnp.float32)
        with pytest.raises(ValueError, match="is a URL"):
            wan.parts(to)


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
    for index in ("{}", '{"leaves": [], "files": {}}', '{"leaves": {"a": 3}, "files": {}}', "[]"):
        (part / "leaves.json").write_text(index)
        refused(r"leaves\.json (is damaged|has to be)")
    (part / "leaves.json").unlink()
    refused(r"holds no \.safetensors file")
