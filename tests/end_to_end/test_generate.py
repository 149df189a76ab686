"""Prompts to mp4: the same bytes whatever else is asked for, every source of adapters, and what the
launchers refuse."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from worldr1_jax import settings
from worldr1_jax.algorithms import update as learning
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import umt5
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import lora_files
from worldr1_jax.nn import lora
from worldr1_jax.policies import adapters as trained
from worldr1_jax.policies import generate, wan
from worldr1_jax.workdir.checkpoint import Checkpointer, check_workdir

ROOT = Path(__file__).parents[2]
PROMPTS = ["Camera push in. A red sphere.", "Pan left. A tall blue box.", "A green box."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny weights whose head is not zero, as it would be fresh, so that text and adapters act."""
    folder = tiny.save_weights(tmp_path_factory.mktemp("weights"), with_da3=False)
    dit = wan_dit.load(folder / "transformer")
    head = dit.proj_out.kernel
    head[...] = 0.3 * jax.random.normal(jax.random.key(4), head.shape)
    wan_dit.save(dit, folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return tiny.config(folder, **{"sample.guidance": 2.0, "sample.steps": 3, "rewards.da3": ""})


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2}, jax.devices()[:2])


@pytest.fixture(scope="module")
def pipeline(config, mesh):
    return settings.build_pipeline(config, mesh, None)


def videos(pipeline, prompts, **options):
    made = generate.generate(pipeline, prompts, **{"batch": 2, "guidance": 2.0} | options)
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


def test_seed_and_negative_prompt_act(pipeline, made):
    name = next(iter(made))
    for options in ({"seed": 1}, {"negative_prompt": "a blue box"}):
        assert np.abs(videos(pipeline, PROMPTS[:1], **options)[name] - made[name]).max() > 1e-3


def test_names_and_prompt_files(tmp_path):
    prompt = "Camera  push in — a RED sphere!"
    assert generate.Generated(prompt, 2, np.zeros(0)).name.startswith("camera-push-in-a-red-sphere")
    names = {generate.Generated(p, 0, np.zeros(0)).name for p in ("a b", "A b", "…", "")}
    assert len(names) == 4
    (tmp_path / "prompts.txt").write_text("\ufeffone\n\n  two \n")
    assert generate.read_prompts(str(tmp_path / "prompts.txt")) == ["one", "two"]
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        generate.read_prompts(str(tmp_path / "prompts.txt"))
    with pytest.raises(ValueError, match="nowhere cannot be read"):
        generate.read_prompts("nowhere")


def test_a_batch_that_the_mesh_cannot_split_is_refused(pipeline):
    with pytest.raises(ValueError, match="multiple of the 2 devices"):
        next(generate.generate(pipeline, PROMPTS, batch=3))


# -- adapters, and where they come from


@pytest.fixture(scope="module")
def run(folder, config, mesh, tmp_path_factory):
    """The folder of a run with random adapters, and their average, which is another."""
    workdir = tmp_path_factory.mktemp("run")
    pipeline = settings.build_pipeline(config, mesh, jax.random.key(0))
    state = learning.init_state(
        pipeline.adapters, settings.make_optimizer(config), settings.make_algorithm(config)
    )
    rng = np.random.default_rng(0)

    def random(leaf):
        return jax.device_put(rng.normal(size=leaf.shape, scale=0.3).astype(np.float32))

    state = state.replace(
        adapters=jax.tree.map(random, state.adapters), ema=jax.tree.map(random, state.ema)
    )
    check_workdir(workdir, config.to_json())
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
    lora_files.save(found, tmp_path / "lora", "diffusers")
    jax.tree.map(np.testing.assert_array_equal, trained.load(tmp_path / "lora", config), want)


def test_a_pipeline_takes_given_adapters(run, config, mesh):
    adapters = settings.load_adapters(config, str(run[0]))
    pipeline = settings.build_pipeline(config, mesh, None, adapters)
    found = lora.from_state(pipeline.adapters, 32.0)
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    assert settings.load_adapters(config, "") is None


