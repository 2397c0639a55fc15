"""Microbatches whose tapes keep less because pages are short: the same adapter comes of them, and nobody waits."""

import numpy as np
import pytest

from flexjax.engine.adapters import AdapterTable
from flexjax.engine.batch import Training, backward_batch, forward_batch
from flexjax.finetuning.packing import pack_group
from flexjax.layout import SlotLayout
from flexjax.scheduler import Iteration, MicrobatchPages, WindowSegment
from flexjax.state import KV_COLUMNS, Dimensions
from flexjax.step_batch import backward_fields, forward_fields, unpack
from tests.engine.conftest import job
from tests.engine.test_batch import example
from tests.engine.test_finetuning import difference, finished
from tests.ladder import LLAMA

RICH = ("x", "q", "attention", "mid", "gate", "up")


def dimensions(**changes) -> Dimensions:
    sizes = dict(max_rows=4, context=256, pages=99, rank_capacity=32, adapters=3, microbatch=384, window=128)
    return Dimensions(LLAMA, np.float32, **{**sizes, "tape": RICH, "lean_tape": ("x", "gate"), **changes})


def test_a_lean_tape_stands_in_columns_of_the_rich_one():
    dims = dimensions()
    rich, lean = dims.tape_layout, dims.lean.tape_layout
    assert lean.names == ("x", "gate") and dims.lean.pages_per_block < dims.pages_per_block
    assert len(dims.lean_columns) == lean.columns
    assert dims.lean_columns[: lean.span("x")] == tuple(range(rich.span("x")))
    first = rich.first_column("gate")
    assert dims.lean_columns[lean.span("x") :] == tuple(range(first, first + rich.span("gate")))


def test_a_step_is_told_only_the_pages_of_a_lean_tape_and_its_backward_units_find_them(table):
    dims, layout = dimensions(), SlotLayout(4, 128, tape=True)
    (packed,) = pack_group([example(np.arange(131) + 100)], 384, 0, 0)
    columns = dims.lean.pages_per_block
    pages = tuple(tuple(10 * block + column for column in range(columns)) for block in range(3))
    training = Training(packed, MicrobatchPages(pages, (7,), 3), table.find("x"), lean=True)
    iteration = Iteration(
        **dict(index=0, layout=layout, units=(), predicted=0.0, limit=None, context_tokens=0, decode=(), prompts=()),
        windows=(WindowSegment("job", 1, sequence=0, slot=0, start=0, length=128, block=0),),
    )
    told = unpack(forward_batch(dims, iteration, {}, {1: training}, table), forward_fields(dims, layout)).tape_pages
    assert told[0][list(dims.lean_columns)].tolist() == list(range(KV_COLUMNS, columns))
    assert (np.delete(np.asarray(told), dims.lean_columns, axis=1) == -1).all()
    unit = unpack(backward_batch(dims, training, 1, 0), backward_fields(dims.lean))
    assert unit.tape_pages[1].tolist() == list(range(10 + KV_COLUMNS, 10 + columns))


@pytest.fixture
def table():
    made = AdapterTable(adapters=3, rank_capacity=32)
    version = made.new("x", 12, 0.5)
    assert made.try_seat(version)
    made.announce(version)
    return made


def trained(engine, name: str):
    """The adapter, its losses, and which of its microbatches were lean."""
    before, handle = len(engine.trainer.settled), finished(engine.finetune(job(name)))
    return engine.adapter(name), handle.losses, [each.lean for each in engine.trainer.settled][before:]


def test_where_only_lean_tapes_find_pages_the_same_adapter_is_trained(new_engine):
    with new_engine() as engine:
        dims, ledger = engine._runner.programs.dims, engine.scheduler._ledger
        assert set(dims.lean_tape) < set(dims.tape)
        expected, losses, lean = trained(engine, "rich")
        assert lean and not any(lean)
        blocks = min(8, dims.microbatch // 64)  # eight rows to a step, none longer than a block
        left = dims.microbatch_pages(blocks) - 1
        assert left >= dims.lean.microbatch_pages(blocks)
        hold = lambda: ledger.allocate_after((), engine.scheduler.statistics.available_pages - left, 0)
        held = engine.loop.call(hold)
        assert held
        adapter, again, lean = trained(engine, "lean")
        engine.loop.call(ledger.release, held, -1)
        assert lean and all(lean)
        assert again == [pytest.approx(loss, rel=1e-4) for loss in losses]
        assert difference(expected, adapter) < 1e-3
        assert not any(trained(engine, "rich again")[2])
