"""Counts against those of ``prometheus_client``'s own histogram."""

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st

from flexjax.server.histogram import Histogram

BOUNDS = (0.1, 0.5, 1, 2.5)


@given(st.lists(st.floats(0, 4) | st.sampled_from(BOUNDS)))
def test_it_counts_as_the_library_does(values):
    mine, theirs = Histogram(BOUNDS), prometheus_client.Histogram("t", "t", buckets=BOUNDS, registry=None)
    for value in values:
        mine.observe(value)
        theirs.observe(value)
    family = mine.family("t", "t", {})
    shown = [(each.name, each.labels, each.value) for each in family.samples]
    (expected,) = theirs.collect()
    assert shown == [(e.name, e.labels, e.value) for e in expected.samples if e.name != "t_created"]


def test_a_value_may_count_several_times():
    histogram = Histogram(BOUNDS)
    histogram.observe(0.3, 4)
    samples = {(each.name, each.labels.get("le")): each.value for each in histogram.family("t", "t", {}).samples}
    assert samples["t_count", None] == 4 and samples["t_bucket", "0.1"] == 0 and samples["t_bucket", "0.5"] == 4
    assert samples["t_sum", None] == 1.2
