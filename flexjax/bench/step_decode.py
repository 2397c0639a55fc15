"""Decode steps: milliseconds of an iteration of the engine's own loop while every row decodes, and what of it the
device needs.

A figure is the wall time of consecutive iterations by their number; scheduling, greedy sampling, reading the tokens and
delivering them are in it. ``device_ms`` is the same compiled program on a batch like theirs, dispatched back to back
without reading anything; the host gap is what the loop takes beyond that, as a share of what the loop takes.
``enqueue_ms`` is how long the host needs to pack the batch and hand the program over: a gap comes from there if it is
more than the loop's lead over the device.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np

from flexjax.bench.step_model import decode_bytes, product_parameters
from flexjax.bench.step_plan import StepCase, StepPlan
from flexjax.bench.step_setup import StepReport, StepSetup
from flexjax.bench.step_traffic import Answer, cancel, greedy, random_prompts, submit_together
from flexjax.engine.batch import Serving
from flexjax.engine.engine import Engine
from flexjax.engine.metrics import IterationRecord
from flexjax.layout import PAGE_TOKENS, SlotLayout, tiles_for
from flexjax.models.build import dtype_of
from flexjax.request import Request
from flexjax.scheduler import Iteration
from flexjax.scheduler.draft import Draft, Need
from flexjax.scheduler.output import DecodeSlot
from flexjax.weights.adapter import fresh_adapter
from flexjax.weights.peft import write_adapter

WARM_ITERATIONS = 8
"""Not counted after the last prompt."""

SPARE_ITERATIONS = 32
POLL_SECONDS = 0.02
ENQUEUES = 9
ROW_UNIT = 8
"""Layouts have a multiple of so many rows: see ``EngineConfig.row_sizes``."""


@dataclass(frozen=True)
class DecodeSpeed:
    """Times in seconds.

    Attributes:
        mean: wall time of the iterations by their number; median: of their own times.
        context: tokens that a row attends to, on average.
    """

    mean: float
    median: float
    iterations: int
    context: float


def run_decode(setup: StepSetup, cases: tuple[StepCase, ...], report: StepReport) -> None:
    """Every number of rows, in one engine; with adapters where the cases are with LoRA."""
    plan, rows = setup.plan, tuple(case.rows for case in cases)
    pages = max(rows) * (tiles_for(plan.context + plan.decode_iterations) + 1) + PAGE_TOKENS
    sizes = tuple(dict.fromkeys(-(-each // ROW_UNIT) * ROW_UNIT for each in rows))
    config = setup.engine_config(cases[0], row_sizes=sizes, max_rows=sizes[-1], pages=pages)
    with Engine(config, report.show) as engine:
        report.describe(engine)
        lora = cases[0].kind == "decode_lora8"
        adapters = load_adapters(engine, plan.adapters, plan.rank, setup.folder) if lora else (None,)
        for case in cases:
            speed = decode_speed(engine, plan, case.rows, adapters)
            alone = engine.loop.call(device_seconds, engine, case.rows, speed, adapters)
            report_decode(report, engine, case, speed, *alone)


def report_decode(
    report: StepReport, engine: Engine, case: StepCase, speed: DecodeSpeed, device: float, enqueue: float
) -> None:
    gap = max(0.0, 1 - device / speed.mean)
    itemsize = np.dtype(dtype_of(engine.config.dtype)).itemsize
    report.add(
        dict(zip(case.metrics, (1e3 * speed.mean, gap), strict=False)),
        case.name,
        f"{case.rows} rows, context {speed.context:.0f}, {speed.iterations} iterations",
        1e3 * speed.mean,
        bytes=decode_bytes(engine.model, case.rows, speed.context, itemsize),
        flops=2 * case.rows * product_parameters(engine.model),
        median_ms=1e3 * speed.median,
        device_ms=1e3 * device,
        enqueue_ms=1e3 * enqueue,
        host_gap=gap,
    )


def load_adapters(engine: Engine, count: int, rank: int, folder: Path) -> tuple[str, ...]:
    """Adapters of random factors on all modules; each has a place of its own on the device."""
    adapter, random = fresh_adapter(engine.model, rank=rank, alpha=2.0 * rank), np.random.default_rng(1)
    filled = lambda b: random.standard_normal(b.shape, np.float32) * 1e-3
    adapter = adapter.with_weights({name: (a, filled(b)) for name, (a, b) in adapter.weights.items()})
    write_adapter(folder / "adapter", adapter)
    names = tuple(f"adapter-{number}" for number in range(count))
    for name in names:
        engine.load_adapter(name, folder / "adapter")
    return names


def decode_speed(engine: Engine, plan: StepPlan, rows: int, adapters: Sequence[str | None]) -> DecodeSpeed:
    """Fill all rows, wait until enough iterations have decoded them all and nothing else, and end the requests.

    Prompts are computed one after another, so rows that begin early are longer in the end; prompts are so much shorter
    than ``plan.context`` that the mean is about that.
    """
    wanted = WARM_ITERATIONS + plan.decode_iterations
    filling = rows * tiles_for(plan.context) * PAGE_TOKENS // engine.config.chunk_sizes[-1]
    length = max(1, plan.context - plan.decode_iterations // 2 - filling // 2)
    output = min(2 * filling + wanted + SPARE_ITERATIONS, engine.config.max_model_len - length)
    last_before = last_index(engine)
    prompts = random_prompts([length] * rows, engine.model.vocab_size, seed=rows)
    answers = submit_together(engine, prompts, [output] * rows, adapters)
    records = steady_records(engine, rows, last_before, wanted, answers)
    cancel(engine, answers)
    if len(records) < wanted:
        raise RuntimeError(
            f"{rows} rows decoded together in {len(records)} iterations only, {wanted} are wanted; raise pages, "
            "max_model_len or chunk_sizes, or lower decode_iterations"
        )
    timed = records[WARM_ITERATIONS:wanted]
    mean = (timed[-1].end - timed[0].start) / len(timed)
    context = fmean(each.context_tokens for each in timed) / rows
    return DecodeSpeed(mean, median(each.seconds for each in timed), len(timed), context)


def last_index(engine: Engine) -> int:
    records = engine.loop.records
    return records[-1].index if records else -1


def steady_records(
    engine: Engine, rows: int, after: int, wanted: int, answers: Sequence[Answer]
) -> list[IterationRecord]:
    """Consecutive iterations in which all rows decode and nothing else happens: as many as are wanted, or, once an
    answer has ended, as there are."""
    steady: list[IterationRecord] = []
    while len(steady) < wanted:
        ended = any(answer.ended for answer in answers)
        for record in records_after(engine, after):
            if record.decode_slots == rows and not record.prompt_slots:
                steady.append(record)
            elif not ended:
                steady.clear()
            after = record.index
        if ended:
            break
        time.sleep(POLL_SECONDS)
    return steady


def records_after(engine: Engine, index: int) -> list[IterationRecord]:
    """Records of iterations after ``index``; the engine's thread only ever appends to the end."""
    kept, found = engine.loop.records, []
    for place in reversed(range(len(kept))):
        record = kept[place]
        if record.index <= index:
            break
        found.append(record)
    return found[::-1]


