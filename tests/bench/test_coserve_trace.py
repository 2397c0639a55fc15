"""Traces: read, cut, thinned, squeezed and made of recordings, against examples small enough to do by hand."""

import numpy as np
import pytest

from flexjax.bench.coserve_trace import Trace, TraceRow, read_trace, recorded_trace, shape_of
from flexjax.fields import ConfigError

LINES = """{"t": 0.5, "p": 10, "o": 3}
{"t": 4.0, "p": 7, "o": 1}

{"t": 1.5, "p": 2, "o": 40}
{"t": 2.0, "p": 5, "o": 5}
"""


@pytest.fixture
def trace(tmp_path) -> Trace:
    (tmp_path / "azure_r2_4s.jsonl").write_text(LINES)
    return read_trace(tmp_path / "azure_r2_4s.jsonl")


def test_rows_are_read_in_the_order_of_their_arrival(trace):
    assert trace.rows == (
        TraceRow(0, 0.5, 10, 3),
        TraceRow(1, 1.5, 2, 40),
        TraceRow(2, 2.0, 5, 5),
        TraceRow(3, 4.0, 7, 1),
    )
    assert (trace.name, trace.shape, trace.seconds, trace.rate, trace.longest) == ("azure_r2_4s", "azure", 4.0, 1.0, 42)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("azure_r10", "azure"),
        ("sharegpt_r20_240s", "sharegpt"),
        ("burst_sharegpt_r5_240s", "burst_sharegpt"),
        ("chat_r2.5", "chat"),
        ("r10s_things", "r10s_things"),
    ],
)
def test_a_shape_is_a_name_without_rate_and_duration(name, shape):
    assert shape_of(name) == shape


@pytest.mark.parametrize(
    "line", ['{"t": 1, "p": 3}', '{"t": -1, "p": 3, "o": 1}', '{"t": 1, "p": 3, "o": 0}', "[1]", "x"]
)
def test_a_wrong_line_is_named(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text('{"t": 0, "p": 1, "o": 1}\n' + line)
    with pytest.raises(ConfigError, match="bad.jsonl, line 2"):
        read_trace(tmp_path / "bad.jsonl")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="none.jsonl holds no requests"):
        read_trace(tmp_path / "none.jsonl")


def test_slices(trace):
    beginning = trace.first(2.0)
    assert [row.index for row in beginning.rows] == [0, 1, 2] and beginning.name == "azure_r2_4s_first2s"
    thinned = trace.without_every(2)
    assert [row.index for row in thinned.rows] == [0, 2] and thinned.name == "azure_r2_4s_without_every_2th"
    assert thinned.shape == beginning.shape == "azure"
    with pytest.raises(ConfigError, match="first 0.1 seconds.*raise seconds"):
        trace.first(0.1)


def test_every_fifth_row_left_out_is_four_fifths_of_the_rate():
    rows = tuple(TraceRow(index, 0.1 * (index + 1), 1, 1) for index in range(1000))
    whole = Trace("x", "x", rows)
    assert whole.without_every(5).rate == pytest.approx(0.8 * whole.rate, rel=0.01)


def test_another_rate_scales_arrivals_and_keeps_lengths(trace):
    fast = trace.at_rate(4.0)
    assert fast.rate == pytest.approx(4.0)
    assert [row.due for row in fast.rows] == [0.125, 0.375, 0.5, 1.0]
    assert [(row.prompt, row.output) for row in fast.rows] == [(row.prompt, row.output) for row in trace.rows]


def test_a_short_trace_begins_again(trace):
    """Four requests in 4 s at 1 request/s: the second round begins 1 s after the last arrival of the first."""
    longer = trace.lasting(7.0)
    assert [row.due for row in longer.rows] == [0.5, 1.5, 2.0, 4.0, 5.5, 6.5, 7.0]
    assert [row.index for row in longer.rows] == list(range(7))
    assert [row.due for row in trace.lasting(2.0).rows] == [0.5, 1.5, 2.0]
    assert [row.due for row in trace.lasting(0.1).rows] == [0.5]


def test_recorded_arrivals_are_squeezed_and_keep_their_bursts(tmp_path):
    """Quiet for 100 s, ten a second for 20 s, quiet again; then five times as fast."""
    times = [*range(0, 100, 10), *(second for second in range(100, 120) for _ in range(10)), *range(120, 400, 10)]
    (tmp_path / "arrivals.txt").write_text("\n".join(map(str, times)))
    (tmp_path / "lengths.csv").write_text(
        "arrival_time_s,prompt_tokens,response_tokens\n1.0,5,50\n2.0,6,60\n3.0,7,70\n"
    )
    count = len([at for at in times if at >= 50])
    made = recorded_trace("case", tmp_path / "arrivals.txt", tmp_path / "lengths.csv", 50.0, 64.0, (count - 2) / 64)
    assert len(made.rows) == count - 2 and made.seconds == pytest.approx(64.0)
    due = np.array([row.due for row in made.rows])
    assert (np.diff(due) >= 0).all() and due[0] >= 0
    # The last two arrivals are not wanted, so 50 to 370 s of the recording, or up to a second more, take 64 s. The
    # burst, 50 to 70 s into it, lies between 9.97 and 14.0 s, with at most the arrival of second 120 at its end.
    burst = (due >= 9.9) & (due <= 14.01)
    assert burst.sum() in (200, 201)
    drawn = [(row.prompt, row.output) for row in made.rows]
    assert sorted(drawn[:3]) == [(5, 50), (6, 60), (7, 70)] == sorted(drawn[3:6])
    with pytest.raises(ConfigError, match="arrivals.txt has .* lower rate"):
        recorded_trace("case", tmp_path / "arrivals.txt", tmp_path / "lengths.csv", 50.0, 70.0, 100.0)
