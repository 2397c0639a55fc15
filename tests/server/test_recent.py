"""Seconds, spreads and their quantiles, against values worked out by hand."""

import math
import random

import pytest

from flexjax.request import RequestOutput, SamplingParams
from flexjax.server.recent import KEPT, Seconds, Served, Spread, quantile
from flexjax.server.timeline import ServingTotals, Timeline


def spread_of(values) -> Spread:
    found = Spread()
    for value in values:
        found.observe(value)
    return found


def test_quantiles_are_within_their_class_of_sorted_observations():
    """The nearest rank of 1,000 durations of every size from 0.1 ms to 100 s; half a class is 2.5 %."""
    draw = random.Random(3)
    values = sorted(math.exp(draw.uniform(math.log(1e-4), math.log(100.0))) for _ in range(1_000))
    halves = [spread_of(values[::2]), spread_of(values[1::2])]
    for part, rank in ((0.5, 500), (0.99, 990), (1.0, 1_000), (0.001, 1)):
        assert quantile(halves, part) == pytest.approx(values[rank - 1], rel=0.026)


def test_one_slow_token_of_a_hundred_is_not_the_99th():
    many = Spread()
    many.observe(0.01, 99)
    many.observe(5.0)
    assert quantile([many], 0.99) == pytest.approx(0.01, rel=0.026)
    many.observe(5.0)
    assert quantile([many], 0.99) == pytest.approx(5.0, rel=0.026)


def test_nothing_has_no_quantile_and_no_time_at_all_has_one():
    assert quantile([], 0.5) is None and quantile([Spread(), Spread()], 0.99) is None
    assert 0 < quantile([spread_of([0.0, -1.0])], 0.99) < 1e-5


def test_a_minute_is_kept_and_the_second_that_runs_is_not_shown():
    seconds = Seconds(list)
    for moment in (100.0, 100.9, 102.5, 160.2):
        seconds.at(moment).append(moment)
    shown = seconds.whole(161.7)
    assert len(shown) == KEPT == 60
    assert shown[1] == [102.5] and shown[-1] == [160.2] and sum(each is not None for each in shown) == 2
    assert seconds.whole(160.9)[0] == [100.0, 100.9] and seconds.whole(160.9)[-1] is None
    seconds.at(400.0)
    assert seconds.whole(401.0) == [None] * 59 + [[]]


def test_a_timeline_fills_its_seconds():
    """Arrival at 10.0; a token at 10.5, two more at 11.3, so 0.4 s each; with a last one at 12.6, 0.7 s a token."""
    totals = ServingTotals(256)
    timeline = Timeline(totals, 10.0, SamplingParams(), 1)
    for moment, tokens in ((10.5, [1]), (11.3, [1, 2, 3])):
        output = RequestOutput(0, [7], tokens)
        timeline.take(0, output, moment)
    timeline.take(0, RequestOutput(0, [7], [1, 2, 3, 4], finish_reason="stop", seated=10.25), 12.6)
    (ended,) = totals.recent.whole(13.0)[-1:]
    assert quantile([ended.tpot], 0.5) == pytest.approx(0.7, rel=0.026) and ended.tpot.counts.total() == 1
    first, second = (slot or Served() for slot in totals.recent.whole(12.0)[-2:])
    assert (first.tokens, second.tokens) == (1, 2)
    assert quantile([first.ttft], 0.5) == pytest.approx(0.5, rel=0.026) and not second.ttft.counts
    assert quantile([second.itl], 0.5) == pytest.approx(0.4, rel=0.026) and second.itl.counts.total() == 2
