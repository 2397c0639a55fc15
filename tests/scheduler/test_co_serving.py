"""Requests and finetuning in the same iterations, on the simulated clock."""

import random
from dataclasses import replace

import pytest

from flexjax.layout import SlotLayout
from flexjax.scheduler.objectives import CoServe


def words(count, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(50) for _ in range(count)]


def keep_busy(sim, iterations, rows=4, jobs=("job",), lengths=(100, 200, 60)):
    """Constant load: a new request whenever fewer than ``rows`` run, a new microbatch whenever a job wants one."""
    for _ in range(iterations):
        statistics = sim.scheduler.statistics
        if statistics.running + statistics.waiting < rows:
            sim.request(words(80, len(sim.requests)), new=40)
        for job in jobs:
            if sim.scheduler.wants_microbatch(job):
                sim.microbatch(job, lengths)
        sim.step(check=False)
    sim.scheduler.check()


def test_a_job_alone_runs_to_its_end(simulate):
    sim = simulate()
    assert sim.scheduler.wants_microbatch("job")
    assert sim.microbatch(lengths=(100, 30, 500))
    assert not sim.scheduler.wants_microbatch("job")
    assert not sim.microbatch(lengths=(10,))
    assert not sim.scheduler.idle
    sim.drain()
    sim.verify()
    assert sim.finished_microbatches == [0]
    assert sim.finetuned == 630


def test_an_evaluation_ends_after_its_losses(simulate):
    sim = simulate()
    sim.microbatch(evaluation=True)
    sim.drain()
    sim.verify()
    assert sim.finished_microbatches == [0]


def test_finetuning_shares_iterations_with_requests(simulate):
    sim = simulate()
    keep_busy(sim, 200)
    sim.drain()
    sim.verify()
    shared = sum(iteration.finetuning_slots for iteration in sim.history if iteration.decode)
    assert shared > 0.3 * sim.finetuned > 0


def test_an_iteration_knows_what_its_units_should_take(simulate):
    """With a forward step it is a part of the prediction; without one it is all but the overhead."""
    sim = simulate(objective=0.02)
    keep_busy(sim, 100)
    with_units = [iteration for iteration in sim.history if iteration.units]
    assert all(0 < each.unit_seconds < each.predicted for each in with_units) and with_units
    assert {each.unit_seconds for each in sim.history if not each.units} == {0.0}
    sim.drain()
    assert sim.microbatch(lengths=(500, 500))
    sim.drain()
    alone = [each for each in sim.history if each.units and each.layout is None]
    overhead = pytest.approx(sim.scheduler.latency.overhead)
    assert alone and all(each.predicted - each.unit_seconds == overhead for each in alone)


def test_a_tighter_objective_gives_less_finetuning_and_shorter_iterations(simulate):
    rates, longest = [], []
    for objective in (0.01, 0.02, 0.04, 0.08):
        sim = simulate(objective=objective, pages=200)
        keep_busy(sim, 300)
        rates.append(len(sim.finished_microbatches) / sim.now)
        longest.append(sorted(sim.real[50:])[-10])
    assert rates == sorted(rates) and rates[0] < 0.5 * rates[-1]
    assert longest == sorted(longest)
    assert all(real < objective for real, objective in zip(longest, (0.01, 0.02, 0.04, 0.08), strict=True))


def test_an_objective_below_decoding_leaves_no_room_until_the_load_falls(simulate):
    sim = simulate(objective=0.001)
    sim.request(words(30), new=120)
    for _ in range(40):
        sim.step()
    assert sim.microbatch()
    for _ in range(20):
        iteration = sim.step()
        assert iteration.decode and not iteration.windows and not iteration.units
    sim.drain()
    sim.verify()
    assert sim.finished_microbatches == [0]


def test_the_least_chunk_of_a_prompt_is_no_door_for_finetuning(simulate):
    sim = simulate(objective=0.001, layouts=(SlotLayout(8), SlotLayout(8, 256, tape=True)))
    sim.latency.calibrate(("forward", SlotLayout(8, 256, tape=True)), 0.01)
    sim.request(words(30), new=5)
    assert sim.microbatch(lengths=(30,))
    iteration = sim.step()
    assert iteration.predicted > iteration.limit and iteration.prompts and not iteration.windows
    sim.drain()
    sim.verify()


def test_a_burst_is_answered_in_the_next_iteration(simulate):
    sim = simulate(objective=0.03, pages=200)
    for _ in range(300):
        if sim.scheduler.wants_microbatch("job"):
            sim.microbatch(lengths=(300, 300))
        sim.step()
    assert max(sim.real[100:]) < 0.03
    burst = [sim.request(words(50, seed), new=5).id for seed in range(4)]
    iteration = sim.step()
    assert {part.request_id for part in iteration.prompts} == set(burst)
    sim.drain()
    sim.verify()


