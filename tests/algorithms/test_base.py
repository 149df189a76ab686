"""Algorithms by name: a section of the config is a class, and nothing else names them."""

import dataclasses

import pytest

from configs import world
from worldr1_jax.algorithms import base


@pytest.mark.parametrize("name", base.ALGORITHMS)
def test_a_section_is_the_class(name):
    section = base.section(name)
    built = base.build(section)
    fields = {f.name for f in dataclasses.fields(built)}
    assert fields | {"name"} == set(section)
    assert isinstance(hash(built), int) and built.terms >= 1 and built.forwards >= 0


@pytest.mark.parametrize("variant", world.VARIANTS)
@pytest.mark.parametrize("name", base.ALGORITHMS)
def test_every_variant_has_every_algorithm(variant, name):
    config = world.get_config(f"{variant},{name}")
    built = base.build(config.algorithm)
    assert type(built) is base.load(name)
    assert set(config.algorithm) == set(base.section(name))


def test_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"algorithm\.name is 'ppo': it is one of grpo"):
        base.build({"name": "ppo"})
    with pytest.raises(ValueError, match=r"algorithm\.clip is no field of nft"):
        base.build({"name": "nft", "clip": 0.1})
