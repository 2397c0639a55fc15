"""Percentiles against numpy's, and by hand where numpy has no answer."""

import math

import numpy as np
import pytest

from flexjax.bench.percentiles import percentile, percentiles


@pytest.mark.parametrize("count", [1, 2, 10, 101])
def test_percentiles_are_numpys(count):
    values = np.random.default_rng(count).exponential(size=count)
    expected = np.percentile(values, [50, 90, 99])
    assert list(percentiles(values.tolist()).values()) == pytest.approx(expected.tolist())
    assert [percentile(values.tolist(), percent) for percent in (50, 90, 99)] == pytest.approx(expected.tolist())


def test_what_was_not_measured_is_left_out():
    assert percentile([3.0, None, 1.0], 50) == 2.0 and percentiles([None, 4.0])["p99"] == 4.0
    assert percentile([None], 50) is None is percentiles([])


def test_infinite_values_are_values():
    """Of five values rank 3.6 is asked for: on the way from 4 to infinity nothing is finite."""
    values = [1.0, 2.0, 3.0, 4.0, math.inf]
    assert percentile(values, 50) == 3.0 and percentile(values, 90) == math.inf
    assert percentile([math.inf] * 3, 50) == math.inf
