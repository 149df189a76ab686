"""Writes da3.npz: a tiny random network of the publisher's code, its input and its outputs.

Run as `python -m tests.goldens.make_da3` where torch, depth_anything_3 0.1.1 (--no-deps), addict,
omegaconf, einops and e3nn (with opt_einsum_fx) are installed. The parity tests build their networks
here too.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np

from worldr1_jax.models.da3.backbone import BackboneConfig
from worldr1_jax.models.da3.gaussians import GaussianConfig
from worldr1_jax.models.da3.heads import HeadConfig
from worldr1_jax.models.da3.model import IGNORE, Config

PATH = Path(__file__).with_name("da3.npz")


def tiny_config(*, embed_dim=32, depth=8, ffn="swiglu", sh_degree=2, features=16, **net) -> Config:
    """A small network with everything that the giant one has: `net` overrides the backbone."""
    adapter = GaussianConfig(sh_degree=sh_degree)
    channels = (8, 8, 12, 16)
    fields = {
        "out_layers": (3, 5, 6, 7),
        "alt_start": 3,
        "qknorm_start": 3,
        "rope_start": 3,
        "img_size": 56,
    }
    return Config(
        model_name="da3-tiny",
        net=BackboneConfig(
            name="tiny", embed_dim=embed_dim, depth=depth, num_heads=2, ffn=ffn, **(fields | net)
        ),
        head=HeadConfig(features=features, out_channels=channels),
        gs_head=HeadConfig(
            output_dim=adapter.raw_dim + 1, features=features, out_channels=channels
        ),
        gs_adapter=adapter,
    )


def make_reference(config: Config, seed: int = 0):
    """The publisher's DepthAnything3Net of this shape, every parameter random."""
    import torch

    for name in ("evo", "evo.core", "evo.core.trajectory", "evo.core.geometry"):
        # Imported for pose alignment, which is not run.
        sys.modules.setdefault(name, mock.MagicMock())
    from depth_anything_3.model.cam_dec import CameraDec
    from depth_anything_3.model.da3 import DepthAnything3Net
    from depth_anything_3.model.dinov2.dinov2 import DinoV2
    from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer
    from depth_anything_3.model.dualdpt import DualDPT
    from depth_anything_3.model.gs_adapter import GaussianAdapter
    from depth_anything_3.model.gsdpt import GSDPT

    class SmallDinoV2(DinoV2):
        """DinoV2 of any size; the published class knows four."""

        def __init__(self, net: BackboneConfig):
            torch.nn.Module.__init__(self)
            self.out_layers = list(net.out_layers)
            names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
            names += ("alt_start", "qknorm_start", "rope_start", "cat_token")
            ffn = "swiglufused" if net.ffn == "swiglu" else "mlp"
            values = {name: getattr(net, name) for name in names}
            self.pretrained = DinoVisionTransformer(ffn_layer=ffn, **values)

    torch.manual_seed(seed)
    dim, patch = config.net.feature_dim, config.net.patch_size
    adapter = dataclasses.asdict(config.gs_adapter)
    adapter = {k: v for k, v in adapter.items() if k not in ("unit_rays", "slipped_quaternions")}
    heads = [
        kind(
            dim,
            patch_size=patch,
            output_dim=h.output_dim,
            features=h.features,
            out_channels=h.out_channels,
        )
        for kind, h in ((DualDPT, config.head), (GSDPT, config.gs_head))
    ]
    model = DepthAnything3Net(
        net=SmallDinoV2(config.net),
        head=heads[0],
        cam_dec=CameraDec(dim),
        cam_enc=torch.nn.Identity(),
        gs_head=heads[1],
        gs_adapter=GaussianAdapter(**adapter),
    ).eval()
    _randomise(model)
    return model


def _randomise(model) -> None:
    """Norm scales, LayerScale and biases too: at their usual 1 and 0 a wrong one would not show."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.normal_(0.7, 0.2)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.1)
            elif "token" in name or "pos_embed" in name:
                parameter.normal_(0.0, 0.5)
        for head in (model.head, model.gs_head):  # spread the outputs, so that an error shows
            head.scratch.output_conv2[2].weight.normal_(0.0, 1.0)
        model.cam_dec.fc_fov[0].bias.fill_(1.0)
        model.cam_dec.fc_qvec.bias[3] = 0.5


def publisher_tensors(model) -> dict[str, np.ndarray]:
    """The state dict under the names of the published files."""
    return {f"model.{key}": value.numpy() for key, value in model.state_dict().items()}


def run_reference(
    model, video: np.ndarray, strategy: str = "saddle_balanced"
) -> dict[str, np.ndarray]:
    """Outputs for videos [B F H W 3] in [0, 1]; camtoworld [B F 4 4] is in the network's axes."""
    import torch

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((torch.from_numpy(video) - mean) / std).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        feats, _ = model.backbone(images, ref_view_strategy=strategy)
        pose = model.cam_dec(feats[-1][1])
        out = model(images, infer_gs=True, ref_view_strategy=strategy)
    worldtocam = np.tile(np.eye(4, dtype=np.float32), (*out.extrinsics.shape[:2], 1, 1))
    worldtocam[:, :, :3] = out.extrinsics[:, :, :3].numpy()
    arrays = {f"tap{i}": feat[0] for i, feat in enumerate(feats)}
    arrays |= {f"camera{i}": feat[1] for i, feat in enumerate(feats)}
    arrays |= {
        "pose": pose,
        "depth": out.depth,
        "confidence": out.depth_conf,
        "intrinsics": out.intrinsics,
    }
    arrays |= {
        name: getattr(out.gaussians, name)
        for name in ("means", "scales", "rotations", "opacities", "harmonics")
    }
    return {k: v.numpy() for k, v in arrays.items()} | {"camtoworld": np.linalg.inv(worldtocam)}


def golden_config() -> Config:
    """The shape of the network in da3.npz."""
    starts = {"alt_start": 2, "qknorm_start": 2, "rope_start": 2}
    sizes = {"embed_dim": 16, "depth": 4, "features": 8, "patch_size": 7, "img_size": 28}
    return tiny_config(out_layers=(0, 1, 2, 3), **starts, **sizes)


def main() -> None:
    """Writes the file beside this one."""
    model = make_reference(golden_config())
    # Multiples of 1/256 compress well.
    video = np.random.default_rng(0).integers(0, 256, (1, 3, 14, 21, 3)).astype(np.float32) / 256
    outputs = run_reference(model, video)
    weights = publisher_tensors(model)
    weights = {k: v for k, v in weights.items() if not any(re.fullmatch(p, k) for p in IGNORE)}
    every = {"depth", "pose", "camtoworld", "intrinsics", "confidence"}
    kept = {
        k: outputs[k] if k in every else outputs[k][:, ::11]
        for k in (*every, "means", "scales", "rotations", "opacities", "harmonics")
    }
    np.savez_compressed(
        PATH,
        **{f"w/{k}": v for k, v in weights.items()},
        **{f"out/{k}": v for k, v in kept.items()},
        video=video,
    )


if __name__ == "__main__":
    main()
