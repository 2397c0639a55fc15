"""Verdicts on runs made by hand: each check passes where it should and fails for its own reason only."""

from dataclasses import replace

import pytest

from flexjax.bench.co_serving import Episode, shares
from flexjax.bench.outcome import Answer, check_all
from flexjax.engine.metrics import IterationRecord


def iterations(seconds: float, decode: int, finetune: int, count: int = 10) -> tuple[IterationRecord, ...]:
    fields = (seconds, seconds, seconds, decode, 0, finetune, 0, 1, 0, 0.25)
    return tuple(IterationRecord(index, index * seconds, *fields) for index in range(count))


def episode(seconds: float, **changes) -> Episode:
    """Ten iterations of ``seconds`` that each finetune 64 tokens beside 3 rows, and a request that felt them."""
    request = {"due": 0.0, "ttft": seconds, "tpot": seconds, "output_tokens": 9, "finish_reason": "length"}
    made = Episode(
        objective=seconds * 1.1,
        status="succeeded",
        error=None,
        records=iterations(seconds, decode=3, finetune=64),
        requests=(request,),
        losses=(4.0, 3.0, 2.0, 1.5, 1.0, 0.8, 0.6, 0.5, 0.5, 0.5),
        validation=(),
        ended=seconds * 10,
    )
    return replace(made, **changes)


RUN = episode(0.4)
TIGHTER = episode(0.2, records=iterations(0.2, decode=3, finetune=16))
ANSWERS = [Answer("Who?", "I am.", "I am.", "Ahoy! I am. — Keeper"), Answer("Why?", "So.", "So.", "Ahoy! So. — Keeper")]


def verdicts(run=RUN, tighter=TIGHTER, answers=ANSWERS) -> str:
    """One letter a check: shared, answered, loss, signed, base unsigned, TPOT, tokens; capital where it failed."""
    checks = check_all(run, tighter, answers, "Keeper")
    return "".join(c if each.passed else c.upper() for c, each in zip("salubto", checks, strict=True))


def test_a_good_run_passes_and_says_what_was_found():
    assert verdicts() == "salubto"
    found = [each.found for each in check_all(RUN, TIGHTER, ANSWERS, "Keeper")]
    # 64 tokens in 0.4 s and 16 in 0.2 s; losses: means of the first and the last five
    assert found == ["100%", "1 of 1", "2.30 to 0.58", "2 of 2", "0 of 2", "400 to 200 ms", "160 to 80 tokens/s"]


def test_finetuning_that_runs_mostly_alone_fails():
    alone = iterations(0.4, decode=0, finetune=64, count=80)
    assert verdicts(run=replace(RUN, records=RUN.records + alone)) == "Salubto"  # 10 of 90 iterations
    some = iterations(0.4, decode=0, finetune=64, count=20)
    assert verdicts(run=replace(RUN, records=RUN.records + some)) == "salubto"  # 10 of 30


@pytest.mark.parametrize("reason", ["abort", "error", None])
def test_a_lost_request_fails(reason):
    lost = {**RUN.requests[0], "finish_reason": reason}
    assert verdicts(run=replace(RUN, requests=(*RUN.requests, lost))) == "sAlubto"


@pytest.mark.parametrize("losses", [(), (2.0, 2.0, 2.0), (2.0,) * 5 + (1.3,) * 5, (1.0,) * 5 + (3.0,) * 5])
def test_a_loss_that_does_not_fall_much_fails(losses):
    assert verdicts(run=replace(RUN, losses=losses)) == "saLubto"


def test_answers_must_change_with_the_adapter_only():
    silent, early = replace(ANSWERS[0], adapter="I am."), replace(ANSWERS[0], before="Keeper")
    assert verdicts(answers=[silent, ANSWERS[1]]) == "salUbto"
    assert verdicts(answers=[silent, *ANSWERS[1:] * 3]) == "salubto"  # three of four are enough
    assert verdicts(answers=[early, ANSWERS[1]]) == "saluBto"
    assert verdicts(answers=[replace(ANSWERS[0], base="Keeper"), ANSWERS[1]]) == "saluBto"


def test_a_tighter_objective_must_show_in_both():
    slow = {**TIGHTER.requests[0], "tpot": 0.4}
    assert verdicts(tighter=replace(TIGHTER, requests=(slow,))) == "salubTo"
    assert verdicts(tighter=replace(TIGHTER, requests=())) == "salubTo"
    assert verdicts(tighter=replace(TIGHTER, records=iterations(0.2, decode=3, finetune=32))) == "salubtO"


def test_times_without_finetuning_count_until_the_job_ended():
    serving = tuple(each._replace(start=each.start + 4.0, finetune_slots=0, backward_units=0) for each in RUN.records)
    assert replace(RUN, records=RUN.records + serving, ended=8.0).tokens_per_second == pytest.approx(640 / 8)
    late = tuple(each._replace(start=each.start + 2.0) for each in RUN.records)
    assert replace(RUN, records=late, ended=6.0).tokens_per_second == pytest.approx(640 / 4)
    assert replace(RUN, records=(), ended=6.0).tokens_per_second == 0.0


def test_shares_are_of_the_last_seconds():
    old = iterations(1.0, decode=0, finetune=64, count=5)
    recent = tuple(each._replace(start=each.start + 100.0) for each in iterations(1.0, decode=3, finetune=64))
    assert shares(old + recent) == pytest.approx((0.25, 0.0, 0.75))
    assert shares(()) == (0.0, 0.0, 0.0)
