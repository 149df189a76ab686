"""Checkpoints that are whole or absent, and a run's folder that stays one run's.

A checkpoint is <workdir>/checkpoints/<step> with three items: `state` (arrays), `data` and `meta`
(JSON). Orbax writes it beside its final name and renames it when it is complete, so a run killed
at any moment leaves the checkpoints before it untouched and nothing that looks like a new one.
"""

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree, UInt32

from worldr1_jax import files

Json = dict[str, Any]
CONFIG = "config.json"
_CONTENTS = "contents"  # beside the config's own sections: field -> hash of what it names


class Restored(NamedTuple):
    """What a checkpoint held; `step` is the one it was saved under."""

    step: int
    state: PyTree
    data: Json
    meta: Json


class Checkpointer:
    """Saves asynchronously, keeps the newest few, restores the newest.

    Args:
      workdir: the run's folder; on several hosts one that all of them see.
      keep: how many checkpoints to keep, >= 1.
      config: what `write_config` writes before the first checkpoint; None for nothing.
      contents: as for `write_config`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        keep: int = 3,
        config: str | Mapping[str, Any] | None = None,
        contents: Mapping[str, str] | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; it must be 1 or more checkpoints")
        self._config, self._contents = config, contents or {}
        self._folder = files.make_folder(files.local(workdir).absolute() / "checkpoints")
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,  # what a killed save left
            ),
        )

    def save(self, step: int, state: PyTree, data: Mapping[str, Any], meta: Json) -> None:
        """Starts to save `step` and returns once the arrays may be changed or donated.

        Args:
          step: updates done; must be larger than that of every checkpoint kept.
          state: pytree of arrays; typed PRNG keys go into `meta` as their key data.
          data: position in the prompts (`Loader.get_state()`), JSON-able.
          meta: config fingerprint, version, seed, key data and the like, JSON-able.
        """
        if self._config is not None:
            write_config(self._folder.parent, self._config, self._contents)
        described = {"user": meta, "leaves": _describe(state, digests=True)}
        with files.stored(self._folder):
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(dict(data)),
                    meta=ocp.args.JsonSave(described),
                ),
            )
        if not saved:
            raise ValueError(
                f"step {step} cannot be saved in {self._folder}, which has step "
                f"{self._manager.latest_step()}; steps must grow"
            )

    def restore_latest(self, abstract_state: PyTree) -> Restored | None:
        """Restores the newest checkpoint, or returns None when there is none.

        Args:
          abstract_state: jax.ShapeDtypeStruct for each leaf, with the sharding that it is to
            have, which need not be the one it was saved with; the bits are the same.

        Raises:
          ValueError: the checkpoint is damaged, or holds other leaves than `abstract_state`.
        """
        self.wait()
        self._manager.reload()
        step = self._manager.latest_step()
        if step is None:
            return None
        folder = self._folder / str(step)
        with _damage_named(folder):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()),
            )
            data, meta, leaves = items["data"], items["meta"]["user"], items["meta"]["leaves"]
        _compare_leaves(folder, leaves, _describe(abstract_state, digests=False))
        with _damage_named(folder):
            state = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            )["state"]
        _compare_digests(folder, leaves, _describe(state, digests=True))
        return Restored(step, state, data, meta)

    def latest_step(self) -> int | None:
        """The newest step saved, or being saved."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when no save is in progress; ValueError for what went wrong in one."""
        with files.stored(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes what is in progress and frees the threads."""
        with files.stored(self._folder):
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_state(workdir: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
    """Step and state of a run's newest checkpoint, as nested dicts of arrays on one device.

    For what needs neither the run's model nor its mesh, such as exporting adapters.

    Raises:
      ValueError: no checkpoint there, or one that is damaged.
    """
    folder = files.local(workdir).absolute() / "checkpoints"
    if not os.path.isdir(folder):
        raise ValueError(f"{workdir} holds no checkpoints/: it is no folder of a run")
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
    if step is None:
        raise ValueError(f"{folder} holds no checkpoint yet")
    item = folder / str(step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with (
        _damage_named(item),
        ocp.StandardCheckpointer() as arrays,
        ocp.Checkpointer(ocp.JsonCheckpointHandler()) as texts,
    ):
        meta = texts.restore(item / "meta")
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            arrays.metadata(item / "state").item_metadata.tree,
        )
        state = arrays.restore(item / "state", wanted)
    saved = list(meta["leaves"].values())
    found = list(_describe(state, digests=True).values())
    if sorted(saved) != sorted(found):  # dicts' paths are not those of the run's own types
        reason = "the bits of its state are not those that were saved"
        raise ValueError(_damaged(item, reason))
    return step, state


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Turns what orbax and tensorstore raise at unreadable files into one that names the folder."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise  # the device's trouble, such as too little memory: the files are not to blame
    except Exception as error:  # orbax 0.12.8 raises no narrower type at a chunk cut short
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ValueError(_damaged(folder, reason)) from error


def _damaged(folder: Path, reason: str) -> str:
    return (
        f"checkpoint {folder} is damaged or cannot be read ({reason}); mend it, or remove that "
        "folder to go on from the checkpoint before it"
    )


# --------------------------------------------------------------------- what the state is made of


def _describe(state: PyTree, digests: bool) -> dict[str, list[Any]]:
    """{path: [shape, dtype]} of each leaf, and the digest of its bits if asked for."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for path, leaf in leaves:
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} is a typed PRNG key; put its "
                "jax.random.key_data into meta"
            )
    described: dict[str, list[Any]] = {
        jax.tree_util.keystr(path): [list(np.shape(leaf)), jnp.result_type(leaf).name]
        for path, leaf in leaves
    }
    if digests:
        sums = jax.device_get(digests_of([leaf for _, leaf in leaves]))
        for entry, value in zip(described.values(), sums, strict=True):
            entry.append(int(value))
    return described