def test_a_damaged_run_and_a_wrong_kind_are_named(run, folder, tmp_path):
    config = wan_dit.read_config(folder / "transformer")
    with pytest.raises(ValueError, match="the kind of adapters is 'best'"):
        trained.load(run[0], config, "best")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json of a run"):
        trained.load(tmp_path, config)
    (tmp_path / "config.json").write_text('{"policy": {"lora_alpha": 1}}')
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        trained.load(tmp_path, config)


# -- launchers


def launch(script, *arguments, stdin=""):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, f"launch/{script}.py", "--config=configs/world.py", *arguments],
        cwd=ROOT, env=env, input=stdin, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_launchers_export_and_generate(folder, run, tmp_path):
    """From standard input, with the exported adapters of a run, by UniPC, without camera."""
    options = [f"--config.policy.weights={folder}", "--config.frames=5", "--config.height=32",
               "--config.width=32", "--config.sample.steps=2"]  # fmt: skip
    exported = tmp_path / "lora"
    done = launch("export_lora", options[0], f"--adapters={run[0]}", f"--workdir={exported}")
    assert done.returncode == 0, done.stderr[-2000:]
    done = launch(
        "generate", *options, "--prompts=-", f"--adapters={exported}", "--sampler=unipc",
        "--config.sample.camera=none", f"--workdir={tmp_path / 'videos'}", stdin="a\n\nb\n",
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
    folder, config, mesh, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    options = [f"--config.policy.weights={folder}", f"--config.prompts={tmp_path / 'prompts.txt'}",
               "--config.evaluate.prompts=0"]  # fmt: skip
    done = launch("encode_prompts", *options, "--batch=2", f"--workdir={cache}")
    assert done.returncode == 0, done.stderr[-2000:]
    want = settings.build_pipeline(config, mesh, None).encode(PROMPTS[:2])
    changes = {"policy.text_cache": str(cache), "prompts": str(tmp_path / "prompts.txt")}
    cached = tiny.config(folder, **changes | {"evaluate.prompts": 0})
    with monkeypatch.context() as patch:
        patch.setattr(umt5, "load", None)
        pipeline = settings.build_pipeline(cached, mesh, None)
        got = pipeline.encode(PROMPTS[:2])
    assert got.dtype == want.dtype and got.sharding.is_equivalent_to(want.sharding, got.ndim)
    np.testing.assert_array_equal(got, want)
    assert settings.open_text_cache(cached) is not None
    cached.policy.text_tokens = 16
    with pytest.raises(ValueError, match="is stale"):
        settings.check(cached, mesh)
    cached.policy.text_tokens = config.policy.text_tokens
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="lacks 1 of the prompts, such as 'a cat'"):
        settings.check(cached, mesh)
    encoder = umt5.load(folder / "text_encoder")
    encoder.norm_out.scale[...] = encoder.norm_out.scale[...] + 1
    other = tmp_path / "other"
    for part in wan.LAYOUTS["diffusers"]:
        if part != "text_encoder":
            (other / part).parent.mkdir(exist_ok=True)
            (other / part).symlink_to(folder / part)
    umt5.save(encoder, other / "text_encoder")
    cached.policy.weights = str(other)
    with pytest.raises(ValueError, match="is stale: its text encoder"):
        settings.open_text_cache(cached)


def test_a_pipeline_without_encoder_needs_a_cache(folder, mesh):
    from worldr1_jax.camera.injection import Camera
    from worldr1_jax.policies.stages import Pipeline

    model = wan.load(folder, mesh=mesh, tokens=8, text=False)
    assert model.text_encoder is None and isinstance(model.dit, nnx.Module)
    with pytest.raises(ValueError, match="give a text_cache"):
        Pipeline(model, mesh, size=(5, 32, 32), sigmas=jnp.array([1.0, 0.0]), camera=Camera())
