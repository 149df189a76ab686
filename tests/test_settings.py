"""The config against the dataclasses that it is passed to, and every field with wrong values."""

import dataclasses
import importlib
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from configs import world
from worldr1_jax import preflight, settings, timing
from worldr1_jax.algorithms import base as algorithms
from worldr1_jax.rewards.base import REWARDS, find
from worldr1_jax.rewards.reconstruct import Reconstruct

# -- keys of a section are the fields of its dataclass


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("algorithm", algorithms.ALGORITHMS)
@pytest.mark.parametrize("variant", world.VARIANTS)
def test_sections_have_the_fields_of_their_dataclasses(variant, algorithm):
    config = world.get_config(f"{variant},{algorithm}")
    for name, kind in settings.SECTIONS.items():
        assert set(config[name]) == names(kind), name
    kind = algorithms.load(algorithm)
    assert set(config.algorithm) == names(kind) | {"name"}
    sections = {name: find(name) for name in REWARDS} | {"reconstruct": Reconstruct}
    for name, kind in sections.items():
        assert set(config.rewards.get(name, ())) == names(kind), name
    apart = {"rewards", "algorithm", *settings.SECTIONS}
    assert set(config) - apart == names(settings.Run)
    settings.read(config)


def test_every_table_of_names_can_be_imported():
    for table in (REWARDS, algorithms.ALGORITHMS):
        for target in table.values():
            module, _, name = target.partition(":")
            assert hasattr(importlib.import_module(module), name)


# -- wrong values

LONG = 10**26
NUMBERS: tuple[Any, ...] = (
    math.nan, math.inf, -math.inf, -1, 0, -1e-9, 1e300, LONG, 10**12, True, "", "3", (1,), None,
)  # fmt: skip
WORDS: tuple[Any, ...] = ("", "foo", "FLOAT32", 3, math.nan, True, ("a", "b"), None)
SWITCHES: tuple[Any, ...] = ("", "yes", 2, -1, math.nan, (True,), None)
TUPLES: tuple[Any, ...] = (
    (), (1,), (5, 1), (-1, 2), (0, 1, 2), (0, LONG), (math.nan, 1.0), (0, math.inf), ("foo",),
    (None,), "foo", 3, None, ("recon", "trajectory", "general"),
)  # fmt: skip

# Where an odd value is a right one.
ZERO = {
    "seed", "mesh.data", "sample.guidance", "sample.videos_at_once", "camera.strength",
    "camera.degradation", "rewards.reconstruct.gaussian_frames", "rewards.recon.views",
    "rewards.recon.change_floor", "rewards.recon.change_min", "rewards.recon.texture_min",
    "algorithm.kl_weight", "algorithm.average_weight", "algorithm.decay", "algorithm.contrast",
    "algorithm.margin", "algorithm.anchor", "advantage.floor",
    "train.warmup", "train.weight_decay", "train.clip_norm", "train.microbatches",
    "train.ema_decay", "dynamic.dynamic_updates", "watch.diversity", "watch.kl",
    "evaluate.prompts",
}  # fmt: skip
WEIGHTS = re.compile(r"rewards\.(weights|general)\.\w+")
# The only rewards of the nano config that count with the dynamic phase on: one has to be left.
ONLY = ("rewards.general.hps", "rewards.weights.general")
JUDGE = ("rewards.judge.height", "rewards.judge.width")  # 0: as the video is
# None: left out.
OPTIONAL = tuple(
    f"rewards.weights.{name}"
    for name in ("judge", "mvcs", "palette", "recon", "meta_view", "trajectory")
)
LEFT = re.compile(r"mesh\.data")  # -1: what is left
SIGNED = ("algorithm.margin",)
# Texts of which files are made, or nothing: checked where they are read.
FREE = re.compile(
    r"variant|prompts|policy\.(weights|adapters|text_cache)|sample\.negative_prompt|"
    r"rewards\.(reconstruct\.da3|recon\.lpips|\w+\.(weights|tokenizer))"
)
EMPTY = {"idle_on_host", "evaluate.guidances", "dynamic.off"}


