"""Importing the parts that decide must stay cheap: no jax behind the package root, configuration or scheduler."""

import subprocess
import sys
from pathlib import Path

import pytest

import flexjax

ROOT = Path(__file__).parents[1]
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "transformers", "matplotlib")


def loaded_by(statement: str) -> list[str]:
    """Heavy packages that a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import flexjax; flexjax.__version__",
        "import flexjax.config; flexjax.EngineConfig",
        "import flexjax.layout, flexjax.request; flexjax.SamplingParams, flexjax.RequestOutput",
        "import flexjax.scheduler.scheduler, flexjax.scheduler.page_pool, flexjax.scheduler.latency",
        "import flexjax.finetuning.job; flexjax.FinetuneJob",
    ],
)
def test_deciding_loads_no_jax(statement):
    assert loaded_by(statement) == []


def test_the_check_sees_jax_where_it_is():
    assert "jax" in loaded_by("import flexjax.steps.sampling")


def test_public_names_resolve():
    for name in flexjax.__all__:
        assert getattr(flexjax, name) is not None
    assert dir(flexjax) == sorted(flexjax.__all__)
    assert flexjax.Engine.__module__ == "flexjax.engine.engine"


def test_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match="no attribute 'Motor'; it has Engine, EngineConfig"):
        _ = flexjax.Motor
