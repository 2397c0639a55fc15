"""The report against figures worked out by hand."""

import json

import pytest

from flexjax.bench.report import (
    IterationRecord,
    finetune_tokens_per_second,
    iteration_summary,
    loss_summary,
    read_records,
    request_summary,
    shared_fraction,
    write_report,
)


def record(index: int, start: float, seconds: float, **fields) -> IterationRecord:
    idle = {"predicted": None, "limit": None, "decode_slots": 0, "prompt_slots": 0, "finetune_slots": 0}
    idle |= {"loss_units": 0, "backward_units": 0, "updates": 0, "inference_share": 0.0}
    return IterationRecord(index=index, start=start, seconds=seconds, **(idle | fields))


RUN = [
    record(0, 0.0, 1.0, prompt_slots=128, inference_share=1.0, limit=2.0, predicted=1.5),
    record(
        1, 1.0, 2.0, decode_slots=3, prompt_slots=1, finetune_slots=64, inference_share=0.5, limit=2.0, predicted=2.0
    ),
    record(2, 3.0, 3.0, finetune_slots=192, limit=2.0, predicted=2.4),
    record(3, 6.0, 1.0, decode_slots=3, backward_units=4, inference_share=0.25, limit=None),
    record(4, 9.0, 1.0, decode_slots=1, inference_share=1.0, limit=2.0),
]


def test_split_of_one_iteration():
    assert RUN[1].split == pytest.approx((0.75, 0.25, 1.0))
    assert RUN[2].split == (0.0, 0.0, 3.0)
    assert sum(RUN[3].split) == RUN[3].seconds


def test_summary_of_a_run_worked_out_by_hand():
    summary = iteration_summary(RUN)
    assert summary["elapsed_seconds"] == 10.0
    assert summary["decode_seconds"] == pytest.approx(0.75 + 0.25 + 1.0)
    assert summary["prompt_seconds"] == pytest.approx(1.0 + 0.25)
    assert summary["finetune_seconds"] == pytest.approx(1.0 + 3.0 + 0.75)
    assert summary["over_limit_fraction"] == 1 / 4
    assert summary["prediction_error"] == pytest.approx((0.5 + 0.0 + 0.2) / 3)
    assert (summary["finetune_tokens"], summary["backward_units"]) == (256, 4)
    assert shared_fraction(RUN) == 64 / 256
    assert finetune_tokens_per_second(RUN) == pytest.approx(256 / 6)  # from 1 s, the first that finetuned, to 7 s


def test_a_run_without_anything():
    summary = iteration_summary([])
    assert summary["iterations"] == 0 and summary["iteration_seconds"] is None
    assert finetune_tokens_per_second(RUN[4:]) == 0.0 and shared_fraction([]) == 0.0
    assert request_summary([])["ttft"] is None and loss_summary([])["last"] is None


def test_requests_that_were_not_measured_are_left_out():
    requests = [
        {"ttft": 0.5, "tpot": 0.1, "output_tokens": 4, "finish_reason": "stop"},
        {"ttft": 1.5, "tpot": None, "output_tokens": 1, "finish_reason": "length"},
        {"finish_reason": None},
    ]
    summary = request_summary(requests)
    assert summary["ttft"]["p50"] == 1.0 and summary["tpot"]["p99"] == 0.1
    assert summary["finish_reasons"] == {"None": 1, "length": 1, "stop": 1}
    assert (summary["requests"], summary["output_tokens"]) == (3, 5)


def test_loss_summary_averages_both_ends():
    assert loss_summary([5.0, 3.0] + [2.0] * 20 + [1.0] * 5) == {"steps": 27, "first": 14 / 5, "last": 1.0}


def test_the_file_is_json_holds_everything_and_can_be_read_back(tmp_path):
    path = tmp_path / "new" / "report.json"
    requests = [{"id": 7, "ttft": 0.5, "note": "kept"}]
    written = write_report(path, {"model": "m"}, RUN, requests, [2.0, float("nan")], [(1, 2.5)], {"tight": {"a": 1}})
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert report == written
    assert read_records(report) == RUN
    assert report["losses"] == [2.0, None] and report["validation"] == [{"step": 1, "loss": 2.5}]
    assert report["requests"] == requests and report["config"] == {"model": "m"} and report["tight"] == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
