"""Outcome: what a demo has to show, judged from what it measured. Plain numbers and texts in, verdicts out."""

from collections.abc import Sequence
from dataclasses import dataclass

from flexjax.bench.co_serving import Episode
from flexjax.bench.report import loss_summary

LEAST_SHARED = 0.3
"""Of the finetuning forward tokens, that share an iteration with decode rows."""

LARGEST_LAST_LOSS = 0.6
"""Of the first loss: less has visibly fallen, whatever single steps do."""

LEAST_LEARNED = 0.75
"""Of the held-out questions, that the adapter answers in the way it was taught."""


@dataclass(frozen=True)
class Answer:
    """One held-out question: the base model's answer before and after the job, and the adapter's."""

    question: str
    before: str
    base: str
    adapter: str


@dataclass(frozen=True)
class Check:
    """Something that must hold; ``found`` says what was measured."""

    claim: str
    found: str
    passed: bool


def check_all(episode: Episode, tighter: Episode, answers: Sequence[Answer], signature: str) -> list[Check]:
    """Every verdict, in the order to be shown."""
    return [
        *check_co_serving(episode),
        check_loss(episode.losses),
        *check_answers(answers, signature),
        *check_tighter(episode, tighter),
    ]


def check_co_serving(episode: Episode) -> list[Check]:
    summary = episode.summary
    shared, lost = summary["finetune_shared_fraction"], unanswered(episode)
    return [
        Check(
            f"at least {LEAST_SHARED:.0%} of finetuning forward tokens share an iteration with decode rows",
            f"{shared:.0%}",
            shared >= LEAST_SHARED,
        ),
        Check("every request was answered", f"{summary['requests'] - lost} of {summary['requests']}", not lost),
    ]


def unanswered(episode: Episode) -> int:
    return sum(each["finish_reason"] not in ("stop", "length") for each in episode.requests)


def check_loss(losses: Sequence[float]) -> Check:
    if not losses:
        return Check("the loss fell", "no optimizer step", False)
    loss = loss_summary(losses)
    fell = loss["last"] <= LARGEST_LAST_LOSS * loss["first"]
    return Check("the loss fell", f"{loss['first']:.2f} to {loss['last']:.2f}", fell)


def check_answers(answers: Sequence[Answer], signature: str) -> list[Check]:
    learned = sum(signature in each.adapter for each in answers)
    already = sum(signature in each.before or signature in each.base for each in answers)
    total = len(answers)
    return [
        Check(
            f"the adapter signs answers to held-out questions with {signature!r}",
            f"{learned} of {total}",
            learned >= LEAST_LEARNED * total,
        ),
        Check("the base model does not", f"{already} of {total}", already == 0),
    ]


def check_tighter(episode: Episode, tighter: Episode) -> list[Check]:
    """The second run is compared by medians over its requests."""
    before, after = episode.summary, tighter.summary
    rates = episode.tokens_per_second, tighter.tokens_per_second
    medians = [summary["tpot"]["p50"] if summary["tpot"] else None for summary in (before, after)]
    known = None not in medians
    return [
        Check(
            f"an objective of {tighter.objective * 1e3:.0f} instead of {episode.objective * 1e3:.0f} ms lowers TPOT",
            f"{medians[0] * 1e3:.0f} to {medians[1] * 1e3:.0f} ms" if known else "no request was measured",
            known and medians[1] < medians[0],
        ),
        Check(
            "and finetuning tokens per second",
            f"{rates[0]:.0f} to {rates[1]:.0f} tokens/s",
            rates[1] < rates[0],
        ),
    ]
