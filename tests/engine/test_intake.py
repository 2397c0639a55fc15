"""Requests that submissions become: all queued or none; seeds, limits and stop ids worked out by hand."""

import itertools
import queue
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from flexjax.config import EngineConfig
from flexjax.engine.adapter_tier import AdapterTier
from flexjax.engine.adapters import AdapterTable, UnknownAdapter
from flexjax.engine.intake import Intake
from flexjax.engine.submission import Submission
from flexjax.layout import SlotLayout
from flexjax.request import SamplingParams
from flexjax.scheduler import LatencyModel, Scheduler, policy_from_name

CONFIG = EngineConfig(model="none", max_model_len=64, seed=5)
EOS = 9


class Loop:
    """Runs commands at once, at the moments 1.0, 2.0, ..."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.added, self._moments = scheduler, [], itertools.count(1)

    def clock(self) -> float:
        return float(next(self._moments))

    def post(self, command, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(command(*arguments))
        except ValueError as error:
            future.set_exception(error)
        return future

    def add_request(self, serving, collector) -> None:
        self.added.append((serving, collector))


@pytest.fixture
def place() -> SimpleNamespace:
    """An intake, what it has asked layouts for, and where its requests go. An adapter ``poet`` serves."""
    layouts = [SlotLayout(4), SlotLayout(4, 64)]
    scheduler = Scheduler(layouts, 8, 4, CONFIG.max_model_len, LatencyModel(), policy_from_name("inference_only"))
    table, wishes, loop = AdapterTable(2, 8), [], Loop(scheduler)
    library = SimpleNamespace(table=table, tier=AdapterTier(table, None))
    table.announce(table.new("poet", 8, 1.0))
    intake = Intake(CONFIG, frozenset({EOS}), None, loop, library, SimpleNamespace(requests=wishes.append))
    return SimpleNamespace(submit=intake.submit, loop=loop, wishes=wishes, table=table)


def submission(length: int = 3, adapter: str | None = None, **sampling) -> Submission:
    return Submission([7] * length, SamplingParams(**sampling), adapter, queue.SimpleQueue(), 2, "salt")


def test_every_answer_is_a_request_of_its_own(place):
    ids = place.submit([submission(n=2), submission(adapter="poet")]).result()
    assert ids == [[1, 2], [3]]
    requests = [serving.request for serving, _ in place.loop.added]
    assert [each.id for each in requests] == [1, 2, 3] and [each.arrival for each in requests] == [1.0, 2.0, 3.0]
    assert [collector.index for _, collector in place.loop.added] == [0, 1, 0]
    assert [each.adapter_version for each in requests] == [0, 0, place.table.find("poet").version]
    assert {(each.priority, each.cache_salt, each.prompt) for each in requests} == {(2, "salt", (7, 7, 7))}


def test_seeds_count_up_from_the_one_given_and_stay_within_32_bits(place):
    place.submit([submission(n=3, seed=2**32 - 2)]).result()
    assert [serving.seed for serving, _ in place.loop.added] == [2**32 - 2, 2**32 - 1, 0]
    place.loop.added.clear()
    place.submit([submission(n=50)]).result()
    drawn = {serving.seed for serving, _ in place.loop.added}
    assert len(drawn) == 50 and all(0 <= seed < 2**32 for seed in drawn)


@pytest.mark.parametrize(
    "asked, tokens, stops",
    [
        ({"max_tokens": 5}, 5, {EOS}),
        ({"max_tokens": None}, 64 - 60, {EOS}),
        ({"max_tokens": 100, "stop_token_ids": (4,)}, 64 - 60, {4, EOS}),
        ({"max_tokens": 1, "stop_token_ids": (4,), "ignore_eos": True}, 1, {4}),
    ],
)
def test_limits_and_stop_ids(place, asked, tokens, stops):
    place.submit([submission(length=60 if tokens == 4 else 3, **asked)]).result()
    ((serving, _),) = place.loop.added
    assert (serving.request.max_new_tokens, serving.request.stop_token_ids) == (tokens, stops)


def test_layouts_hear_of_each_way_to_sample_once_and_first(place):
    greedy, other = submission(temperature=0.0), submission(seed=1)
    place.submit([greedy, other, greedy])
    assert len(place.wishes) == 2 and set(place.wishes) == {greedy.sampling, other.sampling}
    with pytest.raises(ValueError, match="the prompt has 64 tokens; it needs 1 to 63, since max_model_len is 64"):
        place.submit([submission(length=64, logprobs=1)])
    assert place.wishes[-1].logprobs == 1


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (submission(adapter="nobody"), UnknownAdapter, "'nobody' is not loaded; loaded adapters: poet"),
        (submission(logprobs=1), ValueError, "asks for logprobs, but no layout has"),
    ],
)
def test_one_that_is_refused_keeps_the_others_out(place, wrong, error, message):
    with pytest.raises(error, match=message):
        place.submit([submission(), wrong]).result()
    assert place.loop.added == []
