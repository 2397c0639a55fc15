"""Metrics are the worst of their cases, by the definitions of docs/performance.md."""

import pytest

from flexjax.bench.kernel_cases import FULL, all_cases
from flexjax.bench.kernel_metrics import kernel_metrics, metrics_of
from scripts.make_performance_docs import TARGETS


def result(ms=1.0, flops=1.0, fraction_of_copy=0.5, cudnn=None):
    alternatives = {} if cudnn is None else {"cudnn": cudnn}
    return dict(ms=ms, flops=flops, fraction_of_copy=fraction_of_copy, alternatives=alternatives)


def test_names_are_those_of_the_targets_and_their_cases_exist():
    names = {case.name for case in all_cases(FULL, None)}
    assert [metric.name for metric in metrics_of(FULL)] == [target.metric for target in TARGETS[:6]]
    assert all(set(metric.cases) <= names for metric in metrics_of(FULL))


def test_copy_fractions_take_the_worst():
    results = {"decode 64 x 2048": result(fraction_of_copy=0.9), "decode 256 x 1024": result(fraction_of_copy=0.8)}
    assert kernel_metrics(FULL, results) == {"decode_attention_fraction_of_copy": 0.8}


def test_a_metric_without_all_its_cases_is_left_out():
    assert kernel_metrics(FULL, {"decode 64 x 2048": result()}) == {}
    assert kernel_metrics(FULL, {"chunk 2048 of 2048": result(cudnn=1.0), "chunk 8192 of 8192": result()}) == {}


def test_chunks_against_cudnn():
    results = {"chunk 2048 of 2048": result(ms=2.0, cudnn=1.0), "chunk 8192 of 8192": result(ms=4.0, cudnn=3.0)}
    assert kernel_metrics(FULL, results) == {"chunk_attention_fraction_of_cudnn": 0.5}


def test_windows_by_rate_against_cudnns_whole_backward():
    """cuDNN: 80 FLOPs in 4 ms. Ours: the window's 30 in 2 ms, the whole's 80 in 8 ms."""
    results = {
        "window_grad 2048 of 8192": result(ms=2.0, flops=30),
        "window_grad 8192 of 8192": result(ms=8.0, flops=80, cudnn=4.0),
    }
    assert kernel_metrics(FULL, results) == {"window_grad_fraction_of_cudnn_backward": pytest.approx(0.5)}
    results["window_grad 2048 of 8192"] = result(ms=5.0, flops=30)
    assert kernel_metrics(FULL, results) == {"window_grad_fraction_of_cudnn_backward": pytest.approx(0.3)}


def test_page_write_in_microseconds():
    name = next(metric.cases[0] for metric in metrics_of(FULL) if metric.name == "page_write_2048_rows_us")
    assert kernel_metrics(FULL, {name: result(ms=0.012)}) == {"page_write_2048_rows_us": pytest.approx(12.0)}
