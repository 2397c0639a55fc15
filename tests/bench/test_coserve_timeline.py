"""Rates second by second and memory by kind, from outcomes made by hand."""

from types import SimpleNamespace

import pytest

from flexjax.bench.coserve_metrics import Felt, Useful
from flexjax.bench.coserve_run import Outcome
from flexjax.bench.coserve_timeline import timeline
from flexjax.bench.coserve_trace import Trace, TraceRow
from flexjax.bench.coserve_watch import PoolSample, PoolWatch, memory_metrics, name_of
from flexjax.bench.plots import plot_rates
from flexjax.memory import MemoryPlan

PLAN = MemoryPlan(
    limit=10**9, fixed=(("weights", 4 * 10**6), ("temporaries (2 jobs)", 10**6)), page_bytes=10**6, pages=10
)
SAMPLES = (PoolSample(-0.2, 0, 4, 6, 0, 0), PoolSample(1.5, 3, 6, 1, 2, 1), PoolSample(2.2, 5, 0, 5, 3, 0))


@pytest.fixture
def outcome() -> Outcome:
    """Two requests, answered in the first three seconds; 40 useful tokens by 0.5 s and 60 more by 2.5 s."""
    rows = (TraceRow(0, 0.2, 5, 2), TraceRow(1, 1.4, 5, 3))
    felt = (Felt(0.2, 2, (0.3, 0.9), True), Felt(1.4, 3, (1.6, 2.1, 2.2), True))
    useful = (Useful(-0.5, 10, 10), Useful(0.5, 40, 40), Useful(2.5, 60, 60))
    return Outcome(Trace("x", "x", rows), felt, (), useful, SAMPLES, (), 0, None, None)


def test_rates_second_by_second(outcome):
    found = timeline(outcome, page_bytes=2 * 10**6)
    assert found["seconds"] == [0.0, 1.0, 2.0]
    assert found["arrivals"] == [1, 1, 0] and found["output_tokens"] == [2, 1, 2]
    # 40 tokens take the second from -0.5 to 0.5 s, then 60 take the two to 2.5 s; after that nothing has ended
    assert found["finetune_tokens"] == [20 + 15, 30, 15]


def test_memory_is_as_last_seen(outcome):
    found = timeline(outcome, page_bytes=2 * 10**6)
    assert found["memory_mb_requests"] == [0, 6, 10] and found["memory_mb_finetuning"] == [8, 12, 0]
    assert found["memory_mb_free"] == [12, 2, 10] and found["running"] == [0, 2, 3] and found["waiting"] == [0, 1, 0]


def test_memory_by_kind():
    found = memory_metrics(SimpleNamespace(memory_plan=PLAN), SAMPLES)
    assert found["memory_mb_weights"] == 4 and found["memory_mb_temporaries"] == 1 and found["memory_mb_pool"] == 10
    assert found["memory_mb_finetuning_mean"] == pytest.approx(10 / 3) and found["memory_mb_finetuning_most"] == 6
    assert found["memory_mb_requests_most"] == 5 and found["memory_mb_free_mean"] == 4
    assert name_of("adapter masters, moments and gradients") == "adapter_masters_moments_and_gradients"


def test_pages_belong_to_finetuning_to_requests_or_to_nobody():
    """Ten pages, of which three are a tape's and five could be had."""
    statistics = SimpleNamespace(pages=10, available_pages=5, tape_pages=3, running=2, waiting=7)
    loop = SimpleNamespace(call=lambda command: command(), clock=lambda: 3.0)
    with PoolWatch(SimpleNamespace(scheduler=SimpleNamespace(statistics=statistics), loop=loop)) as watch:
        pass
    assert watch.samples[0] == PoolSample(3.0, requests=2, finetuning=3, free=5, running=2, waiting=7)


def test_the_picture_has_every_column(outcome, tmp_path):
    figure = plot_rates(tmp_path / "x.png", timeline(outcome, page_bytes=10**6))
    labels = [axes.get_ylabel().replace("\n", " ") for axes in figure.axes]
    assert labels == ["requests arriving / s", "output tokens / s", "finetuning tokens / s", "pages, GB"]
    finetuning = figure.axes[2].patches[0].get_data().values
    assert list(finetuning) == [35, 30, 15] and (tmp_path / "x.png").stat().st_size > 1000
