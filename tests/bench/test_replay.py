"""The stream of requests against a server that the tests play themselves."""

import gc
import itertools
import threading
import weakref

import numpy as np
import pytest

from flexjax.bench.replay import SENDERS, Replay, ReplayedRequest, poisson_times, shuffled_forever
from flexjax.request import RequestOutput

PATIENCE = 20.0
"""Seconds after which a test gives up on a thread."""


class Clock:
    """A clock that moves only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def answer(tokens: int, finish_reason: str | None = None) -> RequestOutput:
    return RequestOutput(index=0, prompt_token_ids=[1], token_ids=[7] * tokens, finish_reason=finish_reason)


def one_by_one(submit):
    """What takes (prompt, request) as what takes a list of requests."""
    return lambda batch: [submit(each.prompt, each) for each in batch]


def finished_replay(submit, prompts, cancel=lambda ids: None) -> Replay:
    """A replay of requests that are all due at once, sent to the end."""
    replay = Replay(one_by_one(submit), cancel, itertools.repeat(0.0), prompts)
    replay.start()
    replay._thread.join(PATIENCE)
    replay.stop()
    return replay


def test_arrivals_are_poisson():
    """Gaps of a Poisson process are exponential: mean and deviation are both 1 / rate, P(gap > 1 / rate) = 1 / e."""
    times = np.array(list(itertools.islice(poisson_times(4.0, seed=1), 20_001)))
    gaps = np.diff(times)
    assert times[0] == 0.0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)  # 4 standard errors of 1 / sqrt(20000)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)
    assert (gaps > 0.25).mean() == pytest.approx(np.exp(-1), rel=0.04)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_arrivals_repeat_with_their_seed():
    first, again, other = (list(itertools.islice(poisson_times(1.0, seed), 20)) for seed in (3, 3, 4))
    assert first == again != other
    with pytest.raises(ValueError, match="rate is 0; it must be more than 0"):
        next(poisson_times(0, seed=0))


def test_every_item_comes_once_a_round():
    stream = shuffled_forever("abcdef", seed=0)
    rounds = ["".join(itertools.islice(stream, 6)) for _ in range(4)]
    assert all(sorted(each) == list("abcdef") for each in rounds)
    assert len(set(rounds)) > 1


def test_a_server_that_does_not_take_a_request_delays_none_that_comes_later():
    stuck, taken, others = threading.Event(), threading.Event(), threading.Semaphore(0)

    def submit(prompt, request):
        if prompt == "slow":
            taken.set()
            assert stuck.wait(PATIENCE)
        request.put(answer(1, "length"))
        others.release()
        return [request.index]

    def times():
        yield 0.0
        assert taken.wait(PATIENCE)
        yield from itertools.repeat(0.0)

    replay = Replay(one_by_one(submit), lambda ids: None, times(), ["slow", "a", "b", "c"])
    replay.start()
    assert all(others.acquire(timeout=PATIENCE) for _ in range(3))
    assert (replay.waiting, replay.running, replay.done) == (1, 0, 3)
    stuck.set()
    replay.stop()
    assert replay.wait(PATIENCE) and replay.done == 4
    assert [each.prompt for each in replay.requests] == ["slow", "a", "b", "c"]


def test_what_comes_due_while_the_server_is_busy_is_handed_over_together():
    """Every hand-over waits until all requests are due, so all that the others found went with few of them: with one,
    or with several that looked at the same time."""
    count, all_due, batches = 500, threading.Event(), []

    def submit(batch):
        assert all_due.wait(PATIENCE)
        batches.append([each.index for each in batch])
        return [[each.index] for each in batch]

    def prompts():
        yield from range(count)
        all_due.set()

    replay = Replay(submit, lambda ids: None, itertools.repeat(0.0), prompts())
    replay.start()
    replay._thread.join(PATIENCE)
    replay.stop()
    assert sorted(itertools.chain(*batches)) == list(range(count))
    assert len(batches) <= 2 * SENDERS
    assert [each.ids for each in replay.requests] == [[index] for index in range(count)]


def test_times_count_from_when_a_request_was_due():
    clock = Clock()
    request = ReplayedRequest(index=0, prompt="hello", due=10.0, clock=clock)
    for now, tokens, reason in ((13.0, 1, None), (13.5, 2, None), (15.5, 3, None), (15.5, 3, "length")):
        clock.now = now
        request.put(answer(tokens, reason))
    summary = request.summary()
    assert summary["ttft"] == 3.0 and summary["tpot"] == 1.25 and summary["largest_gap"] == 2.0
    assert summary["output_tokens"] == 3 and summary["finish_reason"] == "length" and summary["due"] == 10.0
    early = request.summary(until=14.0)  # the last token came later
    assert early["ttft"] == 3.0 and early["tpot"] == 0.5 and early["largest_gap"] == 0.5 and early["output_tokens"] == 3
    assert request.summary(until=13.2)["tpot"] is None


def test_what_an_answer_held_is_not_searched_for_garbage():
    request = ReplayedRequest(index=0, prompt=None, due=0.0, clock=Clock())
    last = answer(1000, "length")
    kept = weakref.ref(last)
    request.put(last)
    del last
    assert kept() is None and len(request.times) == 1000
    assert len(gc.get_referents(request.times)) < 10


def test_requests_are_counted_by_how_far_they_are():
    def submit(prompt, request):
        if prompt:
            request.put(answer(prompt, "stop" if prompt == 3 else None))
        return [request.index]

    replay = finished_replay(submit, [0, 1, 2, 3, 3, 3])
    assert (replay.waiting, replay.running, replay.done) == (1, 2, 3)
    assert not replay.wait(timeout=0.0)


def test_a_request_that_is_refused_is_an_error_and_the_stream_goes_on():
    def submit(prompt, request):
        if prompt == "bad":
            raise ValueError("the prompt is too long")
        request.put(answer(1, "stop"))
        return [request.index]

    replay = finished_replay(submit, ["good", "bad", "good"])
    assert [each.finish_reason for each in replay.requests] == ["stop", "error", "stop"]  # however they went together
    assert replay.requests[1].error == "the prompt is too long"
    assert replay.wait(PATIENCE)


def test_abort_cancels_what_has_not_ended():
    cancelled = []

    def submit(prompt, request):
        request.put(answer(1, prompt))
        return [request.index + 100]

    replay = finished_replay(submit, [None, "stop", None], cancel=cancelled.extend)
    replay.abort()
    assert cancelled == [100, 102]


def test_stop_sends_nothing_more():
    sent = threading.Event()

    def submit(prompt, request):
        sent.set()
        return [request.index]

    replay = Replay(one_by_one(submit), lambda ids: None, [0.0, 3600.0, 7200.0], itertools.count())
    replay.start()
    assert sent.wait(PATIENCE)
    replay.stop()
    assert len(replay.requests) == 1
