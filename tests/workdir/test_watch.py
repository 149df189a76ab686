"""What ends a run before it is spoilt, by numbers of runs that would be."""

import json

import pytest

from worldr1_jax.workdir.watch import FIRST, Watch, Watcher


def ended(watch, updates):
    """Number of the update that ended the run, and why."""
    watcher = Watcher(watch)
    for number, scalars in enumerate(updates):
        # as a resume finds it
        watcher = Watcher(watch, json.loads(json.dumps(watcher.history)))
        if reason := watcher.update(scalars):
            return number, reason
    return None, ""


def test_a_collapse_ends_the_run_and_noise_does_not():
    falling = [{"diversity": 0.12 * 0.97**n} for n in range(80)]
    number, reason = ended(Watch(diversity=0.75, patience=5), falling)
    # Means of 5 updates are below 0.75 of the first after log(0.75) / log(0.97) = 9.4 updates.
    assert number == 4 + 10 and "have become alike" in reason
    steady = [{"diversity": 0.12 * (1 + 0.2 * (-1) ** n)} for n in range(80)]
    assert ended(Watch(diversity=0.75, patience=6), steady) == (None, "")
    assert ended(Watch(diversity=0.0), falling) == (None, "")


def test_kl_that_leaves_its_band_ends_the_run():
    growing = [{"kl": 0.001 * n} for n in range(100)]
    number, reason = ended(Watch(kl=0.02, patience=3), growing)
    assert number == 22 and "KL 0.021" in reason
    assert ended(Watch(kl=0.0), growing)[0] is None


def test_a_run_that_learns_nothing_ends():
    idle = [{"learnt": 0.0, "masked": 32, "skipped": 1}] * 3
    assert ended(Watch(idle=4), [*idle, {"learnt": 1.0}, *idle])[0] is None
    number, reason = ended(Watch(idle=4), [*idle, *idle])
    assert number == 3 and "nothing could be learnt from 4 updates" in reason


def test_a_reward_without_spread_is_named_once():
    watcher = Watcher(Watch())
    assert "the reward general is the same for all videos of 80%" in watcher.warning(
        {"constant_general": 0.8, "constant_recon": 0.0, "reward": 1.0}
    )
    assert watcher.warning({"constant_general": 0.9}) == ""


@pytest.mark.parametrize("field", ["diversity", "kl", "patience", "idle"])
def test_ranges(field):
    with pytest.raises(ValueError, match=field):
        Watch(**{field: -1})


def test_a_policy_that_is_spoilt_stays_so_after_a_resume():
    watcher = Watcher(Watch(patience=2))
    for value in (1.0,) * FIRST + (0.1, 0.1):
        said = watcher.update({"diversity": value})
    assert said and Watcher(Watch(patience=2), watcher.history).history["spoilt"] == said
