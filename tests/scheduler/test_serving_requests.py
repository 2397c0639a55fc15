"""Requests through the scheduler and the simulated device, which checks every K/V position that is read."""

import random

import pytest

from flexjax.layout import SlotLayout
from flexjax.request import FinishReason, Request, SamplingParams
from flexjax.scheduler import LatencyModel, Scheduler, policy_from_name


def words(count, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(50) for _ in range(count)]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_everybody_gets_their_answer_however_late_results_are_read(simulate, lag):
    sim = simulate(lag=lag, pages=60)
    for length in (1, 2, 63, 64, 65, 130, 300, 512, 700, 64):
        sim.request(words(length, length), new=1 + length % 90)
    sim.drain()
    sim.verify()
    assert len(sim.reasons) == 10


def test_a_prompt_is_cut_at_multiples_of_64_and_rows_are_the_lowest(simulate):
    sim = simulate("inference_only", layouts=(SlotLayout(8), SlotLayout(8, 128)))
    sim.request(words(300), new=3)
    sim.request(words(10), new=3)
    parts = [[(part.row, part.start, part.length, part.samples) for part in sim.step().prompts] for _ in range(4)]
    assert parts == [
        [(0, 0, 128, False)],
        [(0, 128, 128, False)],
        [(0, 256, 44, True), (1, 0, 10, True)],
        [],
    ]
    sim.drain()
    sim.verify()


def test_sampled_rows_name_the_position_that_comes_next(simulate):
    sim = simulate("inference_only", lag=0)
    request = sim.request(words(10), new=3)
    assert sim.step().sampled_rows == [(0, request.id, 10)]
    assert sim.step().sampled_rows == [(0, request.id, 11)]


def test_never_computes_past_max_new_tokens(simulate):
    sim = simulate(lag=1)
    request = sim.request(words(5), new=4)
    sim.drain()
    assert sim.reasons == {request.id: "length"}
    assert max(position for _, position in sim.device.computed) == 5 + 4 - 2


def test_a_late_stop_costs_one_token_that_is_dropped(simulate, reference_answer):
    sim = simulate(lag=1)
    free = Request(0, tuple(words(5)), SamplingParams(), 30)
    stop = reference_answer(free)[6]
    first = reference_answer(free).index(stop)
    sim.request(words(5), new=30, stop_token_ids=frozenset({stop}))
    sim.drain()
    assert sim.reasons == {0: "stop"}
    assert sim.outputs[0] == reference_answer(free)[: first + 1]
    assert sum(iteration.decode_slots for iteration in sim.history) == first + 1


def test_min_tokens_holds_stop_ids_back(simulate, reference_answer):
    free = Request(0, tuple(words(5)), SamplingParams(), 30)
    stop = reference_answer(free)[2]
    sim = simulate()
    sim.request(words(5), new=30, stop_token_ids=frozenset({stop}), sampling={"min_tokens": 9, "max_tokens": 30})
    sim.drain()
    sim.verify()
    assert len(sim.outputs[0]) >= 9


def test_the_engine_may_end_a_request_whose_text_is_complete(simulate):
    sim = simulate(lag=1)
    request = sim.request(words(5), new=30)
    for _ in range(5):
        sim.step()
    assert sim.scheduler.finish(request.id, FinishReason.STOP)
    assert not sim.scheduler.finish(request.id, FinishReason.STOP)
    sim.drain()
    assert len(sim.outputs[request.id]) == 4


@pytest.mark.parametrize("moment", range(9))
def test_cancelled_at_any_time(simulate, moment):
    sim = simulate(lag=1, pages=12, layouts=(SlotLayout(8), SlotLayout(8, 64)))
    victim = sim.request(words(140), new=40)
    others = [sim.request(words(100, seed), new=60) for seed in range(3)]
    for _ in range(moment):
        sim.step()
    assert sim.scheduler.cancel(victim.id)
    assert not sim.scheduler.cancel(victim.id)
    sim.drain()
    sim.verify()
    assert set(sim.reasons) == {request.id for request in others}


def test_out_of_pages_preempts_the_newest_and_recomputes_it(simulate):
    sim = simulate(pages=8, rows=8, caching=False)
    for seed in range(4):
        sim.request(words(60, seed), new=150)
    sim.drain()
    sim.verify()
    assert len(sim.reasons) == 4
    assert sim.scheduler.statistics.preemptions > 0
    recomputed = {request for (request, _), times in sim.device.computed.items() if times > 1}
    assert recomputed and 0 not in recomputed


