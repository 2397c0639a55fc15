"""Models, engines that serve them, and the way to ask the other Python for results."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from flexjax.config import EngineConfig
from flexjax.engine.engine import Engine
from flexjax.engine.programs import COMPILER_OPTIONS
from tests.dense_model import QUICK
from tests.parity.tiny_pair import MODELS, write_model
from tests.tiny_model import ENGINE

REFERENCE = Path(__file__).with_name("reference.py")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def ask_reference(tmp_path_factory) -> Callable[[list[dict]], None]:
    """Does tasks (see `reference.py`) in the Python with torch; a start takes seconds, so ask for many at once."""
    python = os.environ.get("FLEXJAX_PARITY_PYTHON")
    if not python:
        pytest.skip("FLEXJAX_PARITY_PYTHON names no Python with torch, transformers and peft: see make test-parity")

    def ask(tasks: list[dict]) -> None:
        file = tmp_path_factory.mktemp("tasks") / "tasks.json"
        file.write_text(json.dumps(tasks, default=str))
        done = subprocess.run([python, REFERENCE, file], env=os.environ | OFFLINE, capture_output=True, text=True)
        assert done.returncode == 0, f"{python} {REFERENCE.name}:\n{done.stderr}"

    return ask


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Model directories by architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, config) for name, config in MODELS.items()}


@pytest.fixture(scope="session")
def engines(ask_reference, models, tmp_path_factory) -> Iterator[dict[str, Engine]]:
    """An engine for each model; none is started where there is nothing to compare with."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setitem(COMPILER_OPTIONS, "cpu", QUICK)
        yield {name: stack.enter_context(Engine.from_config(settings(model, cache))) for name, model in models.items()}


def settings(model: Path, cache: str) -> EngineConfig:
    return EngineConfig(**ENGINE, model=str(model), compilation_cache=cache)
