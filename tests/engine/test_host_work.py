"""What the host does for a decode iteration, counted, not timed."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np
import pytest

from flexjax.engine.adapters import BASE, AdapterTable
from flexjax.engine.batch import Serving, forward_batch
from flexjax.engine.programs import JobShape
from flexjax.layout import SlotLayout
from flexjax.request import Request, SamplingLevel, SamplingParams
from flexjax.scheduler.output import DecodeSlot, Iteration
from flexjax.state import Dimensions
from flexjax.step_batch import forward_fields, unpack
from flexjax.steps.update import OptimizerSpec
from tests.engine.virtual_time import World
from tests.ladder import LLAMA, Model, Rig

LAYOUT = SlotLayout(2)


class Pages:
    """A page table that counts how often one of its entries is read."""

    def __init__(self, *pages):
        self.pages, self.reads = pages, 0

    def __len__(self):
        return len(self.pages)

    def __getitem__(self, index):
        self.reads += 1
        return self.pages[index]


@pytest.fixture(scope="module")
def dims() -> Dimensions:
    sizes = dict(max_rows=2, context=64 * 64, pages=99, rank_capacity=8, adapters=2, microbatch=128, window=64)
    return Dimensions(LLAMA, np.float32, **sizes, tape=("x",))


def packed_row(dims, serving: Serving, position: int, pages) -> list[int]:
    """The page table in the batch of an iteration in which row 1 decodes."""
    slots = (DecodeSlot(1, serving.request.id, position, pages),)
    rest = dict(prompts=(), windows=(), units=(), predicted=0.0, limit=None, context_tokens=0)
    iteration = Iteration(index=0, layout=LAYOUT, decode=slots, **rest)
    packed = forward_batch(dims, iteration, {serving.request.id: serving}, {}, AdapterTable(2, 8))
    return unpack(packed, forward_fields(dims, LAYOUT)).row_pages[1].tolist()


def request(number: int = 5) -> Serving:
    return Serving(Request(number, (1,), SamplingParams(), max_new_tokens=9), BASE, 0, [1])


def test_a_page_table_is_read_once_for_all_iterations_that_have_it(dims):
    serving, pages = request(), Pages(*range(10, 60))
    packed_row(dims, serving, 3136, pages)
    reads = pages.reads
    assert reads >= 50
    for position in range(3137, 3200):
        assert packed_row(dims, serving, position, pages) == [*range(10, 60), *[0] * 14]
    assert pages.reads == reads


def test_other_pages_are_packed_anew(dims):
    """The sequence has grown; then it was preempted and began again in fewer pages, one of them the same."""
    serving = request()
    for pages in ((7, 8), (7, 8, 9), (7,), (3, 4, 5)):
        assert packed_row(dims, serving, 64 * len(pages) - 1, pages) == [*pages, *[0] * (64 - len(pages))]


def test_a_program_is_described_once(monkeypatch):
    """Its shapes and shardings take longer to make than some programs take to run."""
    programs, described = Rig(Model.random(LLAMA)).programs, []
    monkeypatch.setattr(programs, "compiled", {})
    monkeypatch.setattr(programs, "_compile", lambda *_, **__: described.append(object()) or described[-1])
    job, calls = JobShape(8), 3
    for _ in range(calls):
        found = [programs.forward(LAYOUT), programs.sample(2, SamplingLevel.GREEDY, False), programs.loss(job)]
        found += [programs.backward(job), programs.update(job, OptimizerSpec()), programs.publish(job)]
    assert found == described and len(described) == 6
    assert programs.forward(SlotLayout(2, 64)) == described[-1] != programs.forward(LAYOUT)


def test_threads_that_ask_for_the_same_program_compile_it_once_and_for_others_at_the_same_time(monkeypatch):
    """Two threads ask for each of two programs; the barrier opens only when both programs are being compiled."""
    programs, both = Rig(Model.random(LLAMA)).programs, threading.Barrier(2)

    def compiled_beside_another(*_, **__):
        both.wait(timeout=60)
        return object()

    monkeypatch.setattr(programs, "compiled", {})
    monkeypatch.setattr(programs, "_compile", compiled_beside_another)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(programs.forward, [LAYOUT, SlotLayout(2, 64), LAYOUT, SlotLayout(2, 64)]))
    assert found[0] is found[2] is not found[1] is found[3]


class Instructions:
    """Counts the instructions that Python executes on all threads but this one, until it is left."""

    TOOL = sys.monitoring.PROFILER_ID

    def __enter__(self):
        self.count, here = 0, threading.get_ident()
        monitoring = sys.monitoring
        monitoring.use_tool_id(self.TOOL, "instructions")

        def executed(*_):
            self.count += threading.get_ident() != here

        monitoring.register_callback(self.TOOL, monitoring.events.INSTRUCTION, executed)
        monitoring.set_events(self.TOOL, monitoring.events.INSTRUCTION)
        return self

    def __exit__(self, *_):
        sys.monitoring.set_events(self.TOOL, 0)
        sys.monitoring.free_tool_id(self.TOOL)


def instructions_of_an_iteration(context: int) -> float:
    """Of the loop, the scheduler, the packing and the delivery, between two steps that decode two rows."""
    marks = []
    with Instructions() as executed:
        step = lambda: marks.append(executed.count) or 5e-3
        arrive = lambda world, n: world.add_request(n, 300, prompt=context)
        arrivals = [(0.0, lambda world, n=number: arrive(world, n)) for number in range(2)]
        end = (5e-3 * (2 * context // 64 + 50), lambda world: [world.loop.cancel_request(n) for n in range(2)])
        loop = World(step, lambda: 1e-3, [*arrivals, end]).run(5e-3)
    counts = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    decoding = [record.decode_slots == 2 for record in loop.records]
    first = decoding.index(True) + 2
    assert all(decoding[first : first + 20])
    return median(counts[first : first + 20])


def test_the_work_for_an_iteration_does_not_grow_with_the_context():
    """Counted is what Python executes, not what a single call copies. Contexts end at the same place
    in a page, so that no page is added meanwhile."""
    short, long = (instructions_of_an_iteration(context) for context in (64 + 10, 40 * 64 + 10))
    assert long == pytest.approx(short, rel=0.02)
