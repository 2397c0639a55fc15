"""How much requests ask for, finetuning that gives way when it rises, and how fast a queue is served."""

import math

import pytest

from flexjax.layout import SlotLayout
from flexjax.scheduler import LatencyModel, policy_from_name
from flexjax.scheduler.demand import LATELY_SECONDS, NOW_SECONDS, PACE_KNOWN, Demand, Pace
from flexjax.scheduler.draft import Draft, Need
from tests.scheduler.test_policies import view

STEP = 0.04


def after(meter: Demand | Pace, start: float, seconds: float, **noted) -> float:
    """Iterations of STEP seconds that are noted alike; the time after the last one."""
    count = round(seconds / STEP)
    for index in range(count + 1):
        meter.note(start + index * STEP, **noted)
    return start + count * STEP


def test_the_means_of_steady_demand_are_its_rates():
    meter = Demand()
    after(meter, 0.0, 10 * LATELY_SECONDS, rows=30, chunk=128)
    assert meter.rows == pytest.approx(30 / STEP) and meter.chunk == pytest.approx(128 / STEP)
    assert meter.lately == pytest.approx(158 / STEP, rel=1e-3)
    assert meter.row_share == pytest.approx(30 / 158) and not meter.rises


@pytest.mark.parametrize("seconds", [0.4, 2.0, 6.0])
def test_after_a_step_the_means_have_gone_their_way_as_exponentials_do(seconds):
    meter = Demand()
    now = after(meter, 0.0, 10 * LATELY_SECONDS, rows=10, chunk=0)
    after(meter, now, seconds, rows=50, chunk=0)
    expected = lambda span: (50 - 40 * math.exp(-seconds / span)) / STEP
    assert meter.slots == pytest.approx(expected(NOW_SECONDS), rel=1e-2)
    assert meter.lately == pytest.approx(expected(LATELY_SECONDS), rel=1e-2)
    assert meter.rises


def test_high_demand_rises_no_more_after_a_while():
    meter = Demand()
    now = after(meter, 0.0, 60.0, rows=10, chunk=64)
    now = after(meter, now, 3.0, rows=40, chunk=256)
    assert meter.rises
    after(meter, now, 3 * LATELY_SECONDS, rows=40, chunk=256)
    assert not meter.rises


def test_short_and_long_iterations_count_by_their_time():
    """100 slots a second, in iterations of 10 and 90 ms."""
    meter, now = Demand(), 0.0
    for index in range(2000):
        seconds = 0.01 if index % 2 else 0.09
        meter.note(now, round(100 * seconds), 0)
        now += seconds
    assert meter.rows == pytest.approx(100, rel=1e-6)


def test_a_pause_ends_demand():
    meter = Demand()
    now = after(meter, 0.0, 5.0, rows=10, chunk=64)
    meter.note(now + 20, 1, 0)
    assert meter.slots < 10


def test_a_pace_is_unknown_until_requests_have_waited_for_a_while():
    pace = Pace()
    now = after(pace, 0.0, 10.0, tiles=4, waiting=False)
    assert pace.tiles_per_second is None, "what is taken in while nobody waits is not the most that could be"
    now = after(pace, now, PACE_KNOWN - STEP, tiles=8, waiting=True)
    assert pace.tiles_per_second is None
    now = after(pace, now, 2 * STEP, tiles=8, waiting=True)
    assert pace.tiles_per_second == pytest.approx(8 / STEP), "at once the rate, without a slow rise"
    after(pace, now, 3 * NOW_SECONDS, tiles=1, waiting=False)
    assert pace.tiles_per_second is None, "it is forgotten"


def test_a_pace_follows_its_rate_as_an_exponential_does():
    pace = Pace()
    now = after(pace, 0.0, 20.0, tiles=10, waiting=True)
    after(pace, now, 1.0, tiles=6, waiting=True)
    assert pace.tiles_per_second == pytest.approx((6 + 4 * math.exp(-1.0 / NOW_SECONDS)) / STEP, rel=1e-2)


def draft(seconds: dict[SlotLayout, float], context: int = 0) -> Draft:
    """Of layouts that take so long, whatever they read; one row decodes at position ``context``."""
    latency = LatencyModel(overhead=0.002)
    for layout, value in seconds.items():
        latency.calibrate(("forward", layout), value)
    made = Draft(0, list(seconds), latency)
    made.need = Need(rows=1, row_context=context)
    made.decode = [None]
    return made


def test_the_best_rate_is_that_of_the_fastest_layout_within_the_limit():
    small, large = SlotLayout(8, 64), SlotLayout(32, 256)
    layouts = draft({small: 0.010, large: 0.030})
    overhead = 0.002
    assert layouts.best_rate(0.0, limit=1.0) == pytest.approx(256 / (0.030 + overhead))
    assert layouts.best_rate(0.0, limit=0.02) == pytest.approx(64 / (0.010 + overhead))
    assert layouts.best_rate(1.0, limit=1.0) == pytest.approx(32 / (0.030 + overhead))
    half = min(32 / 0.5, 256 / 0.5)
    assert layouts.best_rate(0.5, limit=1.0) == pytest.approx(half / (0.030 + overhead))
    assert layouts.best_rate(0.5, limit=0.001) == 0.0


def test_finetuning_fades_while_demand_surges():
    policy = policy_from_name("co_serve", objective=0.05, margin=0.0)
    limit = lambda surge: policy.finetune(view(serving_seconds=0.02, surge=surge)).limit
    assert [limit(surge) for surge in (0.0, 0.5, 0.6, 0.7, 1.2)] == pytest.approx([0.05, 0.05, 0.035, 0.02, 0.02])
    assert policy.finetune(view(serving_seconds=0.0, surge=1.2)).limit == 0.05
    assert policy.finetune(view(serving_seconds=0.07, surge=1.2)).limit == 0.05, "never more than the limit"


def test_a_tape_that_holds_pages_requests_lack_is_finished_first_even_in_a_surge():
    policy = policy_from_name("co_serve", objective=0.05, margin=0.0)
    share = policy.finetune(view(serving_seconds=0.02, surge=1.2, pages_short=True))
    assert (share.limit, share.tiles, share.units) == (0.05, 0, None)
    queue = dict(waiting=3, rows_full=True, oldest_arrival=-60.0, serving_seconds=0.02)
    assert policy.finetune(view(**queue)).units == 0, "rows that are missed come with shorter iterations"
    assert policy.finetune(view(**queue, pages_short=True)).units is None
    gaps = policy_from_name("co_serve", objective=0.05, margin=0.0, itl=0.04)
    share = gaps.finetune(view(serving_seconds=0.01, pages_short=True))
    assert share.tiles == 0 and share.work == pytest.approx(0.03)
