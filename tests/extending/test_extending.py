"""A reward, an algorithm and a policy of a user's own: each one file and one line, and they train.

docs/extending names the files beside this one.
"""

import json

import pytest

from tests import tiny
from worldr1_jax import train
from worldr1_jax.algorithms import base as algorithms
from worldr1_jax.policies import base as policies
from worldr1_jax.rewards import base as rewards

FEW = {
    "num_updates": 1, "evaluate.prompts": 0, "groups": 2, "group_size": 4, "sample.guidance": 1.0,
    "dynamic.dynamic_updates": 0, "dynamic.off": (), "mesh.data": -1,
}  # fmt: skip


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The config of a toy policy, on whose videos a toy reward and a toy algorithm act."""
    monkeypatch.setitem(rewards.REWARDS, "brightness", "tests.extending.toy_reward:Brightness")
    monkeypatch.setitem(algorithms.ALGORITHMS, "copy", "tests.extending.toy_algorithm:Copy")
    monkeypatch.setitem(policies.FAMILIES, "ToyDenoiser", "tests.extending.toy_policy")
    folder = tmp_path / "toy" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "ToyDenoiser", "seed": 0}))
    config = tiny.config(tmp_path / "toy", **FEW)
    with config.unlocked():
        config.algorithm = algorithms.section("copy")
        config.rewards.weights = {"brightness": 1.0}
        config.rewards.brightness = {"enough": 0.9}
    return config


@pytest.mark.slow
def test_all_three_train_together(toy, tmp_path):
    with toy.unlocked():
        toy.num_updates, toy.train.learning_rate = 12, 0.1
    train.run(toy, str(tmp_path / "run"))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all(line["grad_norm"] > 0 for line in lines)
    assert lines[-1]["brightness"] > lines[0]["brightness"]


def test_a_wrong_field_of_the_new_section_is_named(toy, tmp_path):
    with toy.unlocked():
        toy.rewards.brightness.enough = -1.0
    with pytest.raises(ValueError, match=r"rewards\.brightness\.enough is -1\.0"):
        train.run(toy, str(tmp_path / "run"))
