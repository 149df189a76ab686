"""Depth Anything 3 small and base, ours against depth_anything_3 in torch, float32, in one run.

python -m tests.parity.side_by_side_da3 --frames=4 --rounds=5

Both have the same random weights and get all cores, and what our launchers set (--plain leaves it
out); figures as in side_by_side.py. "same work" is backbone, depth and cameras on both sides.
"package" is the package's own forward, which also computes rays that no reward reads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from safetensors.numpy import save_file

from tests.goldens import make_da3
from tests.launching import launcher
from tests.parity.side_by_side import versus
from worldr1_jax.models.da3 import model as da3


def main() -> None:
    """Prints JSON objects, one a comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["da3-small", "da3-base"])
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--height", type=int, default=294)
    parser.add_argument("--width", type=int, default=504)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="the defaults of glibc and XLA")
    args = parser.parse_args()
    if not args.plain:
        launcher("cli").keep_memory()
        launcher("cli").spread_convolutions()
    for name in args.models:
        compare(name, (args.frames, args.height, args.width), args.rounds)


def compare(name: str, size: tuple[int, int, int], rounds: int) -> None:
    """One model on one video of `size` (frames, height, width)."""
    published = build(name)
    with tempfile.TemporaryDirectory() as folder:
        tensors = make_da3.publisher_tensors(published)
        save_file({k: v.copy() for k, v in tensors.items()}, Path(folder) / da3.FILENAME)
        (Path(folder) / "config.json").write_text(json.dumps({"model_name": name}))
        graph, state = nnx.split(da3.load(folder, attention="auto"))
    video = np.random.default_rng(0).random((1, *size, 3), np.float32)
    mean, std = np.float32(da3.IMAGENET_MEAN), np.float32(da3.IMAGENET_STD)
    normalised = (video - mean) / std
    images = torch.from_numpy(normalised).permute(0, 1, 4, 2, 3).contiguous()

    @jax.jit
    def backbone(state, images):
        model = nnx.merge(graph, state)
        return model.backbone(images, implementation="auto")

    @jax.jit
    def forward(state, video):
        raw = nnx.merge(graph, state).forward(video)
        return raw.depth, raw.confidence, raw.translation, raw.quaternion, raw.fov

    depth_alone = same_work(published)

    def torch_backbone():
        with torch.no_grad():
            return published.backbone(images)[0][-1][0]

    def torch_same():
        with torch.no_grad():
            feats, _ = published.backbone(images)
            pose = published.cam_dec(feats[-1][1])
            return depth_alone(feats, *size[1:], patch_start_idx=0)["depth"], pose

    def torch_package():
        with torch.no_grad():
            return published(images)["depth"]

    theirs = torch_package().numpy()
    error = np.abs(np.asarray(forward(state, video)[0]) - theirs).max() / theirs.std()
    print(json.dumps({f"{name} depth, relative error": float(f"{error:.2e}")}), flush=True)
    versus(f"{name} backbone", lambda: backbone(state, jnp.asarray(normalised)), torch_backbone,
           rounds)  # fmt: skip
    versus(f"{name} same work", lambda: forward(state, video), torch_same, rounds)
    versus(f"{name} package", lambda: forward(state, video), torch_package, rounds)


def build(name: str) -> torch.nn.Module:
    """The package's network, its parameters random and of a size that spreads the depths."""
    make_da3.make_reference(make_da3.golden_config())
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    torch.manual_seed(0)
    model = create_object(load_config(MODEL_REGISTRY[name])).eval()
    with torch.no_grad():
        model.head.scratch.output_conv2[2].weight.normal_(0.0, 0.3)
    return model


def same_work(published: torch.nn.Module) -> torch.nn.Module:
    """The package's own DPT of the depth branch's shape, which has no rays beside it."""
    from depth_anything_3.model.dpt import DPT

    head = published.head
    channels = [layer.out_channels for layer in head.projects]
    return DPT(
        head.projects[0].in_channels, output_dim=2, pos_embed=True, norm_type="layer",
        features=head.scratch.output_conv1.in_channels, out_channels=channels, use_sky_head=False,
    ).eval()  # fmt: skip


if __name__ == "__main__":
    main()