@pytest.mark.parametrize("new", range(68, 71))
def test_a_preempted_request_waits_for_the_last_iteration_that_computes_it(simulate, new):
    """Pages come back early from a request that ends; the simulation checks who is seated while still under way."""
    sim = simulate(pages=9, lag=2, caching=False)
    sim.request(words(60, 0), new=150)
    sim.request(words(250, 1), new=new)
    sim.request(words(10, 2), new=100)
    sim.drain()
    sim.verify()
    assert sim.scheduler.statistics.preemptions > 0


def test_lower_priority_is_preempted_first_and_served_last(simulate):
    sim = simulate(pages=8, rows=8, caching=False)
    low = sim.request(words(60, 1), new=150, priority=1)
    high = sim.request(words(60, 2), new=150, priority=0)
    sim.request(words(60, 3), new=150, priority=0)
    sim.drain()
    sim.verify()
    assert all(times == 1 for (request, _), times in sim.device.computed.items() if request == high.id)
    assert list(sim.reasons)[-1] == low.id


def test_a_waiting_request_of_higher_priority_is_seated_first(simulate):
    sim = simulate(rows=1)
    sim.request(words(10, 0), new=20)
    sim.step()
    late = sim.request(words(10, 1), new=2, priority=5)
    urgent = sim.request(words(10, 2), new=2, priority=-1)
    sim.drain()
    assert sim.first_token_at[urgent.id] < sim.first_token_at[late.id]


def test_many_more_requests_than_rows_all_end_in_order(simulate):
    sim = simulate(rows=2, pages=16)
    ids = [sim.request(words(40, seed), new=5).id for seed in range(40)]
    sim.drain()
    sim.verify()
    assert sorted(sim.first_token_at, key=sim.first_token_at.get) == ids


def test_a_second_request_reuses_the_pages_of_the_first(simulate):
    sim = simulate()
    prompt = words(300)
    sim.request(prompt, new=70)
    sim.drain()
    second = sim.request([*prompt[:250], 1, 2, 3], new=5)
    sim.drain()
    sim.verify()
    assert sim.scheduler.statistics.prefix_hits == 250 // 64
    assert min(position for request, position in sim.device.computed if request == second.id) == 192
    follow_up = sim.request(prompt + sim.outputs[0], new=5)
    sim.drain()
    sim.verify()
    assert min(position for request, position in sim.device.computed if request == follow_up.id) == 320


def test_pages_are_not_reused_across_salts(simulate):
    sim = simulate()
    for salt in ("ann", "bob", ""):
        sim.request(words(200), new=5, cache_salt=salt)
        sim.drain()
    sim.verify()
    assert sim.scheduler.statistics.prefix_hits == 0
    sim.request(words(200), new=5, cache_salt="ann")
    sim.drain()
    sim.verify()
    assert sim.scheduler.statistics.prefix_hits == 3


def test_pages_are_not_reused_across_adapter_versions(simulate):
    sim = simulate()
    for version in (0, 1, 2):
        sim.request(words(200), new=5, adapter_version=version)
        sim.drain()
    sim.verify()
    assert sim.scheduler.statistics.prefix_hits == 0
    sim.scheduler.forget_adapter(1)
    sim.request(words(200), new=5, adapter_version=1)
    sim.drain()
    assert sim.scheduler.statistics.prefix_hits == 0
    sim.request(words(200), new=5, adapter_version=2)
    sim.drain()
    sim.verify()
    assert sim.scheduler.statistics.prefix_hits == 3


@pytest.mark.parametrize("sampling", [{"presence_penalty": 0.5}, {"prompt_logprobs": 1}])
def test_requests_that_need_every_prompt_token_do_not_reuse_pages(simulate, sampling):
    sim = simulate()
    sim.request(words(200), new=5, sampling=sampling)
    sim.drain()
    sim.request(words(200), new=5, sampling=sampling)
    sim.drain()
    assert sim.scheduler.statistics.prefix_hits == 0
    sim.request(words(200), new=5)
    sim.drain()
    sim.verify()
    assert sim.scheduler.statistics.prefix_hits == 3


def test_pages_are_offered_for_reuse_only_when_their_iteration_is_complete(simulate):
    sim = simulate(lag=2)
    sim.request(words(64), new=2)
    sim.step()
    sim.request(words(65), new=2)
    sim.step()
    assert sim.history[1].prompts[0].start == 0
    sim.drain()
    sim.verify()


def test_without_prefix_caching_every_page_is_free_in_the_end(simulate):
    sim = simulate(caching=False)
    for _ in range(3):
        sim.request(words(200), new=5)
        sim.drain()
    statistics = sim.scheduler.statistics
    assert (statistics.free_pages, statistics.cached_pages, statistics.prefix_hits) == (64, 0, 0)


