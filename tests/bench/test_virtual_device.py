"""The virtual device against measurements and closed forms, and the controller on it."""

import random

import pytest

from flexjax.bench.virtual_device import POWER_LIMITED, Roofline, VirtualDevice, tile_context, window_context
from flexjax.bench.virtual_engine import Host, TapeShape, VirtualEngine, calibrate, job_of_lengths
from flexjax.bench.virtual_figures import summary
from flexjax.layout import SlotLayout
from flexjax.scheduler import LatencyModel, Microbatch, MicrobatchCursor, Scheduler, demand, policy_from_name

SIZES = [(rows, chunk) for rows in (64, 128, 256) for chunk in (0, 256, 1024)]
LAYOUTS = [SlotLayout(rows, chunk, tape=bool(chunk)) for rows, chunk in SIZES]
SKEW = [random.Random(7).uniform(0.8, 1.25) for _ in range(11)]


def virtual(trace, jobs=1, noise=0.015, skew=SKEW, lengths=(3000, 900, 5000, 1500), pages=12_000, host=None, **policy):
    name = "co_serve" if policy else "inference_only"
    scheduler = Scheduler(LAYOUTS, pages, 256, 8192, LatencyModel(), policy_from_name(name, **policy))
    device = VirtualDevice(seed=1, noise=noise, hiccup=0.001 if noise else 0.0)
    calibrate(scheduler, device, 1024, 4096, skew)
    runs = [job_of_lengths(f"job{number}", lengths, 8192, batch_size=4) for number in range(jobs)]
    return VirtualEngine(scheduler, device, trace, runs, TapeShape(window=1024), host)


def poisson(rate, seconds, prompt, output, seed=0):
    """Exponential gaps and lengths; 16 outputs at least, since of a few tokens the mean gap is a single gap."""
    rng, at, rows = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        sizes = [min(3000, 16 + int(rng.expovariate(1 / mean))) for mean in (prompt, output)]
        rows.append({"t": at, "p": sizes[0], "o": sizes[1]})
    return rows


@pytest.mark.parametrize("rows, measured", [(8, 5.1), (64, 7.4), (256, 16.8)])
def test_decode_steps_take_what_they_took_on_a_gpu(rows, measured):
    """Milliseconds at 1,000 tokens of context, docs/performance.md."""
    assert 1e3 * Roofline().forward(SlotLayout(rows), rows * 1000, 0) == pytest.approx(measured, rel=0.15)


def test_other_programs_take_what_they_took_on_a_gpu():
    chip = Roofline()
    assert 1e3 * chip.forward(SlotLayout(64, 2048), 64_000, tile_context(0, 2048)) == pytest.approx(48.6, rel=0.1)
    assert 1e3 * chip.loss(2048) == pytest.approx(6.8, rel=0.15)
    assert 1e3 * chip.backward(2048, 0) == pytest.approx(1.65, rel=0.1)


@pytest.mark.parametrize(
    "rows, chunk, tape, measured",
    [
        *((64, 320, True, 14.08), (128, 512, True, 19.12), (64, 960, True, 27.36), (256, 1024, True, 32.87)),
        *((64, 320, False, 11.45), (512, 768, False, 29.52), (640, 640, False, 30.09), (640, 0, False, 16.04)),
    ],
)
def test_forward_steps_beside_finetuning_take_what_they_took_on_a_gpu(rows, chunk, tape, measured):
    """Milliseconds without context, docs/performance.md."""
    layout = SlotLayout(rows, chunk, tape=tape)
    assert 1e3 * POWER_LIMITED.forward(layout, 0, 0, chunk * tape) == pytest.approx(measured, rel=0.06)


def test_units_beside_finetuning_take_what_they_took_on_a_gpu():
    assert 1e3 * POWER_LIMITED.backward(2048, 0) == pytest.approx(1.64, rel=0.03)
    position = POWER_LIMITED.backward(2048, 200_000) - POWER_LIMITED.backward(2048, 0)
    assert position / 200_000 == pytest.approx(5.58e-9, rel=0.1)
    assert 1e3 * POWER_LIMITED.loss(2048) == pytest.approx(6.48, rel=0.03)


def test_context_of_segments_and_windows_by_hand():
    assert tile_context(64, 130) == 128 + 192 + 256
    microbatch = Microbatch(0, "job", (130, 64, 70), 128, 2, 0, 3, closes_group=True)
    assert [window_context(microbatch, window) for window in range(3)] == [64 + 128, 192 + 64, 64 + 128]


def test_the_scheduler_counts_the_same_context():
    microbatch = Microbatch(0, "job", (700, 64, 2000, 1), 512, 2, 0, 3, closes_group=True)
    cursor = MicrobatchCursor(microbatch)
    cursor.take_forward(10**6)
    units = [unit for unit in cursor.take_units(10**6) if unit.kind == "backward"]
    assert len(units) == 2 * microbatch.windows
    assert all(unit.context == window_context(microbatch, unit.window) for unit in units)


