"""A whole pipeline against diffusers' WanPipeline, and the files of Wan-Video's own release as
torch writes them, on tiny random weights in float32."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens import make_umt5, make_wan_dit, make_wan_vae
from worldr1_jax.camera.injection import Camera
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import umt5
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.nano import tokenizer
from worldr1_jax.policies import wan
from worldr1_jax.policies.stages import Pipeline, Sampling
from worldr1_jax.rollout import unipc
from worldr1_jax.rollout.sample import Sampler, sample_keys

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}
VAE = {"base_dim": 6, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
TEXT = {
    "vocab_size": len(tokenizer.vocabulary()),
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
}
PROMPTS = ["A red sphere beside a tall blue box.", " A  green &amp;amp; box."]
NEGATIVE = "blue box"
STEPS, SHIFT, GUIDANCE, TOKENS = 10, 3.0, 4.0, 24


@pytest.fixture(scope="module")
def theirs():
    transformer = make_wan_dit.make_reference(DIT, 0)
    with torch.no_grad():
        transformer.proj_out.weight.mul_(4)  # so that prompts and steps move the result
    return {
        "transformer": transformer,
        "vae": make_wan_vae.make_reference(VAE, 1),
        "text_encoder": make_umt5.make_reference(TEXT, 2),
    }


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """The pipeline as diffusers saves it."""
    pipeline = diffusers.WanPipeline(
        **theirs,
        tokenizer=tokenizer.build(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
    )
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


def test_videos_match_diffusers_pipeline(folder):
    """Tokenizer, text encoder, guidance, UniPC, decoder: the same prompts and noise. The signal is
    the expected video's own deviation, not its range, which would flatter flat videos."""
    noise = np.random.default_rng(0).standard_normal((2, 2, 4, 6, 16)).astype(np.float32)
    reference = diffusers.WanPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        PROMPTS, negative_prompt=NEGATIVE, height=32, width=48, num_frames=5,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, max_sequence_length=TOKENS,
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()), output_type="np",
    ).frames  # fmt: skip

    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    pipeline = Pipeline(
        wan.load(folder, mesh=mesh, tokens=TOKENS), mesh, size=(5, 32, 48),
        sampling=Sampling(STEPS, SHIFT), camera=Camera("none"),
    )  # fmt: skip

    def videos(prompts):
        latents = pipeline.rollout(
            pipeline.adapters, pipeline.encode(prompts), pipeline.paths(prompts),
            sample_keys(jax.random.key(0), 2), sampler=Sampler("none", guidance=GUIDANCE),
            text_null=pipeline.encode_one(NEGATIVE), solver=unipc.make(STEPS, SHIFT), noise=noise,
        ).latents  # fmt: skip
        return np.asarray(pipeline.decode(latents))

    def decibels(signal, got):
        return float(10 * np.log10(signal**2 / np.mean((got - expected) ** 2)))

    got, other = videos(PROMPTS), videos(PROMPTS[::-1])
    psnr, of_deviation = decibels(1.0, got), decibels(expected.std(), got)
    print(f"PSNR {psnr:.1f} dB; over the deviation {of_deviation:.1f} dB")
    print(f"with the prompts exchanged {decibels(expected.std(), other):.1f} dB")
    assert expected.std() > 0.05 and decibels(expected.std(), other) < 40
    assert psnr >= 50 and of_deviation >= 50


def test_diffusers_reads_what_is_converted(folder, tmp_path):
    """WanPipeline.from_pretrained of our folder, with and without a scheduler to copy, gives the
    latents of the pipeline that it came from: the same float32 weights, so the same bits."""
    shutil.copytree(folder, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    mesh = make_mesh({}, jax.devices()[:1])
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 16, 2, 4, 6))).float()

    def latents(path):
        pipeline = diffusers.WanPipeline.from_pretrained(path)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            PROMPTS, negative_prompt=NEGATIVE, height=32, width=48, num_frames=5,
            num_inference_steps=2, guidance_scale=GUIDANCE, max_sequence_length=TOKENS,
            latents=noise.clone(), output_type="latent",
        ).frames  # fmt: skip

    want = latents(folder)
    for source in (folder, tmp_path / "bare"):
        to = tmp_path / f"new_{source.name}"
        wan.store(source, to, mesh=mesh, dtype=jnp.float32, form="diffusers", shift=SHIFT)
        written = json.loads((to / "model_index.json").read_text())
        for part in ("transformer", "vae", "text_encoder", "scheduler"):
            assert written[part] == index[part]
        assert torch.equal(latents(to), want)
        assert wan.read(to) == wan.read(folder)


