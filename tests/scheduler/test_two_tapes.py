"""A second tape of the same accumulation group: its forward windows ride beside the first one's backward pass."""

import random

import pytest


def words(count, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(50) for _ in range(count)]


def feed(sim, group, done=0):
    """Offer the microbatches of one group after another, the last of which closes it."""
    if done < 3 * group and sim.scheduler.wants_microbatch("job"):
        done += sim.microbatch(lengths=(200, 100), layers=8, closes_group=done % group == group - 1)
    return done


def run_groups(sim, group):
    done = 0
    while len(sim.finished_microbatches) < 3 * group:
        done = feed(sim, group, done)
        sim.step()
    sim.drain()
    sim.verify()


def both(iteration):
    """Microbatches that have windows, and those that have units, in an iteration."""
    return {part.microbatch for part in iteration.windows}, {unit.microbatch for unit in iteration.units}


def test_windows_of_the_next_microbatch_ride_with_units_of_the_one_before(simulate):
    sim = simulate(objective=0.02, pages=400)
    sim.request(words(40), new=300)
    run_groups(sim, group=3)
    mixed = [both(iteration) for iteration in sim.history if iteration.windows and iteration.units]
    assert any(windows == {microbatch + 1} for windows, units in mixed for microbatch in units)
    assert sim.finished_microbatches == list(range(9))


def test_no_window_crosses_the_update_of_its_group(simulate):
    sim = simulate(objective=0.02, pages=400)
    sim.request(words(40), new=300)
    run_groups(sim, group=1)
    assert all(windows <= units or not windows & units for windows, units in map(both, sim.history) if windows)
    for iteration in sim.history:
        windows, units = both(iteration)
        assert not windows or not units or windows == units, "every microbatch here closes its group"


def shared_iterations(simulate, closes_group):
    """Of 120 iterations with a decoding request, those with windows and units."""
    sim = simulate(objective=0.03, pages=400)
    sim.request(words(40), new=900)
    for _ in range(150):
        if sim.scheduler.wants_microbatch("job"):
            sim.microbatch(lengths=(500, 300), layers=8, closes_group=closes_group)
        sim.step()
    return sum(bool(iteration.windows and iteration.units) for iteration in sim.history[30:])


def test_both_end_together_so_that_most_iterations_have_some_of_either(simulate):
    one_tape, two_tapes = (shared_iterations(simulate, closes_group) for closes_group in (True, False))
    assert two_tapes > 0.5 * 120 and two_tapes > 1.5 * one_tape


def test_the_second_tape_goes_first_when_requests_need_pages(simulate):
    sim = simulate(objective=0.02, pages=70, caching=False)
    assert sim.microbatch(lengths=(640,), pages_per_block=2, layers=300, closes_group=False)
    while not (sim.history and sim.history[-1].units):
        sim.step()
    assert sim.microbatch(lengths=(640,), pages_per_block=2, layers=30)
    assert sim.scheduler.statistics.tape_pages == 40
    sim.request(words(1500), new=90)
    sim.request(words(600, 1), new=90)
    dropped = []
    for _ in range(30):
        sim.step()
        dropped += sim.scheduler.dropped
    assert dropped == [1]
    sim.drain()
    sim.verify()
    assert sim.finished_microbatches == [0, 1] and len(sim.reasons) == 2
    assert sim.scheduler.statistics.preemptions == 0


def test_a_third_is_not_taken(simulate):
    sim = simulate(pages=400)
    assert sim.microbatch(lengths=(300,), layers=40, closes_group=False)
    assert not sim.scheduler.wants_microbatch("job"), "its own forward pass comes first"
    while sim.scheduler.wants_microbatch("job") is False:
        sim.step()
    assert sim.microbatch(lengths=(300,), layers=40, closes_group=False)
    assert not sim.scheduler.wants_microbatch("job")
    assert not sim.microbatch(lengths=(300,))


@pytest.mark.parametrize("policy", ["flat_out", "fixed_budget"])
def test_without_a_clock_the_same_iterations_come_again(simulate, policy):
    options = {"units": 5} if policy == "flat_out" else {"finetune_tokens": 64, "backward_units": 3}
    plans = []
    for speed in (1.0, 6.0):
        sim = simulate(policy, pages=400, **options)
        sim.cost = lambda iteration, speed=speed: speed * 0.01
        run_groups(sim, group=3)
        plans.append([(each.windows, each.units) for each in sim.history])
    assert plans[0] == plans[1]
