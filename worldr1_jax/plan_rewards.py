"""What the plan of a pod compiles of the rewards: Depth Anything 3 on whole videos (see plan.py).

The network and its program are those of rewards.Reward, from shapes alone: its giant, the only
published size with Gaussians, on as many videos as the mesh takes at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from worldr1_jax import sharding
from worldr1_jax.models import attention, da3, da3_config
from worldr1_jax.rewards import reconstruct


def lowerings(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, network: da3.Config | None = None
) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Name, what traces it, and the FLOPs that one run's mathematics needs on each device; to be
    called, as those of plan.lowerings, under `jax.set_mesh`.

    Args:
      config: of the run; frames, size, rewards.frame_stride, policy.dtype and
        sample.videos_at_once are read.
      mesh: the trainer's.
      network: None is the giant.
    """
    network = da3.Config.giant() if network is None else network
    graph, state = nnx.split(abstract(network, config.policy.dtype, mesh))
    stride, size = config.rewards.frame_stride, (config.height, config.width)

    def run(state: Any, videos: jax.Array) -> Any:
        return reconstruct.reconstruct(nnx.merge(graph, state), videos, frame_stride=stride)

    count = videos_at_once(config, mesh)
    videos = jax.ShapeDtypeStruct(
        (count, config.frames, *size, 3), jnp.float32, sharding=sharding.batched(mesh)
    )
    given = reconstruct.processed_size(*size, network.process_res, network.net.patch_size)
    needed = count * da3_config.flops(network, -(-config.frames // stride), given) / mesh.size
    yield "reconstruct", lambda: jax.jit(run).trace(state, videos), needed


def videos_at_once(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> int:
    """Videos of one run of the program; an update has groups x group_size of them."""
    parts = sharding.batch_parts(mesh)
    count = config.groups * config.group_size
    return parts * config.sample.videos_at_once if config.sample.videos_at_once else count


def abstract(network: da3.Config, dtype: Any, mesh: jax.sharding.Mesh) -> da3.DA3:
    """The network with leaves that have a shape, a dtype and a place, but no values."""
    splash = attention.build("splash", device_kind=mesh.devices.flat[0].device_kind)
    model = nnx.eval_shape(
        lambda: da3.DA3(network, nnx.Rngs(0), dtype=jnp.dtype(dtype), attention=splash)
    )
    state = nnx.state(model, nnx.Param)
    places = sharding.shardings_of(state, "da3", mesh)
    described = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )
    nnx.update(model, described)
    return model
