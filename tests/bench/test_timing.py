"""A call is timed with its own data, its share of a round, and a state that goes through all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.bench import timing
from flexjax.bench.ceilings import TINY, Ceilings, measure_ceilings
from flexjax.bench.timing import time_calls


def test_state_goes_through_every_call_and_the_first_output_comes_back(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    rows = jnp.arange(6.0).reshape(3, 2)
    call = lambda count, rows, index: (count + 1, rows[index] * 10)
    timed = time_calls(call, 3, jnp.zeros(()), rows)
    assert timed.state == 3 * (timing.WARM_UPS + timing.REPEATS)
    np.testing.assert_array_equal(timed.output, rows[0] * 10)
    assert 0 < timed.best <= timed.median


def test_the_time_is_that_of_one_call(monkeypatch):
    """A clock that says 6 s for every round: with 3 calls a round, 2 s a call."""
    clock = iter(np.arange(0.0, 1000.0, 6.0).tolist())
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    timed = time_calls(lambda state, x, index: (state, x + index), 3, (), jnp.zeros(2))
    assert (timed.best, timed.median) == (2.0, 2.0)


@pytest.mark.parametrize(("seconds", "best"), [((6.0, 3.0), 3.0), ((3.0, 6.0), 3.0), ((60.0, 3.0), 60.0)])
def test_short_calls_take_the_faster_launch(monkeypatch, seconds, best):
    """By a stand-in for the clock: the first way to launch takes the first time, and so on."""
    taken = iter(seconds)
    stand_in = lambda program, calls, state, arguments: timing.Timed(state + 1, None, *[next(taken)] * 2)
    monkeypatch.setattr(timing, "time_program", stand_in)
    monkeypatch.setattr(timing, "LAUNCHES", {jax.default_backend(): ({}, {})})
    monkeypatch.setattr(timing, "SHORT", 30.0)
    timed = time_calls(lambda state, x, index: (state, x), 1, 0, ())
    assert timed.best == best
    assert timed.state == (2 if seconds[0] < 30 else 1)  # the newest: an older one has been donated


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    measured = measure_ceilings(TINY)
    assert measured.copy > 1e6 and measured.product > 1e6


@pytest.mark.parametrize(
    ("bytes", "flops", "seconds", "bound"), [(100, 10, 10.0, "copy"), (10, 1000, 20.0, "product"), (10, 0, 1.0, "copy")]
)
def test_the_ceiling_that_binds(bytes, flops, seconds, bound):
    ceilings = Ceilings(copy=10.0, product=50.0)
    assert ceilings.least_seconds(bytes, flops) == seconds
    assert ceilings.bound(bytes, flops) == bound
