"""The pictures are PNG files that hold what they should; how they look, people judge."""

import matplotlib.image
import numpy as np
import pytest

from flexjax.bench.plots import MOST_BINS, average, plot_iterations, plot_losses, smoothed, spans
from flexjax.bench.report import IterationRecord


def run_of(count: int, seconds: float = 0.05, pause_after: int = -1) -> list[IterationRecord]:
    """Iterations that decode 4 rows in half of their time and finetune 64 tokens in the other half."""
    records, start = [], 0.0
    for index in range(count):
        records.append(IterationRecord(index, start, seconds, seconds, 0.06, 4, 0, 64, 0, 1, 0, 0.5))
        start += seconds + (5.0 if index == pause_after else 0.0)
    return records


def assert_picture(path) -> None:
    """A PNG of more than one colour."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_iterations_are_drawn_however_many(tmp_path, count):
    figure = plot_iterations(tmp_path / "made" / "iterations.png", run_of(count), objective=0.06)
    assert_picture(tmp_path / "made" / "iterations.png")
    time, rows, tokens = figure.axes
    labels = [text.get_text() for text in time.get_legend().get_texts()]
    assert labels == ["decoding", "prompts", "finetuning", "slowest iteration", "objective, 60 ms"]
    assert [line.get_ydata()[0] for line in time.lines] == [pytest.approx(60.0)]
    decode, prompt, finetune = (time.patches[part].get_data() for part in range(3))
    assert len(decode.values) == min(max(count, 1), MOST_BINS)
    if count:
        np.testing.assert_allclose(decode.values, 25.0)
        np.testing.assert_allclose(prompt.values, 25.0)  # nothing on top of decoding
        np.testing.assert_allclose(finetune.values, 50.0)
        np.testing.assert_allclose(rows.patches[0].get_data().values, 4.0)
        np.testing.assert_allclose(tokens.patches[0].get_data().values, 64 / 0.05)


def test_without_an_objective_no_line_is_drawn(tmp_path):
    time = plot_iterations(tmp_path / "iterations.png", run_of(5)).axes[0]
    assert len(time.lines) == 0 and len(time.get_legend().get_texts()) == 4


def test_one_slow_iteration_does_not_flatten_the_rest(tmp_path):
    records = run_of(2000)
    records[10] = IterationRecord(10, records[10].start, 9.0, None, None, 4, 0, 0, 0, 0, 0, 1.0)
    time = plot_iterations(tmp_path / "iterations.png", records, objective=0.06).axes[0]
    assert time.get_ylim()[1] == pytest.approx(60 * 1.25)


def test_spans_keep_all_time_and_leave_pauses_empty():
    records = run_of(400, pause_after=200)
    edges, bins = spans(records)
    assert sum(share for inside in bins for _, share in inside) == pytest.approx(400 * 0.05)
    pause = [
        inside for left, right, inside in zip(edges[:-1], edges[1:], bins, strict=True) if left > 10.1 and right < 15
    ]
    assert len(pause) > 10 and not any(pause)
    assert average([], lambda record: 1.0) == 0.0


@pytest.mark.parametrize("steps", [0, 1, 12, 200])
def test_losses_are_drawn(tmp_path, steps):
    losses = (2 + np.random.default_rng(0).normal(size=steps)).tolist()
    figure = plot_losses(tmp_path / "losses.png", losses, [(1, 2.2), (5, 1.9)])
    assert_picture(tmp_path / "losses.png")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), losses)
    np.testing.assert_array_equal(axes.lines[-1].get_xydata(), [(1, 2.2), (5, 1.9)])
    assert len(axes.lines) == (3 if steps > 20 else 2)


def test_smoothing_keeps_straight_lines_and_halves_noise():
    line = np.linspace(3, 1, 160)
    np.testing.assert_allclose(smoothed(line), line)
    noise = np.random.default_rng(1).normal(size=160)
    assert smoothed(noise)[20:-20].std() < noise.std() / 2
