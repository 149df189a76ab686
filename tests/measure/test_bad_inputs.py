"""A tenth of the bad inputs of bad_inputs.py, of every kind that needs no process of its own."""

from tests.measure import bad_inputs
from tests.measure.tries import FAULTS, Try, count, outcome, table

SLOW = ("configs", "checkpoints", "videos", "launchers")  # whole runs, and processes


def test_bad_inputs_are_refused_in_one_sentence_and_change_nothing():
    kinds = [kind for kind in bad_inputs.KINDS if kind not in SLOW]
    counts = count(bad_inputs.tries(kinds, share=0.1))
    assert sum(counts.values()) > 150
    assert not [found for _, found in counts if found in FAULTS], "\n" + table(counts)


def test_what_is_no_refusal_is_counted(tmp_path):
    """The measure itself: each fault is found for what it is."""

    def refuse(text):
        raise ValueError(text)

    def change(path):
        path.write_text("changed")
        raise ValueError("no")

    def call(*bad, **more):
        return outcome(Try("x", "x", *bad, **more))[0]

    assert call(lambda: refuse("x is 3")) == "refused"
    assert call(lambda: 3, lambda found: found == 3) == "right"
    for bad in (lambda: refuse("Two.\nLines"), lambda: refuse(""), lambda: refuse("A stop."),
                lambda: refuse("x" * 2000), lambda: {}["x"]):  # fmt: skip
        assert call(bad) == "traceback"
    assert call(lambda: 3) == call(lambda: 3, lambda x: x == 4) == "accepted"
    assert call(lambda: change(tmp_path / "x"), kept=tmp_path) == "changed"
