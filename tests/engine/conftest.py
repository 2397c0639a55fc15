"""Engines on a tiny random model, shared by the tests of this folder where they leave no trace."""

from collections.abc import Callable, Iterator

import pytest

from flexjax.config import EngineConfig
from flexjax.engine.engine import Engine
from flexjax.finetuning.job import FinetuneJob
from tests.tiny_model import ENGINE, write_tiny_model

ROWS = tuple(
    {"prompt": f"{a} and {b} make", "completion": f" {a + b} of them, said number {a}!"}
    for a in range(4)
    for b in range(4)
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def new_engine(tiny_model, compilation_cache) -> Callable[..., Engine]:
    """Starts an engine; its compiled programs are shared with the others through the persistent cache."""

    def start(**settings) -> Engine:
        own = {"model": str(tiny_model), "compilation_cache": compilation_cache}
        return Engine.from_config(EngineConfig(**{**ENGINE, **own, **settings}))

    return start


@pytest.fixture(scope="module")
def engine(new_engine) -> Iterator[Engine]:
    with new_engine() as engine:
        yield engine
        engine.loop.call(engine.scheduler.check)
        statistics = engine.scheduler.statistics
        assert statistics.free_pages + statistics.cached_pages == statistics.pages, "pages are still held"


def job(name: str, **settings) -> FinetuneJob:
    """A short finetuning job on the rows above."""
    defaults = dict(data=list(ROWS), rank=4, alpha=8, learning_rate=1e-2, batch_size=8, schedule="constant", epochs=2)
    return FinetuneJob(name=name, **{**defaults, **settings})