def rename(state, rows, original, layers):
    """A state dict of diffusers or transformers under the original's names, by our two tables."""
    names = {
        ours[0].format(i=i): theirs[0].format(i=i)
        for ours, theirs in zip(rows, original, strict=True)
        for i in range(layers)
    }
    return {name: state[key] for key, name in names.items()}


@pytest.fixture(scope="module")
def original(theirs, tmp_path_factory):
    """The same networks in the files of Wan-Video's own release, by torch.save."""
    folder = tmp_path_factory.mktemp("original")
    vae = wan_vae.Config.from_dict(VAE)
    state = rename(
        theirs["vae"].state_dict(), wan_vae.table(vae), wan_vae.table(vae, "wan"), 1
    )  # fmt: skip
    torch.save(state, folder / "Wan2.1_VAE.pth")
    text = rename(
        theirs["text_encoder"].state_dict(), umt5.table(), umt5.table("wan"), TEXT["num_layers"]
    )
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    dit = wan_dit.Config(**DIT)
    state = rename(
        theirs["transformer"].state_dict(), wan_dit.table(dit), wan_dit.table(dit, "wan"), 2
    )
    from safetensors.torch import save_file

    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    fields = {
        "dim": dit.dim, "eps": dit.eps, "ffn_dim": dit.ffn_dim, "freq_dim": dit.freq_dim,
        "in_dim": 16, "model_type": "t2v", "num_heads": 2, "num_layers": 2, "out_dim": 16,
        "text_dim": 32, "text_len": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    tokenizer.save(folder / "google/umt5-xxl")
    return folder


def test_the_original_vae_has_the_names_that_diffusers_converts(theirs, original):
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    state = torch.load(original / "Wan2.1_VAE.pth", weights_only=True)
    back = convert_wan_vae_to_diffusers(dict(state))
    want = theirs["vae"].state_dict()
    assert back.keys() == want.keys()
    for key, value in back.items():
        assert torch.equal(value, want[key]), key


def test_both_layouts_give_one_model(folder, original, monkeypatch):
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    want = wan.load(folder, mesh=mesh, tokens=TOKENS)
    monkeypatch.setattr(wan_vae.Config, "wan2_1", lambda: want.networks["vae"].config)
    monkeypatch.setattr(umt5.Config, "xxl", lambda: want.networks["text"].config)
    got = wan.load(original, mesh=mesh, tokens=TOKENS)
    assert got.networks.keys() == want.networks.keys()
    for name in want.networks:
        ours, theirs = (_leaves(model.networks[name]) for model in (got, want))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _leaves(network):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(network, nnx.Param))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_saves_what_we_read(tmp_path, dtype):
    """Parameters of a module, a transposed view, a tensor that shares its storage with another."""
    from worldr1_jax.weights.safetensors import open_tensors

    whole = torch.arange(12.0).reshape(3, 4)
    module = torch.nn.Linear(3, 2)
    state = {"whole": whole, "turned": whole.T, "row": whole[1], **module.state_dict()}
    state = {key: value.to(dtype) if key == "row" else value for key, value in state.items()}
    torch.save(state, tmp_path / "a.pth")
    torch.save(module.state_dict(), tmp_path / "b.pth")  # an OrderedDict with attributes
    for name, tensors in (("a.pth", state), ("b.pth", module.state_dict())):
        found = open_tensors(tmp_path / name)
        assert found.keys() == tensors.keys()
        for key, value in tensors.items():
            got = found[key].read(tuple(slice(0, n) for n in value.shape))
            np.testing.assert_array_equal(got.astype(np.float32), value.float().numpy())
