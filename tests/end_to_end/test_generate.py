"""Prompts to mp4: the same bytes whatever else is asked for, every source of adapters, and what the
launchers refuse."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import launching, tiny
from worldr1_jax import preflight, settings
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import umt5
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import lora_files
from worldr1_jax.nn import lora
from worldr1_jax.policies import adapters as trained
from worldr1_jax.policies import generate, wan, wan_folder
from worldr1_jax.policies.base import POLICY, VAE
from worldr1_jax.policies.stages import Pipeline
from worldr1_jax.workdir.checkpoint import Checkpointer, check_workdir

CHANGES = {
    "sample.guidance": 2.0, "sample.steps": 3, "algorithm.window_range": (0, 2),
    "algorithm.window": 1,
}  # fmt: skip
PROMPTS = ["Camera push in. A red sphere.", "Pan left. A tall blue box.", "A green box."]


@pytest.fixture(scope="module")
def folder(weights):
    return weights


@pytest.fixture(scope="module")
def config(folder):
    return tiny.config(folder, **CHANGES)


@pytest.fixture(scope="module")
def found(config):
    return settings.read(config)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2}, jax.devices()[:2])


@pytest.fixture(scope="module")
def pipeline(found, mesh):
    return settings.build_pipeline(found, mesh, None)


def test_another_solver_or_another_number_of_the_adapters_makes_another_file():
    def adapters(value):
        return {"x": lora.Adapter(np.full((2, 4, 1), value), np.ones((2, 1, 4)), 0.5)}

    tags = [
        generate.tag(("config", "unipc", order), found)
        for order in (1, 2)
        for found in (None, adapters(1.0), adapters(2.0))
    ]
    assert len(set(tags)) == 6
    assert tags[1] == generate.tag(("config", "unipc", 1), adapters(1.0))


def videos(pipeline, prompts, **options):
    made = generate.generate(pipeline, prompts, **{"batch": 2} | options)
    return {v.name: v.video for v in made}


@pytest.fixture(scope="module")
def made(pipeline):
    return videos(pipeline, PROMPTS)


def test_neighbours_and_places_in_the_batch_change_no_bit(pipeline, made):
    assert len(made) == 3 and all(v.shape == (5, 32, 32, 3) for v in made.values())
    again = videos(pipeline, [PROMPTS[2], "Something else.", PROMPTS[1], PROMPTS[0]])
    alone = videos(pipeline, PROMPTS[:1], samples=2)
    for name, video in made.items():
        np.testing.assert_array_equal(again[name], video)
    first = next(iter(made))
    np.testing.assert_array_equal(alone[first], made[first])
    assert np.abs(alone[first[:-1] + "1"] - made[first]).max() > 0.05  # its second video


def test_the_seed_acts(pipeline, made):
    name = next(iter(made))
    assert np.abs(videos(pipeline, PROMPTS[:1], seed=1)[name] - made[name]).max() > 1e-3


def test_the_negative_prompt_acts(pipeline, made, monkeypatch):
    name = next(iter(made))
    other = dataclasses.replace(pipeline.sampling, negative_prompt="a blue box")
    monkeypatch.setattr(pipeline, "sampling", other)
    assert np.abs(videos(pipeline, PROMPTS[:1])[name] - made[name]).max() > 1e-3


def test_names_and_prompt_files(tmp_path):
    prompt = "Camera  push in — a RED sphere!"
    assert generate.Generated(prompt, 2, np.zeros(0)).name.startswith("camera-push-in-a-red-sphere")
    names = {generate.Generated(p, 0, np.zeros(0)).name for p in ("a b", "A b", "…", "")}
    assert len(names) == 4
    (tmp_path / "prompts.txt").write_text("\ufeffone\n\n  two \n")
    assert generate.read_prompts(str(tmp_path / "prompts.txt")) == ["one", "two"]
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8 on line 1"):
        generate.read_prompts(str(tmp_path / "prompts.txt"))
    with pytest.raises(ValueError, match="nowhere does not exist"):
        generate.read_prompts("nowhere")


def test_a_batch_that_the_mesh_cannot_split_is_refused(pipeline):
    with pytest.raises(ValueError, match="multiple of the 2 devices"):
        next(generate.generate(pipeline, PROMPTS, batch=3))


# -- adapters, and where they come from


@pytest.fixture(scope="module")
def run(folder, config, found, mesh, tmp_path_factory):
    """The folder of a run with random adapters, and their average, which is another."""
    workdir = tmp_path_factory.mktemp("run")
    pipeline = settings.build_pipeline(found, mesh, jax.random.key(0))
    state = settings.make_state(found, pipeline)
    rng = np.random.default_rng(0)

    def random(leaf):
        return jax.device_put(rng.normal(size=leaf.shape, scale=0.3).astype(np.float32))

    state = state.replace(
        adapters=jax.tree.map(random, state.adapters), ema=jax.tree.map(random, state.ema)
    )
    check_workdir(workdir, json.loads(config.to_json()))
    with Checkpointer(workdir) as checkpoints:
        checkpoints.save(1, state, {}, {})
    return workdir, state


@pytest.mark.parametrize("kind", trained.KINDS)
def test_a_run_an_export_and_a_merge_give_one_network(run, folder, mesh, kind, tmp_path):
    workdir, state = run
    config = wan_dit.read_config(folder / "transformer")
    found = trained.load(workdir, config, kind)
    want = lora.from_state(state.ema if kind == "ema" else state.adapters, 32.0)
    assert found["blocks.attn1.to_q"].scale == 2.0  # alpha 32 over rank 16
    jax.tree.map(np.testing.assert_array_equal, found, want)
    for form in ("peft", "diffusers"):
        lora_files.save(found, tmp_path / form, form)
    jax.tree.map(np.testing.assert_array_equal, trained.load(tmp_path / "peft", config), want)
    scaled = {path: lora.Adapter(x.a, 2 * x.b, 1.0) for path, x in want.items()}
    jax.tree.map(
        np.testing.assert_array_equal, trained.load(tmp_path / "diffusers", config), scaled
    )


def test_a_pipeline_takes_given_adapters(run, found, mesh):
    adapters = settings.load_adapters(found, [str(run[0])])
    pipeline = settings.build_pipeline(found, mesh, None, adapters)
    held = lora.from_state(pipeline.adapters, 32.0)
    jax.tree.map(np.testing.assert_array_equal, held, adapters)
    assert settings.load_adapters(found, []) is None


def test_training_starts_from_a_run_on_any_mesh(run, found):
    start = dataclasses.replace(
        found, policy=dataclasses.replace(found.policy, adapters=str(run[0]))
    )
    two = make_mesh({"fsdp": 2}, jax.devices()[:2])
    pipeline = settings.build_pipeline(start, two, jax.random.key(0))
    wanted = settings.load_adapters(found, [str(run[0])])
    held = lora.from_state(jax.device_get(pipeline.adapters), found.policy.lora_alpha)
    for name, one in wanted.items():
        rank = one.a.shape[-1]
        np.testing.assert_array_equal(held[name].a[..., :rank], one.a)


def test_a_damaged_run_and_a_wrong_kind_are_named(run, folder, tmp_path):
    config = wan_dit.read_config(folder / "transformer")
    with pytest.raises(ValueError, match="the kind of adapters is 'best'"):
        trained.load(run[0], config, "best")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        trained.load(tmp_path, config)
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"has no config\.json of a run"):
        trained.load(tmp_path, config)


# -- launchers


def launch(script, *arguments, stdin=""):
    return launching.launch(script, *arguments, variant="nano,grpo", stdin=stdin)


@pytest.mark.slow
def test_launchers_export_and_generate(folder, run, tmp_path):
    """From standard input, with the exported adapters of a run, by UniPC, without camera."""
    options = [f"--config.policy.weights={folder}", "--config.frames=5", "--config.height=32",
               "--config.width=32", "--config.sample.steps=3",
               "--config.algorithm.window_range=(0,2)", "--config.algorithm.window=1"]  # fmt: skip
    exported = tmp_path / "lora"
    done = launch("export_lora", options[0], f"--adapters={run[0]}", f"--workdir={exported}")
    assert done.returncode == 0, done.stderr[-2000:]
    done = launch(
        "generate", *options, "--prompts=-", f"--adapters={exported}", "--sampler=unipc",
        "--config.camera.mode=none", f"--workdir={tmp_path / 'videos'}", stdin="a\n\nb\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    paths = done.stdout.split()
    assert len(paths) == 2 and all(Path(p).read_bytes()[4:8] == b"ftyp" for p in paths)
    assert "video 2/2" in done.stderr


def test_a_launcher_refuses_in_one_sentence(folder):
    done = launch("generate", f"--config.policy.weights={folder}")
    assert done.returncode == 1 and "there is no prompt" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


# -- prompts encoded beforehand


def test_a_run_on_encoded_prompts_never_reads_the_encoder(
    folder, pipeline, mesh, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    options = [f"--config.policy.weights={folder}", f"--config.prompts={tmp_path / 'prompts.txt'}",
               "--config.evaluate.prompts=0"]  # fmt: skip
    done = launch("encode_prompts", *options, "--batch=2", f"--workdir={cache}")
    assert done.returncode == 0, done.stderr[-2000:]
    want = pipeline.encode(PROMPTS[:2])
    changes = CHANGES | {"policy.text_cache": str(cache), "prompts": str(tmp_path / "prompts.txt")}

    def cached(**more):
        return settings.read(tiny.config(folder, **changes | {"evaluate.prompts": 0} | more))

    def check(found):
        preflight.check(found, mesh, settings.load_prompts(found))

    with monkeypatch.context() as patch:
        patch.setattr(umt5, "load", None)
        got = settings.build_pipeline(cached(), mesh, None).encode(PROMPTS[:2])
    assert got.dtype == want.dtype and got.sharding.is_equivalent_to(want.sharding, got.ndim)
    np.testing.assert_allclose(got, want, atol=1e-5)  # encoded in a batch of another size
    assert settings.open_text_cache(cached()) is not None
    with pytest.raises(ValueError, match="is stale"):
        check(cached(**{"policy.text_tokens": 16}))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="lacks 1 of the prompts, such as 'a cat'"):
        check(cached())
    encoder = umt5.load(folder / "text_encoder")
    encoder.norm_out.scale[...] = encoder.norm_out.scale[...] + 1
    other = tmp_path / "other"
    for part in wan_folder.LAYOUTS["diffusers"]:
        if part != "text_encoder":
            (other / part).parent.mkdir(exist_ok=True)
            (other / part).symlink_to(folder / part)
    umt5.save(encoder, other / "text_encoder")
    with pytest.raises(ValueError, match="is stale: its text encoder"):
        settings.open_text_cache(cached(**{"policy.weights": str(other)}))


def test_a_pipeline_without_encoder_needs_a_cache(folder, found, mesh):
    model = wan.load(folder, mesh=mesh, tokens=8, text=False)
    assert model.networks.keys() == {POLICY, VAE}
    with pytest.raises(ValueError, match="give a text_cache"):
        Pipeline(model, mesh, size=(5, 32, 32), sampling=found.sample, camera=found.camera)