def is_right(name: str, value: Any) -> bool:
    """Whether one of the values above is right after all; all others have to be refused."""
    if name in ONLY and value == 0:
        return False
    if name in JUDGE and (value == 0 and not isinstance(value, bool)):
        return True
    if value is None:
        return name in OPTIONAL
    if isinstance(value, str):
        return name == "rewards.judge.question" or bool(FREE.fullmatch(name))
    if isinstance(value, bool):
        return False
    if value == 0:
        return name in ZERO or bool(WEIGHTS.fullmatch(name))
    if value in (-1, -1e-9):
        signed = name.startswith("rewards.weights.") or name in SIGNED
        return signed or (value == -1 and bool(LEFT.fullmatch(name)))
    return (value == () and name in EMPTY) or (
        name == "evaluate.guidances" and value in ((1,), (5, 1), (0, 1, 2))
    )


def flat(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def candidates(value: Any) -> tuple[Any, ...]:
    if isinstance(value, bool):
        return SWITCHES
    if isinstance(value, str):
        return WORDS
    return TUPLES if isinstance(value, tuple) else NUMBERS


def changed(config: ml_collections.ConfigDict, name: str, value: Any) -> bool:
    """Sets a field as code would; False where ConfigDict itself refuses the type, or has made 1.0
    of a True for a field of fractions: before `settings.read` sees it, and whatever that may do."""
    *sections, field = name.split(".")
    for section in sections:
        config = config[section]
    try:
        config[field] = value
    except TypeError:
        return False
    return not (value is True and isinstance(config[field], float))


def refusal(config: ml_collections.ConfigDict) -> str:
    """The sentence with which a config is refused; "" where it is not; of any other exception two
    lines, which no sentence is."""
    try:
        settings.read(config)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}\n{error}"
    return ""


@pytest.mark.parametrize("algorithm", algorithms.ALGORITHMS)
def test_wrong_values_are_refused_by_name(algorithm):
    """In one sentence that names the field, at once, and never by another exception."""
    config = world.get_config(f"nano,{algorithm}")
    wrong, began = [], time.perf_counter()
    fields = [(n, v) for n, v in flat(config) if algorithm == "grpo" or n.startswith("algorithm.")]
    count = 0
    for name, value in fields:
        for bad in candidates(value):
            tried = config.copy_and_resolve_references()
            if not changed(tried, name, bad):
                continue
            count += 1
            said = refusal(tried)
            names_it = (
                name.rpartition(".")[2] in said
                or (name in ONLY and "off" in said)
                or name.rpartition(".")[0] in said
            )
            if is_right(name, bad) == bool(said) or (said and not names_it) or "\n" in said:
                wrong.append(f"{name}={bad!r}: {said or 'accepted'}")
    assert not wrong, "\n".join(wrong)
    assert time.perf_counter() - began < 1.0 * count


def test_no_flag_makes_a_number_of_a_switch(monkeypatch):
    """Nor of a word: a flag's text is read as the kind of number that the field holds."""
    config = world.get_config("nano,grpo")
    numbers = [name for name, value in flat(config) if type(value) in (int, float)]
    assert len(numbers) > 50
    for name in numbers:
        monkeypatch.setattr(sys, "argv", ["", f"--config.{name}=True"])  # read at the definition
        values = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", config, flag_values=values)
        with pytest.raises(flags.IllegalFlagValueError, match=re.escape(name)):
            values(sys.argv)


MESH_OF_8 = {"data": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size is 1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"train.minibatches": 3}, "train.minibatches is 3: the 32 videos of an update do not"),
        ({"train.minibatches": 8, "train.microbatches": 8}, "train.microbatches is 8"),
        ({"evaluate.prompts": 1}, "evaluate.prompts is 1: an interval needs 2"),
        ({"dynamic.off": ("recon", "trajectory", "general")}, "dynamic.off leaves no reward"),
        ({"dynamic.off": ("beauty",)}, "dynamic.off names 'beauty'"),
        ({"rewards.weights.general": 0.0}, "dynamic.off leaves no reward"),
        ({"rewards.weights.recon": 1e300}, r"rewards.weights.recon is 1e\+300"),
        ({"rewards.general.hps": 0.0}, "rewards.general is"),
        ({"algorithm.window": 9}, "algorithm.a window of 9 steps does not fit into window_range"),
        ({"algorithm.window_range": (0, 10)}, r"algorithm.window_range is \(0, 10\)"),
        ({"algorithm.sde": "cps", "algorithm.eta": 1.5}, "algorithm.eta is 1.5"),
        ({"mesh.fsdp": -1}, "mesh.fsdp is -1, and so is data"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(changes, message):
    config = world.get_config("nano,grpo")
    for name, value in changes.items():
        assert changed(config, name, value)
    assert re.match(message, refusal(config)), refusal(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rewards.weights.trajectory", 0.0, "algorithm.contrast is not 0, but rewards.weights"),
        ("policy.text_cache", "cache", "algorithm.contrast is not 0 and policy.text_cache"),
    ],
)
def test_what_a_contrast_of_captions_needs(field, value, message):
    config = world.get_config("nano,fast")
    assert changed(config, field, value)
    assert re.match(message, refusal(config)), refusal(config)


