"""Phases: exact at boundaries, and positions that count without gaps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldr1_jax.data.phases import Phase, phase, positions


def test_published_cycle_at_its_boundaries():
    expected = {
        0: Phase("main", 0),
        99: Phase("main", 99),
        100: Phase("dynamic", 0),
        149: Phase("dynamic", 49),
        150: Phase("main", 100),
        249: Phase("main", 199),
        250: Phase("dynamic", 50),
        300: Phase("main", 200),
    }
    assert {update: phase(update, 100, 50) for update in expected} == expected
    assert expected[100].is_dynamic and not expected[99].is_dynamic


def test_no_dynamic_updates_is_main_for_ever():
    assert [phase(u, 3, 0) for u in range(7)] == [Phase("main", u) for u in range(7)]


@given(st.integers(1, 7), st.integers(0, 7), st.integers(1, 60))
def test_positions_count_each_stream_without_gaps(main_updates, dynamic_updates, updates):
    counts = {"main": 0, "dynamic": 0}
    for update in range(updates):
        assert positions(update, main_updates, dynamic_updates) == tuple(counts.values())
        turn = phase(update, main_updates, dynamic_updates)
        assert turn.position == counts[turn.name]
        counts[turn.name] += 1


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((-1, 1, 1), "update"), ((0, 0, 1), "main_updates"), ((0, 1, -1), "dynamic_updates")],
)
def test_bad_lengths(arguments, field):
    with pytest.raises(ValueError, match=f"^{field} is"):
        phase(*arguments)
