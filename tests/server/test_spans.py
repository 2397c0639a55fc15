"""What ended sequences spent on what, by hand."""

import pytest

from flexjax.server.spans import Moments, size_bounds


@pytest.mark.parametrize(
    ("longest", "bounds"),
    [(1, (1,)), (9, (1, 2, 5)), (100, (1, 2, 5, 10, 20, 50, 100)), (256, (1, 2, 5, 10, 20, 50, 100, 200))],
)
def test_sizes_are_divided_at_ones_twos_and_fives(longest, bounds):
    assert size_bounds(longest) == bounds


@pytest.mark.parametrize(
    ("moments", "seconds"),
    [
        (Moments(1.0, 1.5, 3.5, 7.5, 8.0), {"e2e": 7.0, "queue": 0.5, "prefill": 2.0, "decode": 4.0, "inference": 6.0}),
        (Moments(1.0, 1.5, 3.5, 3.5, 3.5), {"e2e": 2.5, "queue": 0.5, "prefill": 2.0, "decode": 0.0, "inference": 2.0}),
        (Moments(1.0, 1.5, None, None, 3.0), {"e2e": 2.0, "queue": 0.5}),
        (Moments(1.0, None, None, None, 3.0), {"e2e": 2.0, "queue": 2.0}),
    ],
)
def test_parts_of_a_sequences_time(moments, seconds):
    """The second has one token, the third ended while its prompt was computed, the last while it waited."""
    assert moments.seconds == seconds
