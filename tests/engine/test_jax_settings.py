"""Settings of jax that decide what a program is, and those that do not."""

import jax
import pytest

from flexjax.engine.jax_settings import jax_settings


@pytest.mark.parametrize(
    "name, other",
    [
        ("jax_enable_x64", True),
        ("jax_default_matmul_precision", "highest"),
        ("jax_numpy_rank_promotion", "warn"),
        ("jax_use_shardy_partitioner", False),
        ("jax_optimization_level", "O1"),
    ],
)
def test_settings_that_decide_a_program_have_the_values_of_now(name, other):
    before = jax_settings()
    assert before[name] == getattr(jax.config, name)
    jax.config.update(name, other)
    try:
        assert jax_settings() == {**before, name: other} and before[name] != other
    finally:
        jax.config.update(name, before[name])


@pytest.mark.parametrize(
    "name", ["jax_platforms", "jax_num_cpu_devices", "jax_compilation_cache_dir", "jax_dump_ir_to"]
)
def test_where_a_program_is_made_and_kept_decides_nothing(name):
    assert name in jax.config.values and name not in jax_settings()
