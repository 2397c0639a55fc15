"""Layouts that come while the engine runs: when they are used first. Nothing is compiled; commands run at once."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from flexjax.config import EngineConfig
from flexjax.engine.compilation import LayoutOffer
from flexjax.engine.layouts import LayoutCatalog
from flexjax.request import Request, SamplingParams
from flexjax.scheduler import LatencyModel, Scheduler, policy_from_name
from flexjax.state import Dimensions
from flexjax.step_batch import forward_fields, host_batch
from tests.ladder import LLAMA

CONFIG = EngineConfig(model="none", max_rows=8, row_sizes=(2, 8), chunk_sizes=(64,), policy="inference_only")
SIZES = dict(max_rows=8, context=64, pages=9, rank_capacity=8, adapters=2, microbatch=64, window=64, tape=("x",))
DIMS = Dimensions(LLAMA, np.float32, **SIZES)


class Place:
    """An offer, the scheduler it serves, and a runner that notes what ran and then lets something happen."""

    def __init__(self):
        catalog = LayoutCatalog(CONFIG)
        policy = policy_from_name("inference_only")
        self.scheduler = Scheduler(catalog.layouts, 8, 8, 64, LatencyModel(), policy)
        self.ran, self.happens = [], lambda: None
        there = lambda *_: SimpleNamespace(stored=True, seconds=0.0)
        self.programs = SimpleNamespace(lowering=nullcontext(), forward=there, sample=there, dims=DIMS)
        loop = SimpleNamespace(call=lambda command, *given: command(*given), scheduler=self.scheduler, runner=self)
        self.before, self.catalog = set(catalog.layouts), catalog
        self.offer = LayoutOffer(catalog, self.programs, loop, lambda line: None)

    def forward(self, layout, packed, sampling):
        assert layout not in self.scheduler.layouts, "it could have been chosen before"
        np.testing.assert_array_equal(packed, host_batch(forward_fields(DIMS, layout))[0])
        assert not sampling.packed[: layout.rows].any(), "a row would sample"
        self.ran.append(layout)
        self.happens()
        return SimpleNamespace(tokens=np.zeros(layout.rows, np.int32))

    def ask(self) -> None:
        self.scheduler.add_request(Request(1, (7,) * 3, SamplingParams(), 4))

    @property
    def new(self) -> set:
        return set(self.scheduler.layouts) - self.before


@pytest.fixture
def place() -> Place:
    return Place()


def test_layouts_are_used_once_before_they_can_be_chosen(place):
    place.offer.adapters()
    assert len(place.ran) == 4 and set(place.ran) == place.new
    place.offer.adapters()
    assert len(place.ran) == 4


def test_nobody_waits_for_first_uses(place):
    """Whoever comes meanwhile waits for one; what is left is used first when it is needed."""
    place.happens = place.ask
    place.offer.adapters()
    assert len(place.ran) == 1 and len(place.new) == 4
    place.offer.jobs(dropout=True)
    assert len(place.ran) == 1 and {each.tape for each in place.new} == {False, True}
