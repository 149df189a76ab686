"""The loader: one order for any number of processes, epochs without repeats, checked resumes."""

import json
from itertools import chain

import pytest

from worldr1_jax.data.loader import Loader, check_seed
from worldr1_jax.data.prompts import PromptSets

PROMPTS = PromptSets(
    train=tuple(f"main {i}" for i in range(12)), dynamic=tuple(f"moving {i}" for i in range(5))
)


def _loader(prompts=PROMPTS, **changes) -> Loader:
    arguments = {"seed": 7, "groups": 4, "group_size": 3, "main_updates": 3, "dynamic_updates": 2}
    return Loader(prompts, **(arguments | changes))


def _joined(lists) -> list[str]:
    return list(chain.from_iterable(lists))


def test_members_of_a_group_are_adjacent_and_equal():
    batch = _loader().batch(0)
    assert len(batch.prompts) == 12 and not batch.is_dynamic
    assert batch.prompts == [p for p in batch.prompts[::3] for _ in range(3)]


def test_every_epoch_serves_every_prompt_once_in_a_new_order():
    loader = _loader(group_size=1, dynamic_updates=0)
    epochs = [_joined(loader.batch(3 * e + i).prompts for i in range(3)) for e in range(4)]
    assert all(sorted(epoch) == sorted(PROMPTS.train) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_streams_take_turns_and_keep_their_own_positions():
    loader, main_only = _loader(), _loader(dynamic_updates=0)
    batches = [loader.batch(update) for update in range(10)]
    assert [b.is_dynamic for b in batches] == [False, False, False, True, True] * 2
    assert all(p.startswith("moving") == b.is_dynamic for b in batches for p in b.prompts)
    main = [b for b in batches if not b.is_dynamic]
    assert main == [main_only.batch(update) for update in range(6)]
    moving = _joined(b.prompts[::3] for b in batches if b.is_dynamic)
    assert sorted(moving[:5]) == sorted(PROMPTS.dynamic)  # epochs run on across phases


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_one_order_without_splitting_a_group(processes):
    shares = [_loader(process_index=i, process_count=processes) for i in range(processes)]
    for update in range(12):
        joined = _joined(share.batch(update).prompts for share in shares)
        assert joined == _loader().batch(update).prompts


def test_seed_decides_the_order():
    assert _loader().batch(5) == _loader().batch(5)
    orders = {tuple(_loader(seed=seed).batch(0).prompts) for seed in range(5)}
    assert len(orders) == 5


def test_fewer_prompts_than_groups():
    batch = _loader(PromptSets(train=("only",)), dynamic_updates=0).batch(3)
    assert batch.prompts == ["only"] * 12


def test_state_survives_json_and_another_number_of_processes():
    loader = _loader()
    for update in range(4):
        loader.batch(update)
    state = json.loads(json.dumps(loader.get_state()))
    assert (state["update"], state["main"], state["dynamic"]) == (4, 3, 1)
    resumed = _loader(process_count=2)
    resumed.set_state(state)
    assert resumed.update == 4 and resumed.get_state() == state


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 8}, "seed 7 .now 8"),
        ({"groups": 2}, "groups"),
        ({"main_updates": 2}, "main 3 .now 2"),
        ({"prompts": PromptSets(PROMPTS.train[1:], PROMPTS.dynamic)}, "main_prompts"),
    ],
)
def test_state_of_another_run_is_refused(changes, field):
    loader = _loader()
    loader.batch(3)
    with pytest.raises(ValueError, match=field):
        _loader(**changes).set_state(loader.get_state())


def test_state_that_is_not_one_is_refused():
    with pytest.raises(ValueError, match="update"):
        _loader().set_state({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"groups": 0}, "groups is 0"),
        ({"group_size": 0}, "group_size is 0"),
        ({"process_count": 3}, "does not divide over 3 processes"),
        ({"process_index": 1}, "process_index is 1"),
        ({"main_updates": 0}, "main_updates is 0"),
        ({"prompts": PromptSets(())}, "no train prompts"),
        ({"prompts": PromptSets(("a",))}, "no dynamic prompts"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        _loader(**changes)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 10**26, 1.0, True, None, float("nan")])
def test_a_seed_that_would_be_cut_is_refused(seed):
    check_seed(2**32 - 1)
    with pytest.raises(
        ValueError, match=r"^seed is .*; it must be a whole number from 0 to 4294967295$"
    ):
        check_seed(seed)