def test_layouts_with_log_probabilities_are_used_only_when_asked_for(simulate):
    plain = (SlotLayout(8), SlotLayout(8, 128))
    full = (SlotLayout(8, 0, logprobs=True), SlotLayout(8, 128, logprobs=True, prompt_logprobs=True))
    sim = simulate("inference_only", layouts=plain + full)
    for layout in plain + full:
        sim.latency.calibrate(("forward", layout), 0.01 + 0.005 * layout.logprobs + 0.001 * layout.tiles)
    sim.request(words(200), new=4)
    sim.drain()
    assert not any(iteration.layout.logprobs for iteration in sim.history)
    sim.request(words(200, 1), new=4, sampling={"logprobs": 2})
    start = len(sim.history)
    sim.drain()
    assert [iteration.layout.logprobs for iteration in sim.history[start:]] == [False, True, True, True, True]
    sim.request(words(200, 2), new=4, sampling={"prompt_logprobs": 2})
    start = len(sim.history)
    sim.drain()
    assert [iteration.layout.prompt_logprobs for iteration in sim.history[start:]] == [True, True, False, False, False]


def test_requests_that_could_never_run_are_refused_with_the_knob(simulate):
    sim = simulate(pages=4, model_len=300, layouts=(SlotLayout(8, 64),))
    with pytest.raises(ValueError, match=r"needs 301 tokens \(300 prompt \+ 1 new\), but max_model_len allows 300"):
        sim.request(words(300), new=1)
    with pytest.raises(ValueError, match="needs 257 tokens.*pages allows 256"):
        sim.request(words(250), new=7)
    with pytest.raises(ValueError, match="logprobs.*add one to layouts"):
        sim.request(words(10), new=7, sampling={"logprobs": 1})
    with pytest.raises(ValueError, match="nothing to compute"):
        sim.request([], new=7)
    sim.request(words(250), new=6)
    sim.drain()
    sim.verify()


def test_layouts_too_small_for_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"max_rows is 9, but no layout.*the largest has 8"):
        Scheduler((SlotLayout(8, 64), SlotLayout(8)), 4, 9, 300, LatencyModel(), policy_from_name("inference_only"))
    pinned = policy_from_name("fixed_budget", finetune_tokens=64, backward_units=1, layout=SlotLayout(4, 64))
    with pytest.raises(ValueError, match="max_rows is 8"):
        Scheduler((SlotLayout(8, 64),), 4, 8, 300, LatencyModel(), pinned)


def test_completion_out_of_order_is_a_bug_of_the_caller(simulate):
    sim = simulate(lag=5)
    sim.request(words(10), new=5)
    sim.step()
    second = sim.step()
    with pytest.raises(AssertionError, match="iteration 1 was completed, 0 is next"):
        sim.scheduler.complete(second, {0: 1}, None)


def crowded(simulate, **options):
    """About 120 tiles a second; first tokens are due after 2 seconds."""
    layouts = (SlotLayout(128), SlotLayout(128, 64))
    return simulate(objective=0.05, ttft=2.0, rows=128, pages=600, layouts=layouts, **options)


def test_when_more_come_than_can_be_served_long_prompts_wait_and_all_others_are_in_time(simulate):
    """130 prompts of 340 tiles in all; in turn, a third of the short ones would be late."""
    sim = crowded(simulate)
    short = [sim.request(words(512 if seed % 13 in (2, 6, 10) else 20, seed), new=1) for seed in range(130)]
    short = [request.id for request in short if len(request.prompt) == 20]
    sim.drain()
    sim.verify()
    assert len(short) == 100 and len(sim.reasons) == 130
    assert max(sim.first_token_at[request] for request in short) < 2.0


def test_prompts_found_in_the_cache_are_served_faster_and_nobody_is_given_up(simulate):
    """200 prompts of 900 tiles in all, of which 200 have to be computed: everybody can be in time."""
    sim = crowded(simulate)
    prompt = words(460)
    sim.request(prompt, new=1)
    sim.drain()
    asked = [sim.request(prompt + words(20, seed) if seed % 2 else words(20, seed), new=1) for seed in range(200)]
    begin = sim.now
    sim.drain()
    sim.verify()
    ids = [request.id for request in asked]
    assert sorted(ids, key=sim.first_token_at.get) == ids
    assert sim.first_token_at[ids[-1]] - begin < 2.0


def test_a_pace_is_that_of_prompts_and_not_of_rows_that_come_free(simulate):
    """Rows hold answers that go on: nothing can be taken in, which says nothing about prompts."""
    sim = simulate(objective=0.05, ttft=2.0, rows=4, pages=600, layouts=(SlotLayout(4), SlotLayout(4, 64)))
    for seed in range(12):
        sim.request(words(20, seed), new=60)
    while sim.scheduler.statistics.running < 4:
        sim.step()
    for _ in range(40):
        sim.step()
    assert sim.scheduler.statistics.waiting == 8
    assert sim.scheduler._serving._pace.tiles_per_second is None
