"""Every launcher with `small`, the config that people train with, shrunk to tiny sizes, on random
folders in the publishers' formats: up to its first real output."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests.launching import fields, ran
from worldr1_jax.models import clip, lpips
from worldr1_jax.nano import tokenizer

pytestmark = pytest.mark.slow  # each launcher compiles a world of its own
PROMPT = "Camera push in. A red sphere."
DEVICES = 2  # that mesh.data=0, as small has it, is to find out about

TINY = {
    "frames": 5, "height": 32, "width": 32, "groups": 2, "group_size": 2, "num_updates": 1,
    "policy.text_tokens": 8, "policy.lora_rank": 2, "sample.steps": 3, "camera.flow_scale": 2,
    "algorithm.window": 1, "algorithm.window_range": "(0,2)", "train.minibatches": 1,
    "dynamic.dynamic_updates": 0, "evaluate.prompts": 0,
}  # fmt: skip


def rewards(folder: Path) -> dict[str, str]:
    return {
        "rewards.reconstruct.da3": f"{folder / 'da3'}",
        "rewards.recon.lpips": f"{folder / 'lpips'}",
        "rewards.recon.views": "2",
        "rewards.hps.weights": f"{folder / 'clip'}",
        "rewards.hps.frames": "2",
    }


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    """CLIP and LPIPS, beside Wan, UMT5 and Depth Anything 3, and a file of prompts."""
    folder = tmp_path_factory.mktemp("published")
    for part in weights.iterdir():
        (folder / part.name).symlink_to(part)
    words = tokenizer.build()
    config = clip.Config(
        clip.Tower(16, 32, 1, 2), clip.Tower(16, 32, 1, 2), 8, image_size=16, patch_size=8,
        vocab_size=len(words), max_position_embeddings=16, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    clip.save(clip.CLIP(config, nnx.Rngs(4)), folder / "clip")
    tokenizer.save(folder / "clip")
    network = lpips.LPIPS(nnx.Rngs(5))
    for head in network.heads:
        head[...] = jax.numpy.full_like(head[...], 0.1)
    lpips.save(network, folder / "lpips")
    (folder / "prompts.txt").write_text(f"{PROMPT}\nCamera pan left. A blue box.\n")
    return folder


@pytest.fixture(scope="module")
def flags(folder):
    """Fields that every launcher is given."""
    weights = {"policy.weights": folder, "prompts": folder / "prompts.txt"}
    return fields(TINY | weights | rewards(folder))


@pytest.fixture(scope="module")
def run(folder, flags, tmp_path_factory):
    """The workdir of a run of one update."""
    workdir = tmp_path_factory.mktemp("run")
    ran("tpu_train", *flags, f"--workdir={workdir}", variant="small", devices=DEVICES)
    return workdir


@pytest.fixture(scope="module")
def video(folder, run, flags, tmp_path_factory):
    """From standard input, with the adapters that a run exported, by UniPC, without camera."""
    lora, videos = tmp_path_factory.mktemp("lora"), tmp_path_factory.mktemp("videos")
    ran("export_lora", *flags, f"--adapters={run}", f"--workdir={lora}", variant="small")
    assert load_file(lora / "pytorch_lora_weights.safetensors")
    out = ran(
        "generate", *flags, "--prompts=-", f"--adapters={lora}", "--sampler=unipc",
        "--config.camera.mode=none", f"--workdir={videos}", variant="small", devices=DEVICES,
        stdin=f"{PROMPT}\n\na box\n",
    )  # fmt: skip
    first, second = map(Path, out.split())
    assert all(path.read_bytes()[4:8] == b"ftyp" for path in (first, second))
    return first


def test_train_learns_from_the_whole_reward(run):
    (line,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    # Of random weights, a video may show too little of a scene to be judged from beside.
    assert line["valid"] >= 2 and line["grad_norm"] > 0
    assert {"recon", "trajectory", "meta_view", "general", "hps"} <= set(line)
    assert all(np.isfinite(value) for value in line.values() if isinstance(value, float))


def test_generate_and_export_lora(video):
    assert video.name.startswith("camera-push-in-a-red-sphere")


def test_score(folder, video, flags, tmp_path):
    arguments = [f"--video={video}", f"--prompt={PROMPT}", "--pictures", f"--workdir={tmp_path}"]
    out = ran("score", *flags, *arguments, variant="small", devices=DEVICES)
    (scored,) = json.loads((tmp_path / "scores.json").read_text())["videos"]
    assert {"total", "recon", "trajectory", "meta_view", "hps"} <= set(scored["scores"])
    assert video.name in out and list(tmp_path.glob("*.png"))


def test_convert_weights_and_what_it_writes_trains_no_worse(folder, flags, tmp_path):
    """The converted folder is read by encode_prompts."""
    ran("convert_weights", *flags, f"--workdir={tmp_path / 'stored'}", variant="small")
    stored = [*flags, f"--config.policy.weights={tmp_path / 'stored'}", "--batch=2"]
    out = ran(
        "encode_prompts", *stored, f"--workdir={tmp_path / 'cache'}", variant="small",
        devices=DEVICES,
    )  # fmt: skip
    assert out.startswith("3 prompts: train with") and (tmp_path / "cache").is_dir()


def test_benchmark_times_and_counts_every_stage(flags):
    out = ran("benchmark", *flags, "--repeats=1", variant="small", devices=DEVICES)
    found = json.loads(out)
    assert (found["devices"], found["videos"]) == (DEVICES, 4)
    rewards = ["recon", "trajectory", "meta_view", "hps"]
    wanted = ["rollout", "decode", "reconstruct", *rewards, "update"]
    assert sorted(found["stages"]) == sorted(wanted)
    for row in found["stages"].values():
        assert row["seconds"] > 0
    for name in ("rollout", "decode", "reconstruct", "recon", "update"):
        assert found["stages"][name]["matmul_gflop"] > 0


def test_pretrain_nano(tmp_path):
    out = ran(
        "pretrain_nano", "--stage=clip", "--videos=2", "--scale=0.0001", f"--workdir={tmp_path}",
        variant="small",
    )  # fmt: skip
    assert out.startswith("stage clip") and list((tmp_path / "packed").rglob("*.safetensors"))


def test_plan_pod():
    pytest.importorskip("libtpu")
    out = ran(
        "plan_pod", "--topology=v5e:2x2", "--programs=restore", "--json", variant="small"
    )  # fmt: skip
    (row,) = json.loads(out)["programs"]
    assert row["name"] == "restore" and 0 < row["hbm_peak_bytes"] < row["hbm_limit_bytes"]