def device_seconds(
    engine: Engine, rows: int, speed: DecodeSpeed, adapters: Sequence[str | None]
) -> tuple[float, float]:
    """Seconds of the decode program alone, and of the host to pack its batch and enqueue it behind nothing. On the
    engine's thread, when no request runs: it writes into pages."""
    layout, enqueues = decode_layout(engine, rows, speed, adapters), []
    iteration, serving = decode_iteration(engine, layout, round(speed.context), adapters)
    dispatch = lambda: engine.loop.runner.dispatch_forward(iteration, serving, {}, engine.adapters).fence
    for _ in range(ENQUEUES):
        started = time.perf_counter()
        fence = dispatch()
        enqueues.append(time.perf_counter() - started)
        fence.block_until_ready()
    started = time.perf_counter()
    for _ in range(speed.iterations):
        fence = dispatch()
    fence.block_until_ready()
    return (time.perf_counter() - started) / speed.iterations, median(enqueues)


def decode_layout(engine: Engine, rows: int, speed: DecodeSpeed, adapters: Sequence[str | None]) -> SlotLayout:
    """The layout that the scheduler takes for such an iteration."""
    need = Need(rows=rows, row_context=round(rows * speed.context), adapters=any(adapters))
    return Draft(0, engine.scheduler.layouts, engine.scheduler.latency).layout_for(need)


def decode_iteration(
    engine: Engine, layout: SlotLayout, context: int, adapters: Sequence[str | None]
) -> tuple[Iteration, dict[int, Serving]]:
    """An iteration in which every row decodes at the same position, its pages anywhere; and its requests."""
    dims, needed = engine.loop.runner.programs.dims, tiles_for(context)
    pages = np.random.default_rng(0).permutation(dims.pages)[: layout.rows * needed].reshape(layout.rows, needed)
    slots = tuple(DecodeSlot(row, row, context - 1, tuple(own.tolist())) for row, own in enumerate(pages))
    versions = [engine.adapters.find(adapters[row % len(adapters)]) for row in range(layout.rows)]
    request = lambda row: Request(row, (0,) * (context - 1), greedy(2), 2)
    serving = {row: Serving(request(row), version, row, []) for row, version in enumerate(versions)}
    return Iteration(0, layout, slots, (), (), (), 0.0, None, layout.rows * context), serving
