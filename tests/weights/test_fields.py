"""The config.json files of four networks: every field with wrong values is refused by name, before
anything is built."""

import json
import math
import time

import pytest

from worldr1_jax.models import umt5
from worldr1_jax.models.da3 import config as da3
from worldr1_jax.models.wan import config as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.weights import convert

CONFIGS = {
    "transformer": wan_dit.Config.nano(),
    "vae": wan_vae.Config.nano(),
    "text_encoder": umt5.Config.nano(),
    "da3": da3.Config.nano(),
}
NOT_READ = ("_class_name", "scale_factor_temporal", "scale_factor_spatial", "architectures")


def wrong(value):
    """Values that can stand for none of this one's kind."""
    match value:
        case bool():
            return ("x", 3, 0.5, None, [], {})
        case str():
            return (3, True, None, [], {})
        case int():
            return ("x", 1.5, True, None, [], {}, -(10**9), 10**9, 10**30, math.nan)
        case float():
            return ("x", True, None, [], {}, math.nan, math.inf, -math.inf, 10**400)
    count = max(len(value), 1)
    return ("x", 3, True, None, {}, [[]], ["x"] * count, [10**30] * count, [math.nan] * count)


def leaves(values, path=()):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


CASES = [
    (part, path, value)
    for part, config in CONFIGS.items()
    for path, value in leaves(config.to_dict())
    if path[-1] not in NOT_READ and value is not None
]


def test_what_is_written_is_read():
    for config in CONFIGS.values():
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("part", "path", "value"), CASES, ids=lambda x: str(x)[:30])
def test_wrong_values_are_refused_by_name(part, path, value):
    began = time.perf_counter()
    for other in wrong(value):
        values = holder = CONFIGS[part].to_dict()
        for name in path[:-1]:
            holder = holder[name]
        holder[path[-1]] = other
        with pytest.raises(ValueError, match=path[-1]) as error:
            type(CONFIGS[part]).from_dict(values)
        assert len(str(error.value)) < 400
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("part", ["net", "head", "gs_head", "gs_adapter", None])
@pytest.mark.parametrize("value", [3, "x", [1], True])
def test_parts_that_are_no_fields_are_refused(part, value):
    values = CONFIGS["da3"].to_dict()
    if part is None:
        values["config"] = value
    else:
        values["config"][part] = value
    with pytest.raises(ValueError, match=part or "config"):
        da3.Config.from_dict(values)


def test_the_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"num_layers": 10000000}')
    with pytest.raises(ValueError, match=r"^/.*: config field 'num_layers' is 10000000; it has to"):
        convert.config_of(wan_dit.Config, tmp_path)