def test_under_pressure_tapes_go_before_requests_and_are_made_again(simulate):
    sim = simulate(pages=30, caching=False, objective=0.5)
    assert sim.microbatch(lengths=(640,), pages_per_block=2, layers=8)
    sim.step()
    assert sim.history[-1].windows
    sim.request(words(200), new=600)
    sim.request(words(600, 1), new=300)
    assert sim.scheduler.statistics.free_pages == 10
    sim.step()
    assert sim.history[-1].units or sim.scheduler.dropped == (0,)
    sim.drain()
    sim.verify()
    assert len(sim.reasons) == 2 and sim.finished_microbatches == [0]


class Surging(CoServe):
    """Sees a burst in every iteration."""

    def finetune(self, view):
        return super().finetune(replace(view, surge=1.0))


def test_in_a_burst_a_begun_tape_whose_pages_are_missed_is_finished_and_waits_otherwise(simulate):
    sim = simulate(pages=40, caching=False, objective=0.03)
    first = sim.request(words(60), new=900)
    assert sim.microbatch(lengths=(640,), pages_per_block=2, layers=8)
    while not sim.device.unit_log[0]:
        sim.step()
    sim.scheduler.policy = Surging(objective=0.03)
    begun = len(sim.device.unit_log[0])
    for _ in range(10):
        sim.step()
    assert len(sim.device.unit_log[0]) <= begun + 1 and not sim.finished_microbatches, "it gives way to the burst"
    second = sim.request(words(64 * 22, 1), new=5)
    while second.id not in sim.first_token_at:
        sim.step()
    assert sim.finished_microbatches == [0] and first.id not in sim.reasons
    sim.drain()
    sim.verify()


def test_a_dropped_tape_is_named_loses_its_pages_and_begins_again(simulate):
    sim = simulate(
        "co_serve", pages=30, caching=False, objective=0.008, layouts=(SlotLayout(8), SlotLayout(8, 64, tape=True))
    )
    assert sim.microbatch(lengths=(640,), pages_per_block=2)
    sim.step()
    pages = sim.scheduler.microbatch_pages(0).blocks
    assert len(pages) == 10 and all(len(block) == 2 for block in pages)
    sim.request(words(700), new=30)
    sim.step()
    assert sim.scheduler.dropped == (0,)
    with pytest.raises(LookupError, match="microbatch 0 holds no pages"):
        sim.scheduler.microbatch_pages(0)
    sim.drain()
    sim.verify()
    assert sim.finetuned > 640 and sim.finished_microbatches == [0]
    assert sim.scheduler.statistics.preemptions == 0


def test_a_dropped_tape_wakes_the_engine_when_the_request_that_took_its_pages_has_gone(simulate):
    sim = simulate(
        "co_serve", pages=30, caching=False, objective=0.008, layouts=(SlotLayout(8), SlotLayout(8, 64, tape=True))
    )
    assert sim.microbatch(lengths=(640,), pages_per_block=2)
    sim.step()
    request = sim.request(words(700), new=30)
    sim.step()
    assert sim.scheduler.dropped == (0,)
    assert sim.scheduler.cancel(request.id)
    while sim.flying:
        sim.complete_one()
    assert not sim.scheduler.idle
    sim.drain()
    assert sim.finished_microbatches == [0] and sim.scheduler.idle


def test_a_tape_that_a_loss_has_read_is_kept(simulate):
    layouts = (SlotLayout(8), SlotLayout(8, 640, tape=True))
    options = {"finetune_tokens": 640, "backward_units": 1, "layout": layouts[1]}
    sim = simulate("fixed_budget", pages=30, caching=False, layouts=layouts, **options)
    assert sim.microbatch(lengths=(640,), pages_per_block=2, window=64)
    sim.step()
    assert sim.history[0].windows and sim.history[0].units
    sim.request(words(700), new=30)
    sim.step()
    assert not sim.scheduler.dropped and sim.scheduler.statistics.waiting == 1
    sim.drain()
    sim.verify()
    assert sim.finished_microbatches == [0] and len(sim.reasons) == 1


def test_a_microbatch_takes_only_what_requests_leave(simulate):
    sim = simulate(pages=30)
    sim.request(words(700), new=100)
    assert not sim.microbatch(lengths=(640,), pages_per_block=2)
    sim.step()
    assert not sim.microbatch(lengths=(640,), pages_per_block=2)
    sim.drain()
    assert sim.microbatch(lengths=(640,), pages_per_block=2)
    sim.drain()
    sim.verify()


def test_a_microbatch_that_can_never_fit_is_refused_with_the_knob(simulate):
    sim = simulate(pages=8)
    with pytest.raises(ValueError, match="needs 9 pages for 192 slots, but there are 8; lower batch_tokens"):
        sim.microbatch(lengths=(190,))
    bare = simulate(layouts=(SlotLayout(8, 64),))
    with pytest.raises(ValueError, match="asks for tape"):
        bare.microbatch()


def test_jobs_share_the_room_by_weight(simulate):
    sim = simulate(pages=400, objective=0.02)
    sim.scheduler.set_job("heavy", weight=3.0)
    sim.scheduler.set_job("light", weight=1.0)
    keep_busy(sim, 2500, rows=2, jobs=("heavy", "light"), lengths=(100, 60))
    done = [sim.device.microbatches[microbatch].job for microbatch in sim.finished_microbatches]
    assert done.count("heavy") / done.count("light") == pytest.approx(3.0, rel=0.15)
    sim.verify()


