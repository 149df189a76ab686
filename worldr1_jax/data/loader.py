"""Serves the prompts of each update: seeded, grouped, and the same on any number of processes.

Everything is a pure function of (seed, prompts, update): a batch is looked up, not drawn, so a
run that resumes at update u sees what an unbroken run would have seen. The saved state holds no
secret; it is there to stop a resume whose prompts, seed or phases are not those of the run.
"""

import dataclasses
import hashlib
import json
from typing import TypeAlias

import grain
import numpy as np

from worldr1_jax.data.phases import Phase, phase, positions
from worldr1_jax.data.prompts import PromptSets

State: TypeAlias = dict[str, int | str]


SEEDS = 2**32  # jax.random.key takes 32 bits; it would cut longer ones without a word


def check_seed(seed: int, name: str = "seed") -> None:
    """Raises ValueError unless this is an integer from 0 to 2^32 - 1: larger ones would give the
    keys of smaller ones."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < SEEDS:
        raise ValueError(f"{name} is {seed!r}; it must be a whole number from 0 to {SEEDS - 1}")


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts of one update on one process.

    Attributes:
      prompts: [groups here * group_size]; the members of a group are adjacent and equal.
      is_dynamic: whether this update's 3D rewards are off.
    """

    prompts: list[str]
    is_dynamic: bool


class Loader:
    """Looks up batches of prompts by update.

    Args:
      prompts: prompt sets; `dynamic` is needed only if dynamic_updates > 0.
      seed: 0 to 2^32 - 1; the two streams are shuffled apart, and every epoch anew.
      groups: prompts per update, over all processes.
      group_size: K, times each prompt is repeated.
      main_updates, dynamic_updates: lengths of the phases, see `phases.phase`.
      process_index, process_count: this process's share is a contiguous run of whole groups,
        so that the shares in order of process are the batch that one process would serve.

    Raises:
      ValueError: a count out of range, groups that do not divide over processes, or no prompts.
    """

    def __init__(
        self,
        prompts: PromptSets,
        *,
        seed: int,
        groups: int,
        group_size: int,
        main_updates: int = 1,
        dynamic_updates: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        _check(prompts, seed, groups, group_size, dynamic_updates, process_index, process_count)
        positions(0, main_updates, dynamic_updates)  # raises on bad lengths before training does
        main_seed, dynamic_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
        self._streams = {
            "main": _stream(prompts.train, main_seed),
            "dynamic": _stream(prompts.dynamic, dynamic_seed),
        }
        self._lengths = (main_updates, dynamic_updates)
        self._groups, self._group_size = groups, group_size
        local = groups // process_count
        self._local = range(process_index * local, (process_index + 1) * local)
        self._identity: State = {
            "seed": int(seed),
            "groups": groups,
            "main_prompts": _digest(prompts.train),
            "dynamic_prompts": _digest(prompts.dynamic) if dynamic_updates else "unused",
        }
        self.update = 0  # the next one: moved by batch and set_state, read by get_state

    def phase(self, update: int) -> Phase:
        """The phase of `update`, see `phases.phase`."""
        return phase(update, *self._lengths)

    def batch(self, update: int) -> PromptBatch:
        """Looks up this process's prompts for `update` (>= 0), and moves on to the next one."""
        turn = self.phase(update)
        stream, first = self._streams[turn.name], turn.position * self._groups
        prompts = [stream[first + group] for group in self._local for _ in range(self._group_size)]
        self.update = update + 1
        return PromptBatch(prompts, turn.is_dynamic)

    def get_state(self) -> State:
        """The position before the next update and what it depends on; JSON-able, < 1 KB."""
        return self._state(self.update)

    def set_state(self, state: State) -> None:
        """Moves to a saved position.

        Raises:
          ValueError: the state belongs to other prompts, another seed or other phases.
        """
        update = state.get("update")
        if not isinstance(update, int) or update < 0:
            raise ValueError(
                f'data state has "update" {update!r}; it must be that of Loader.get_state()'
            )
        here = self._state(update)
        differing = [name for name in here | state if here.get(name) != state.get(name)]
        if differing:
            found = ", ".join(
                f"{name} {state.get(name)!r} (now {here.get(name)!r})" for name in differing
            )
            raise ValueError(
                f"data state was saved with {found}; resume with the same prompts, seed, groups "
                "and phases, or start in a new workdir"
            )
        self.update = update

    def _state(self, update: int) -> State:
        main, dynamic = positions(update, *self._lengths)
        return self._identity | {"update": update, "main": main, "dynamic": dynamic}


def _stream(prompts: tuple[str, ...], seed: int) -> grain.MapDataset[str]:
    """An endless stream with random access; grain shuffles epoch e with seed + e."""
    return grain.MapDataset.source(prompts).shuffle(seed=seed).repeat()


def _digest(prompts: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]


def _check(
    prompts: PromptSets,
    seed: int,
    groups: int,
    group_size: int,
    dynamic_updates: int,
    process_index: int,
    process_count: int,
) -> None:
    check_seed(seed)
    if groups < 1 or group_size < 1:
        raise ValueError(
            f"groups is {groups} and group_size is {group_size}; both must be 1 or more"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index is {process_index}; it must be 0 or more and less than "
            f"process_count ({process_count})"
        )
    if groups % process_count:
        raise ValueError(
            f"groups is {groups}, which does not divide over {process_count} processes; it must "
            "be a multiple of their number, so that no group is split"
        )
    if not prompts.train:
        raise ValueError("there are no train prompts; at least one is needed")
    if dynamic_updates and not prompts.dynamic:
        raise ValueError(
            f"dynamic.dynamic_updates is {dynamic_updates} but there are no dynamic prompts; give "
            "some in dynamic.txt or set it to 0"
        )
