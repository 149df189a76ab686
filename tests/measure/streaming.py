"""Peak memory of loading a checkpoint of the 1.3B's shapes onto 8 emulated devices.

    python -m tests.measure.streaming  # all 30 layers: 5.7 GB of float32 on disk, sparse
    python -m tests.measure.streaming --layers=3

On the CPU the devices' memory is this process's, so that the growth of its high-water mark while
loading is what the devices hold and whatever the loader needs beside it, mapped pages of the file
included. Prints one JSON object; `ratio` is the growth over what the devices hold.
"""

import argparse
import dataclasses
import json
import os
import struct
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from flax import nnx

from worldr1_jax.mesh import placement
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models.wan import dit as wan_dit


def main() -> None:
    """Writes the file, loads it, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--file-dtype", default="F32", choices=("F32", "BF16"))
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    config = dataclasses.replace(wan_dit.Config.wan_1_3b(), num_layers=args.layers)
    mesh = make_mesh({"fsdp": 8})
    with tempfile.TemporaryDirectory() as folder:
        on_disk = write(Path(folder), config, args.file_dtype)
        # What is measured is the second load: the first, of a tiny one, takes the libraries in.
        with tempfile.TemporaryDirectory() as small:
            write(Path(small), wan_dit.Config.nano(), "F32")
            wan_dit.load(small, dtype=jnp.dtype(args.dtype), mesh=mesh)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before, began = resident("VmRSS"), time.perf_counter()
        model = wan_dit.load(folder, dtype=jnp.dtype(args.dtype), mesh=mesh)
        seconds = time.perf_counter() - began
        grown = resident("VmHWM") - before
    shards = [
        shard.data
        for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))
        for shard in leaf.addressable_shards
    ]
    # Emulated devices share the buffer of a replicated leaf: each buffer counts once.
    held = sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())
    figures = {
        "layers": args.layers, "on_disk": on_disk, "held": held, "grown": grown,
        "ratio": round(grown / held, 4), "seconds": round(seconds, 1),
    }  # fmt: skip
    print(json.dumps(figures))


def write(folder: Path, config: wan_dit.Config, dtype: str) -> int:
    """A safetensors file of zeros with every key at its shape, without its bytes; its size."""
    shapes = {
        placement.leaf_path(path): leaf.get_raw_value().shape
        for path, leaf in nnx.to_flat_state(
            nnx.state(nnx.eval_shape(lambda: wan_dit.WanDiT(config, nnx.Rngs(0))), nnx.Param)
        )
    }
    header, end = {}, 0
    for key, leaf, kind in wan_dit.table(config):
        for i in range(config.num_layers if "{i}" in key else 1):
            shape = shapes[leaf][1:] if "{i}" in key else shapes[leaf]
            axes = {"linear": (1, 0), "conv3d": (4, 3, 0, 1, 2), "copy": range(len(shape))}[kind]
            size = {"F32": 4, "BF16": 2}[dtype]
            for n in shape:
                size *= n
            header[key.format(i=i)] = {
                "dtype": dtype, "shape": [shape[a] for a in axes], "data_offsets": [end, end + size]
            }  # fmt: skip
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "diffusion_pytorch_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return end


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
