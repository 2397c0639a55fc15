"""Metrics of a co-serving run against figures worked out by hand."""

import math

import pytest

from flexjax.bench.coserve_metrics import (
    Felt,
    Objective,
    Useful,
    finetune_metrics,
    output_rate,
    prediction_metrics,
    request_metrics,
    steady_finetune_metrics,
    useful_tokens,
)
from flexjax.engine.metrics import IterationRecord, SettledMicrobatch

TPOT = Objective("tpot", per_token=0.045, ttft=5.0)
GOOD = Felt(due=10.0, asked=3, times=(10.1, 10.14, 10.18), ended=True)
SHORT = Felt(due=10.0, asked=1, times=(11.0,), ended=True)


def record(index, start, seconds, predicted) -> IterationRecord:
    counts = dict.fromkeys(("decode_slots", "prompt_slots", "finetune_slots", "loss_units", "backward_units"), 0)
    return IterationRecord(index, start, seconds, predicted, None, **counts, updates=0, inference_share=1.0)


@pytest.mark.parametrize(
    "felt, content",
    [
        (GOOD, True),
        (SHORT, True),  # it has no time per later token
        (Felt(10.0, 1, (15.0,), True), False),  # the first token took 5 s, not less
        (Felt(10.0, 3, (10.1, 10.145, 10.191), True), False),  # 45.5 ms per token
        (Felt(10.0, 3, (10.1, 10.12, 10.189), True), True),  # one gap of 69 ms, but 44.5 on average
        (Felt(10.0, 4, (10.1, 10.14, 10.18), False), False),  # unfinished
        (Felt(10.0, 4, (10.1, 10.14, 10.18), True), False),  # a token is missing
        (Felt(10.0, 1, (), False), False),  # refused
    ],
)
def test_who_is_content_with_a_mean_time_per_token(felt, content):
    assert TPOT.attained(felt) is content


def test_who_is_content_with_gaps():
    """101 gaps: one long gap is the hundredth percentile, two reach the 99th."""
    objective = Objective("itl", per_token=0.05, ttft=1.0)

    def answer(long: int) -> Felt:
        gaps, times = [0.06] * long + [0.01] * (101 - long), [0.5]
        for gap in gaps:
            times.append(times[-1] + gap)
        return Felt(0.0, 102, tuple(times), True)

    assert objective.attained(answer(1)) and not objective.attained(answer(2))
    assert not Objective("itl", 0.05, 0.4).attained(answer(0))
    assert objective.attained(SHORT) is False  # 1 s to its first token


def test_metrics_of_requests():
    slow = Felt(due=0.0, asked=3, times=(2.0, 2.1, 2.4), ended=True)
    found = request_metrics([GOOD, slow], TPOT)
    assert found["ttft_ms_p50"] == pytest.approx((100 + 2000) / 2)
    assert found["ttft_ms_p99"] == pytest.approx(100 + 0.99 * 1900)
    assert found["tpot_ms_p50"] == pytest.approx((40 + 200) / 2)
    assert found["itl_ms_p50"] == pytest.approx((40 + 100) / 2)  # gaps 40, 40, 100, 300
    assert found["itl_ms_p90"] == pytest.approx(100 + 0.7 * 200)
    assert found["max_gap_ms_p99"] == pytest.approx(40 + 0.99 * 260)
    assert (found["attainment"], found["requests"], found["unfinished"], found["objective_held"]) == (0.5, 2, 0, 0.0)


def test_a_request_that_never_came_back_is_a_miss_and_no_good_figure():
    lost = Felt(due=0.0, asked=3, times=(), ended=False)
    found = request_metrics([GOOD] * 9 + [lost], TPOT)
    assert found["attainment"] == 0.9 and found["unfinished"] == 1
    assert found["ttft_ms_p50"] == pytest.approx(100) and math.isinf(found["ttft_ms_p99"])
    assert math.isinf(found["tpot_ms_p99"]) and found["objective_held"] == 0.0


def test_an_objective_for_gaps_is_held_by_the_percentiles_over_all():
    objective = Objective("itl", per_token=0.05, ttft=1.0)
    assert request_metrics([GOOD], objective)["objective_held"] == 1.0
    assert request_metrics([GOOD, Felt(0.0, 1, (1.5,), True)], objective)["objective_held"] == 0.0


def test_tokens_count_when_they_come():
    assert output_rate([GOOD, SHORT], 10.12, 11.0) == pytest.approx(3 / 0.88)


def test_useful_tokens_count_once_when_their_backward_pass_ends():
    """Iterations of 1 s; microbatches of 100, 60 and 10 tokens end in iterations 4, 6 and 6; the one that is to end in
    iteration 9 has not."""
    settled = [SettledMicrobatch("job", *each) for each in ((4, 100, 90), (6, 60, 60), (6, 10, 1, True), (9, 500, 500))]
    useful = useful_tokens(settled, {index: index + 1.0 for index in range(8)})
    assert useful == [Useful(5.0, 100, 90, job="job"), Useful(7.0, 60, 60, job="job"), Useful(7.0, 10, 1, True, "job")]
    found = finetune_metrics(useful, 5.0, 9.0)  # what ends at the beginning belongs to the time before
    rates = {"finetune_tokens_per_s": 70 / 4, "finetune_loss_tokens_per_s": 61 / 4}
    assert found == {**rates, "finetune_lean_share": 10 / 70}
    assert finetune_metrics(useful, 4.0, 6.0)["finetune_tokens_per_s"] == 50


def test_finetuning_alone_counts_from_one_end_to_another():
    useful = [Useful(1.0, 70, 7), Useful(3.0, 50, 5), Useful(5.0, 30, 3)]
    rates = {"finetune_tokens_per_s": 20, "finetune_loss_tokens_per_s": 2}
    assert steady_finetune_metrics(useful) == {**rates, "finetune_lean_share": 0}
    with pytest.raises(RuntimeError, match="1 microbatches.*alone_seconds"):
        steady_finetune_metrics(useful[:1])


def test_prediction_errors():
    records = [record(0, 0.0, 0.1, 0.11), record(1, 0.1, 0.2, 0.1), record(2, 0.3, 0.1, None)]
    found = prediction_metrics(records)
    assert found["prediction_error_p50"] == pytest.approx(0.3)
    assert found["prediction_error_p99"] == pytest.approx(0.1 + 0.99 * 0.4)
    assert prediction_metrics(records[2:]) == {}