@jax.jit
def digests_of(leaves: list[Array]) -> list[UInt32[Array, ""]]:
    """All in one program: many small ones with collectives in flight at once can starve emulated
    devices."""
    return [_digest(leaf) for leaf in leaves]


def _digest(leaf: Array) -> UInt32[Array, ""]:
    """Sums the words of an array times odd weights by position, modulo 2^32.

    Zarr chunks carry no checksum, so a flipped bit on disk would be restored without a word; this
    sum changes with any single bit, and, being of integers, it is the same on every mesh.
    """
    width = leaf.dtype.itemsize
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * min(width, 4)}"))
    place = jnp.uint32(0)
    for axis in range(words.ndim):  # no reshape: the leaf stays sharded as it is
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    weights = (place * jnp.uint32(2654435761)) | jnp.uint32(1)  # Knuth's multiplicative hash
    return jnp.sum(words.astype(jnp.uint32) * weights, dtype=jnp.uint32)


def _compare_leaves(
    folder: Path, saved: dict[str, list[Any]], wanted: dict[str, list[Any]]
) -> None:
    differing = []
    for path in saved | wanted:
        there, here = (leaves.get(path, [])[:2] for leaves in (saved, wanted))
        if there != here:
            differing.append(f"{path} is {_name(there)} there and {_name(here)} here")
    if differing:
        more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(
            f"checkpoint {folder} does not fit this model and optimizer: "
            f"{', '.join(differing[:5])}{more}; resume with the config that saved it"
        )


def _name(leaf: list[Any]) -> str:
    return f"{leaf[1]}{leaf[0]}" if leaf else "absent"


def _compare_digests(
    folder: Path, saved: dict[str, list[Any]], restored: dict[str, list[Any]]
) -> None:
    differing = [path for path in saved if saved[path] != restored[path]]
    if differing:
        reason = f"bits of {', '.join(differing[:5])} are not those that were saved"
        raise ValueError(_damaged(folder, reason))


# ---------------------------------------------------------------------------- the run's folder


def check_workdir(
    workdir: str | os.PathLike[str],
    config: str | Mapping[str, Any],
    may_change: Collection[str] = (),
) -> None:
    """`compare_config`, and `write_config` at once."""
    compare_config(workdir, config, may_change)
    write_config(workdir, config)


def compare_config(
    workdir: str | os.PathLike[str],
    config: str | Mapping[str, Any],
    may_change: Collection[str] = (),
    contents: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Checks that a folder is new, or of a run with this config; writes nothing.

    Args:
      workdir: folder of the run, which need not exist.
      config: the config, as JSON text or as a mapping of what JSON holds.
      may_change: dotted fields that a resume may change, such as "num_updates"; a field stands
        for everything under it.
      contents: dotted fields that are paths -> hash of what lies there (text_cache.fingerprint):
        another path with equal content is the same, and the same path with another is not.
      defaults: dotted fields -> the value that changes nothing, which a config that was written
        before there was such a field is taken to have.

    Raises:
      ValueError: the folder has another config (names fields and both values), or its config.json
        is not JSON.
    """
    path = files.local(workdir) / CONFIG
    if not os.path.lexists(path):
        return
    saved, now = files.read_json(path), contents or {}
    were = saved.pop(_CONTENTS, None)
    were = were if isinstance(were, dict) else {}
    here, there = dict(_fields(_plain(config))), dict(_fields(saved))
    there = _plain({k: v for k, v in (defaults or {}).items() if k in here}) | there
    passed = [*may_change, *(field for field in now if field in were)]
    differing = [
        f"{field} is {_shown(there, field)} there and {_shown(here, field)} here"
        for field in sorted(here | there)
        if _value(here, field) != _value(there, field)
        and not any(field == name or field.startswith(f"{name}.") for name in passed)
    ]
    differing += [
        f"what {field} names has changed"
        for field in sorted(now)
        if now[field] != were.get(field, now[field]) and field not in may_change
    ]
    if differing:
        more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(
            f"workdir {path.parent} belongs to a run with another config: "
            f"{', '.join(differing[:5])}{more}; "
            "choose another workdir, or the config that this one began with"
        )


def write_config(
    workdir: str | os.PathLike[str],
    config: str | Mapping[str, Any],
    contents: Mapping[str, str] | None = None,
) -> None:
    """Writes config.json, which keeps the values that a run began with: where there is one, it
    stays. `contents` as for `compare_config`."""
    path = files.local(workdir) / CONFIG
    if jax.process_index() == 0 and not os.path.lexists(path):
        values = _plain(config) | ({_CONTENTS: dict(contents)} if contents else {})
        text = json.dumps(values, indent=2, sort_keys=True)
        files.write_atomically(path, f"{text}\n".encode())


def _plain(config: str | Mapping[str, Any]) -> Json:
    """As JSON gives it back: tuples are lists."""
    return json.loads(config if isinstance(config, str) else json.dumps(dict(config)))


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("train.clip", value) for every value that is not itself a mapping with fields."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _fields(item, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _value(fields: dict[str, Any], name: str) -> str:
    return json.dumps(fields[name]) if name in fields else "absent"


def _shown(fields: dict[str, Any], name: str) -> str:
    return files.short(_value(fields, name))
