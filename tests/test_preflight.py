"""What is refused before anything is loaded, and what a run that goes on has to find as it was."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from configs import world
from tests import tiny
from worldr1_jax import preflight, settings
from worldr1_jax.data.prompts import PromptSets
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.nn import lora
from worldr1_jax.weights import shipped

MESH_OF_8 = {"data": 2, "fsdp": 4}
PROMPTS = PromptSets(("a",), ("b",), ("c", "d"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3, "group_size": 4}, "groups x group_size is 12 videos, which the mesh's"),
        ({"sample.videos_at_once": 3}, "sample.videos_at_once is 3: it has to divide the 4 videos"),
        ({"frames": 18}, r"frames is 18: it has to be 1 \+ 4 k"),
        ({"policy.weights": "nowhere"}, "'nowhere'"),
        ({"rewards.reconstruct.da3": "nowhere"}, "'nowhere'"),
        ({"policy.text_cache": "nowhere"}, "nowhere"),
        ({"policy.adapters": "nowhere"}, "nowhere"),
    ],
)
def test_what_does_not_fit_the_mesh_or_the_files_is_refused(changes, message):
    config = world.get_config("nano,grpo")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        preflight.check(settings.read(config), make_mesh(MESH_OF_8, jax.devices()), PROMPTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards.reconstruct.frame_stride": 17}, "of 17 frames the 3D network sees 1, and"),
        ({"rewards.reconstruct.gaussian_frames": 1}, "gaussian_frames is 1: S_meta compares"),
        ({"frames": 1}, "of 1 frames the 3D network sees 1|needs? at least"),
    ],
)
def test_frames_that_rewards_could_not_use_are_refused_before_the_first_rollout(changes, words):
    config = world.get_config("nano")
    config.update_from_flattened_dict(changes)
    found = settings.read(config)
    with pytest.raises(ValueError, match=words):
        preflight.check(found, settings.make_mesh(found), settings.load_prompts(found))


def test_an_optimizer_step_that_devices_cannot_share_is_refused():
    """Each would evaluate the whole of it. Where the mesh is chosen, it is one that can."""
    config = world.get_config("nano,grpo")  # 32 videos
    for changes, parts in (
        ({"train.minibatches": 8}, 8),
        ({"train.minibatches": 2, "train.microbatches": 4}, 8),
    ):
        tried = config.copy_and_resolve_references()
        tried.update_from_flattened_dict(changes)
        found, mesh = settings.read(tried), make_mesh(MESH_OF_8, jax.devices())
        with pytest.raises(ValueError, match=f"train.minibatches x train.microbatches is {parts}:"):
            preflight.check(found, mesh, PROMPTS)
    config.update_from_flattened_dict({"mesh.data": 0, "train.minibatches": 8})
    found = settings.read(config)
    mesh = settings.make_mesh(found, jax.devices())
    preflight.check(found, mesh, PROMPTS)
    assert dict(mesh.shape)["data"] == 4


@pytest.mark.parametrize(
    ("path", "rank", "message"),
    [
        ("blocks.attn2.to_q", 8, ""),
        ("blocks.attn2.to_q", 17, "rank 17 on 'blocks.attn2.to_q': policy.lora_rank is 16"),
        ("blocks.attn1.to_q", 8, "'blocks.attn1.to_q', which is not trained: set policy.lora_lay"),
    ],
)
def test_adapters_that_training_cannot_start_from_are_refused(path, rank, message, monkeypatch):
    """Before the denoiser, which may be 14B, is read."""
    given = {path: lora.Adapter(np.zeros((4, 96, rank)), np.zeros((4, rank, 96)), 1.0)}
    monkeypatch.setattr(settings, "load_adapters", lambda found, paths: given)
    config = world.get_config("nano")
    config.policy.adapters = "some"
    assert message in complaint(config) and bool(message) == bool(complaint(config))


def complaint(config) -> str:
    found = settings.read(config)
    try:
        preflight.check(found, settings.make_mesh(found), PROMPTS)
    except ValueError as error:
        return str(error)
    return ""


def test_float16_is_not_trained_in():
    config = world.get_config("nano")
    config.policy.dtype = "float16"
    assert complaint(config).startswith("policy.dtype is 'float16', whose smallest number")


def test_scenes_that_are_learnt_from_and_held_out():
    """With another camera clause a prompt is another text, and its rivals are the held-out ones."""
    train = ("Camera push in. A red sphere.", "Camera pan left. A box.")
    test = ("Camera pan left. A red sphere.", "Camera pan left. A cylinder.")
    found = settings.read(world.get_config("nano"))
    assert preflight.shared_scenes(found, PromptSets(train, (), test)) == ["A red sphere."]
    assert preflight.shared_scenes(found, PromptSets((), train, test)) == ["A red sphere."]
    never = dataclasses.replace(
        found, dynamic=dataclasses.replace(found.dynamic, dynamic_updates=0)
    )
    assert not preflight.shared_scenes(never, PromptSets((), train, test))


def test_what_paths_hold_counts_and_not_where_they_lead(tmp_path, weights):
    """Another copy is the same; the same path with other weights is not."""
    copied = shutil.copytree(weights, tmp_path / "copy")
    prompts = PromptSets(("a",), ("b",), ("c",))

    def contents(folder, prompts=prompts):
        return preflight.contents(settings.read(tiny.config(folder)), prompts)

    here = contents(weights)
    # What ships is a file like others: an upgrade may have another.
    shipped = "rewards.hps.weights"
    assert {"prompts", "policy.weights", "rewards.reconstruct.da3", shipped} == set(here)
    assert contents(copied) == here != contents(weights, PromptSets(("a",), ("x",)))
    assert contents(weights, PromptSets(("a",), ("b",))) == here  # none are learnt from
    (copied / "README.md").write_text("no weights")
    assert contents(copied) == here
    with (copied / "da3" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert contents(copied)["rewards.reconstruct.da3"] != here["rewards.reconstruct.da3"]


def test_the_strength_of_the_adapters_that_training_starts_from_counts(tmp_path, weights):
    """Another strength is another start."""
    (tmp_path / "a").write_bytes(b"lora")

    def held(spec):
        found = settings.read(tiny.config(weights, **{"policy.adapters": str(tmp_path / spec)}))
        return preflight.contents(found, PromptSets(("a",), ()))["policy.adapters"]

    assert held("a") == held("a:1") != held("a:0.8")
    assert held("a:0.8") == held("a:0.80") != held("a:0.5")


def test_shipped_networks_count_one_by_one(tmp_path):
    """Each for the field that reads it: another judge is nothing to a run that has none."""

    def contents(**fields):
        config = world.get_config("nano")
        config.update_from_flattened_dict(fields)
        return preflight.contents(settings.read(config), PromptSets(("a",), ()))

    here = contents()
    assert len(set(here.values())) == len(here)
    copied = shutil.copytree(shipped.WEIGHTS / "da3", tmp_path / "da3")
    assert contents(**{"rewards.reconstruct.da3": str(copied)}) == here
