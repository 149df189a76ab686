"""Periodic decoupled training: n updates on main prompts, then m on dynamic ones, and again.

World-R1 trains 100 updates on the main prompts with every reward and then 50 on prompts with
moving objects with the 3D rewards off, because rewards for static 3D alone teach videos to
freeze. The phase is a pure function of the update, so there is nothing to save or restore.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from worldr1_jax.fields import in_range, of_kind


@dataclass(frozen=True)
class Phases:
    """Lengths of the phases; the fields are `dynamic` of the config.

    Attributes:
      main_updates, dynamic_updates: in a row on each stream; 0 dynamic ones turn that phase off.
      off: rewards that do not count in the dynamic phase.
    """

    main_updates: int = 100
    dynamic_updates: int = 50
    off: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        in_range(self, main_updates=(1, 10**9), dynamic_updates=(0, 10**9))
        of_kind(self, tuple, "off")


class Phase(NamedTuple):
    """The turn of one update.

    Attributes:
      name: "main" (every reward) or "dynamic" (3D rewards off).
      position: updates this stream has served before this one; indexes the stream's batches.
    """

    name: Literal["main", "dynamic"]
    position: int

    @property
    def is_dynamic(self) -> bool:
        return self.name == "dynamic"


def phase(update: int, main_updates: int, dynamic_updates: int) -> Phase:
    """Says whose turn `update` is, and how many turns that stream had before.

    Args:
      update: index of the update, from 0.
      main_updates: n >= 1, updates in a row on the main stream.
      dynamic_updates: m >= 0, updates in a row on the dynamic stream; 0 turns the phase off.

    Raises:
      ValueError: a count outside its range.
    """
    main, dynamic = positions(update, main_updates, dynamic_updates)
    turn = update % (main_updates + dynamic_updates)
    return Phase("main", main) if turn < main_updates else Phase("dynamic", dynamic)


def positions(update: int, main_updates: int, dynamic_updates: int) -> tuple[int, int]:
    """Counts the (main, dynamic) updates among updates 0 ... update - 1.

    Arguments and errors are those of `phase`.
    """
    if update < 0:
        raise ValueError(f"update is {update}; it must be 0 or more")
    if main_updates < 1:
        raise ValueError(f"main_updates is {main_updates}; it must be 1 or more")
    if dynamic_updates < 0:
        raise ValueError(
            f"dynamic_updates is {dynamic_updates}; it must be 0 (no dynamic phase) or more"
        )
    cycles, turn = divmod(update, main_updates + dynamic_updates)
    main = cycles * main_updates + min(turn, main_updates)
    return main, update - main