def test_the_dynamic_phase_turns_off_every_reward_of_3d():
    """A judge too, which most configs leave out."""
    config = world.get_config("nano")
    config.rewards.weights.judge = 0.1
    found = settings.read(config)
    off = set(found.rewards.meant(found.dynamic.off))
    assert {"recon", "trajectory", "meta_view", "judge"} == off
    assert set(found.rewards.counted()) - off == {"hps"}
    config.rewards.weights.judge = None
    assert "judge" not in settings.read(config).rewards.meant(found.dynamic.off)


def test_a_watch_on_kl_needs_one_that_is_measured():
    config = world.get_config("nano,fast")
    config.watch.kl = 0.01
    assert refusal(config).startswith("watch.kl needs algorithm.kl_weight above 0")
    config.algorithm.kl_weight = 1e-9
    settings.read(config)


@pytest.mark.parametrize(
    ("variant", "forwards"),
    [("nano", 34), ("small,fast", 54), ("nano,grpo", 44), ("nano,flash", 26), ("small,grpo", 124)],
)
def test_forwards_of_the_policy_for_a_video_and_update(variant, forwards):
    """Steps, twice for guidance; then terms, guided or not, of three for each that has a gradient:
    20 + 2 (2 x 3 + 1), 40 + 14, 20 + 3 x 2 (3 + 1), 20 + 2 x 3, 100 + 24."""
    found = settings.read(world.get_config(variant))
    sampling = found.sample
    assert forwards == algorithms.forward_equivalents(
        found.algorithm, sampling.steps, sampling.guidance
    )


def test_fields_that_are_unknown_or_missing_are_refused():
    config = world.get_config("nano,grpo")
    with config.unlocked():
        config.sample.stepz = 3
    assert refusal(config) == "the config has no field sample.stepz"
    for section in ("sample", "algorithm"):
        config = world.get_config("nano,grpo")
        with config.unlocked():
            del config[section]
        assert section in refusal(config)


@pytest.mark.parametrize("variant", ["nano", "nano,grpo", "large"])
def test_what_a_newer_field_is_taken_to_have_been_is_its_default(variant):
    config = world.get_config(variant)
    known = preflight.defaults(settings.read(config))
    fields = dict(flat(config))
    assert {"algorithm.kl_weight", "train.adam_eps", "rewards.judge.mode"} <= known.keys()
    assert {name for name in known if not name.startswith("rewards.weights.")} <= fields.keys()
    assert known["rewards.weights.judge"] is None


def test_advice_on_memory_names_fields_and_what_a_resume_may_change():
    names = [name for name, _ in flat(world.get_config("nano,grpo"))]
    for first, then in (*timing.SETTINGS.values(), timing._OTHERS):
        for name in re.findall(r"[a-z]\w+[._]\w[\w.]+", f"{first}, {then}"):
            assert name in names, name
        for name in re.findall(r"[a-z]\w+[._]\w[\w.]+", first):
            assert {name, name.partition(".")[0]} & set(preflight.MAY_CHANGE), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("watch", "the config has no section watch, which configs/world.py has"),
        ("rewards", "the config has no section rewards, which configs/world.py has"),
        ("groups", "the config lacks the field groups"),
    ],
)
def test_a_config_that_lacks_something_is_refused(name, message):
    """Such as a copy of an older version's."""
    config = world.get_config("nano")
    with config.unlocked():
        del config[name]
    with pytest.raises(ValueError, match=f"^{message}$"):
        settings.read(config)