def test_one_request_alone_takes_its_steps_one_after_another():
    engine = virtual([{"t": 1.0, "p": 100, "o": 20}], jobs=0, noise=0.0, skew=[1.0], host=Host(0.0, 0.0))
    engine.run()
    (asked,) = engine.asked
    chip = Roofline()
    assert asked.ttft == pytest.approx(chip.forward(SlotLayout(64, 256), 0, 64 + 128), rel=1e-6)
    steps = [chip.forward(SlotLayout(64), position + 1, 0) for position in range(100, 119)]
    assert asked.times[-1] - asked.times[0] == pytest.approx(sum(steps), rel=1e-6)


def test_the_host_works_while_the_device_does():
    """It hands the next step over before the running one ends, and late enough for an arrival to be in it."""
    trace = [{"t": 0.0, "p": 100, "o": 100}, {"t": 0.3, "p": 100, "o": 1}]
    engine = virtual(trace, jobs=0, noise=0.0, skew=[1.0], host=Host(turn=1e-3))
    engine.run()
    ends = [record.start + record.seconds for record in engine.records]
    assert [record.start for record in engine.records[1:]] == pytest.approx(ends[:-1], abs=1e-9)
    late = next(number for number, record in enumerate(engine.records) if number and record.prompt_slots)
    assert engine.records[late].start - 0.3 < engine.records[late - 1].seconds


def test_a_run_repeats_and_its_figures_are_those_of_its_tokens():
    trace = poisson(4, 6, 200, 60)
    runs = [virtual(trace, objective=0.045) for _ in range(2)]
    for engine in runs:
        engine.run()
    first, second = (summary(engine, 2.0, 6.0, tpot=0.045, ttft=5.0) for engine in runs)
    assert first == second
    engine = runs[0]
    assert [len(each.times) for each in engine.asked] == [row["o"] for row in trace]
    assert all(each.times[0] > each.due and each.times == sorted(each.times) for each in engine.asked)
    tokens = sum(2.0 <= at < 6.0 for each in engine.asked for at in each.times)
    assert first["output_tokens_per_s"] == pytest.approx(tokens / 4.0)
    computed = sum(record.finetune_slots for record in engine.records)
    finished = sum(count for job in engine.jobs.values() for _, count in job.finished)
    assert 0.5 * computed < finished <= computed
    assert all(tapes + held + free == 12_000 for _, tapes, held, free in engine.memory)


@pytest.mark.parametrize(
    "rate, prompt, output, burst", [(3, 250, 250, 1), (10, 250, 200, 1), (6, 1100, 150, 1), (6, 200, 150, 4)]
)
def test_the_objective_holds_and_finetuning_takes_the_rest(rate, prompt, output, burst):
    """A burst is two seconds in five with so many times the arrivals."""
    trace = [row for row in poisson(rate * burst, 10, prompt, output, seed=rate) if burst == 1 or row["t"] % 5 < 2]
    engine = virtual(trace, objective=0.045, margin=0.05)
    engine.run()
    figures = summary(engine, 4.0, 10.0, tpot=0.045, ttft=5.0)
    assert figures["attainment"] >= 0.99
    assert figures["finetune_tokens_per_s"] > 5000
    assert figures["prediction_error_p50"] < 0.02 and figures["prediction_error_p99"] < 0.15


@pytest.mark.parametrize("objective, rate, prompt", [(0.025, 8, 250), (0.05, 6, 1100)])
def test_single_gaps_are_kept_where_they_are_the_objective(objective, rate, prompt):
    engine = virtual(poisson(rate, 10, prompt, 150, seed=2), objective=objective, margin=0.08, itl=objective, ttft=1.0)
    engine.run()
    figures = summary(engine, 4.0, 10.0, tpot=objective, ttft=1.0)
    assert figures["itl_ms_p99"] < 1e3 * objective
    assert figures["ttft_ms_p99"] < 1000
    assert figures["finetune_tokens_per_s"] > 4000


def test_finetuning_gives_way_to_a_burst_and_not_to_lasting_demand(monkeypatch):
    """62 requests a second after ten quiet seconds; with demand's longer memory shortened they are as usual."""
    later = [row | {"t": row["t"] + 10.0} for row in poisson(62, 8, 250, 200, seed=3)]
    trace, tokens, late = poisson(4, 10, 250, 200, seed=2) + later, {}, {}
    for memory in (30.0, 1.0):
        monkeypatch.setattr(demand, "LATELY_SECONDS", memory)
        engine = virtual(trace, objective=0.045, margin=0.05)
        engine.run()
        tokens[memory] = sum(record.finetune_slots for record in engine.records if 13 <= record.start < 16)
        late[memory] = sum(each.ttft > 0.5 for each in engine.asked)
    assert tokens[30.0] < 0.75 * tokens[1.0]
    assert late[30.0] == 0 < late[1.0]


def test_pages_move_to_requests_and_back():
    trace = [{"t": 2.0 + 0.01 * number, "p": 2000, "o": 100} for number in range(60)]
    engine = virtual(trace, objective=0.045, pages=4500)
    engine.run()
    engine.run(until=engine.now + 4.0)
    tapes = [held for _, held, _, _ in engine.memory]
    assert all(each.done for each in engine.asked) and engine.scheduler.statistics.preemptions == 0
    assert max(tapes) > 3000 > 1500 > min(tapes)
    engine.scheduler.check()
