"""Where compiled programs are kept."""

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from worldr1_jax import train
from worldr1_jax.mesh import compiler
from worldr1_jax.workdir.checkpoint import write_config


@pytest.fixture(autouse=True)
def as_it_was():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compiler.compilation_cache.reset_cache()


def test_programs_are_kept_though_some_were_compiled_before(tmp_path):
    jax.jit(lambda x: x + 1)(jnp.zeros(3))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compiler.keep_programs(tmp_path / "programs")
    jax.jit(lambda x: x + 2)(jnp.zeros(3))
    assert list((tmp_path / "programs").iterdir())


def test_a_refused_run_keeps_none(weights, one_device, tmp_path):
    run = tmp_path / "run"
    write_config(run, {"seed": 1})
    with pytest.raises(ValueError, match="belongs to a run with another config"):
        train.run(tiny.config(weights), str(run), run / "programs")
    assert [path.name for path in run.iterdir()] == ["config.json"]