def test_three_jobs_get_their_weights_within_a_microbatch_and_a_paused_one_nothing(simulate):
    weights = {"heavy": 4.0, "middle": 2.0, "light": 1.0}
    sim = simulate(pages=600, objective=0.02)
    for job, weight in weights.items():
        sim.scheduler.set_job(job, weight=weight)
    sim.scheduler.set_job("paused", weight=100.0, paused=True)
    keep_busy(sim, 1500, rows=2, jobs=(*weights, "paused"), lengths=(100, 60))
    done = [sim.device.microbatches[microbatch].job for microbatch in sim.finished_microbatches]
    unit = len(done) / sum(weights.values())
    assert len(done) > 60 and set(done) == set(weights)
    assert all(abs(done.count(job) - unit * weight) <= 1.5 for job, weight in weights.items()), done


def test_a_small_job_is_not_starved_by_a_big_one(simulate):
    sim = simulate(pages=600, objective=0.02)
    sim.scheduler.set_job("big")
    sim.scheduler.set_job("small")
    for _ in range(600):
        if sim.scheduler.wants_microbatch("big"):
            sim.microbatch("big", (512, 512, 384), layers=8, closes_group=False)
        if sim.scheduler.wants_microbatch("small"):
            sim.microbatch("small", (120,), layers=8)
        if not sim.scheduler.statistics.running + sim.scheduler.statistics.waiting:
            sim.request(words(80, len(sim.requests)), new=40)
        sim.step(check=False)
    work = {"big": 0, "small": 0}
    for microbatch in sim.finished_microbatches:
        work[sim.device.microbatches[microbatch].job] += sim.device.microbatches[microbatch].slots
    one = sim.device.microbatches[0].slots
    assert abs(work["big"] - work["small"]) <= 2 * one < work["small"]


def test_a_job_that_was_paused_does_not_catch_up(simulate):
    sim = simulate(pages=400, objective=0.02)
    sim.scheduler.set_job("a", paused=True)
    keep_busy(sim, 400, rows=2, jobs=("a", "b"), lengths=(100, 60))
    assert {sim.device.microbatches[m].job for m in sim.finished_microbatches} == {"b"}
    sim.scheduler.set_job("a")
    before = len(sim.finished_microbatches)
    keep_busy(sim, 600, rows=2, jobs=("a", "b"), lengths=(100, 60))
    done = [sim.device.microbatches[m].job for m in sim.finished_microbatches[before:]]
    assert abs(done.count("a") - done.count("b")) <= 2


def test_a_paused_job_stops_at_a_unit_and_goes_on(simulate):
    sim = simulate(objective=0.006)
    sim.microbatch(lengths=(300,))
    while not sim.history or not sim.history[-1].units:
        sim.step()
    sim.scheduler.set_job("job", paused=True)
    assert sim.step() is None and sim.scheduler.idle
    sim.scheduler.set_job("job")
    sim.drain()
    sim.verify()
    assert sim.finished_microbatches == [0]


def test_a_paused_job_does_not_keep_a_request_from_its_pages(simulate):
    sim = simulate(pages=30, objective=0.006)
    sim.microbatch(lengths=(640,), pages_per_block=2)
    while not sim.history or not sim.history[-1].units:
        sim.step()
    sim.scheduler.set_job("job", paused=True)
    request = sim.request(words(1000), new=100)
    sim.drain()
    sim.verify()
    assert sim.reasons == {request.id: "length"}


@pytest.mark.parametrize("moment", [0, 1, 3, 6, 12])
def test_a_job_is_cancelled_at_any_unit(simulate, moment):
    sim = simulate(objective=0.006, pages=30)
    sim.microbatch(lengths=(300,), layers=60)
    for _ in range(moment):
        sim.step()
    request = sim.request(words(100), new=10)
    sim.cancel_job("job")
    sim.scheduler.check()
    sim.drain()
    assert sim.reasons == {request.id: "length"}
    assert sim.finished_microbatches == []
    assert sim.scheduler.wants_microbatch("job")


def test_dropout_needs_a_layout_with_it(simulate):
    layouts = (SlotLayout(8), SlotLayout(8, 128, tape=True), SlotLayout(8, 128, tape=True, dropout=True))
    sim = simulate(layouts=layouts)
    sim.microbatch("plain")
    sim.drain()
    assert not any(iteration.layout.dropout for iteration in sim.history if iteration.windows)
    start = len(sim.history)
    sim.microbatch("dropout", dropout=True)
    sim.drain()
    assert all(iteration.layout.dropout for iteration in sim.history[start:] if iteration.windows)


def test_the_plan_is_kept_by_the_device_once_the_model_has_learnt(simulate):
    sim = simulate(objective=0.03, pages=300)
    keep_busy(sim, 500, rows=6)
    late = sum(real > 0.03 for real in sim.real[100:])
    assert late <= 0.01 * len(sim.real[100:])
    assert sim.scheduler.latency.errors().p50 < 0.05
