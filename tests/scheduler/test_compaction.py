"""Sequences move out of high rows after a burst, and lose nothing on the way."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.layout import SlotLayout

WIDE = tuple(
    SlotLayout(rows, chunk, tape=bool(chunk), logprobs=True, prompt_logprobs=bool(chunk))
    for rows in (16, 80)
    for chunk in (0, 256)
)


def words(count, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(50) for _ in range(count)]


def after_a_burst(simulate, lag=1, lengths=range(70, 76), pages=300, **fields):
    """72 short requests come first, so that the long ones sit above them; then the short ones have ended."""
    sim = simulate("inference_only", pages=pages, rows=80, layouts=WIDE, lag=lag)
    for seed in range(72):
        sim.request(words(3, seed), new=30)
    for seed, length in enumerate(lengths):
        sim.request(words(length, seed), new=120, **fields)
    while sim.scheduler.statistics.running + sim.scheduler.statistics.waiting > len(lengths):
        sim.step(check=False)
    sim.scheduler.check()
    return sim


def rows_in_use(sim):
    return max(slot.row for slot in sim.history[-1].decode) + 1


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_steps_shrink_after_a_burst(simulate, lag):
    sim = after_a_burst(simulate, lag)
    assert max(slot.row for iteration in sim.history for slot in iteration.decode) >= 72
    for _ in range(40):
        sim.step()
    assert rows_in_use(sim) <= 16
    sim.drain()
    sim.verify()
    assert len(sim.reasons) == 78


def test_it_does_not_matter_how_full_a_last_page_is(simulate):
    """Of 64 lengths one is at the end of its page when it is to move; nobody else is there to move with it."""
    for length in range(64, 128):
        sim = after_a_burst(simulate, lengths=[length])
        sim.drain()
        sim.verify()
        assert len(sim.reasons) == 73 and rows_in_use(sim) == 1, length


def test_a_sequence_moves_once_and_computes_its_last_page_again(simulate):
    sim = after_a_burst(simulate)
    sim.drain()
    again = [request for (request, _), times in sim.device.computed.items() if times > 1]
    assert set(again) <= set(range(72, 78))
    assert all(times <= 2 for times in sim.device.computed.values())
    assert max(again.count(request) for request in again) <= 64


def test_who_may_not_be_computed_again_stays_and_so_do_all(simulate):
    sim = after_a_burst(simulate, sampling={"prompt_logprobs": 1})
    for _ in range(40):
        sim.step()
    assert rows_in_use(sim) > 72
    sim.drain()
    sim.verify()


def test_few_rows_are_not_worth_a_move(simulate):
    layouts = (SlotLayout(8), SlotLayout(64), SlotLayout(64, 128))
    sim = simulate("inference_only", pages=300, rows=64, layouts=layouts)
    for seed in range(40):
        sim.request(words(3, seed), new=5 if seed < 39 else 100)
    while sim.scheduler.statistics.running + sim.scheduler.statistics.waiting > 1:
        sim.step()
    sim.drain()
    assert {times for times in sim.device.computed.values()} == {1}


def on_the_move(sim):
    """Of the long requests, those that the newest iteration does not compute."""
    newest = sim.history[-1]
    return set(range(72, 78)) - {part.request_id for part in newest.decode + newest.prompts}


@pytest.mark.parametrize("lag", [1, 2])
def test_moving_and_cancelling_and_running_out_of_pages(simulate, lag):
    """One is cancelled on the move, while requests wait for pages; those run out when what has come grows."""
    sim = after_a_burst(simulate, lag, pages=100)
    for seed in range(8):
        sim.request(words(600, seed), new=200)
    while not on_the_move(sim):
        sim.step()
    assert sim.scheduler.statistics.waiting > 0
    cancelled = min(on_the_move(sim))
    assert sim.scheduler.cancel(cancelled)
    sim.drain()
    sim.verify()
    assert sim.scheduler.statistics.preemptions > 0
    assert set(sim.reasons) == set(sim.requests) - {cancelled}
    rows = {request: [] for request in range(72, 78)}
    for slot in (slot for iteration in sim.history for slot in iteration.decode if slot.request_id in rows):
        rows[slot.request_id].append(slot.row)
    assert min(rows.pop(cancelled)) >= 16
    assert all(each[0] >= 16 > each[-1] for each in rows.values())


TALL = st.lists(st.tuples(st.integers(1, 200), st.integers(40, 150)), min_size=1, max_size=6)


def test_whatever_stays_after_a_burst_ends_right(simulate):
    """Prompts and answers of any length above the short ones, few pages or many, jobs, cancellations."""
    moved = []

    @settings(max_examples=60, deadline=None)
    @given(TALL, st.integers(0, 2), st.integers(90, 160), st.booleans(), st.integers(0, 80))
    def run(tall, lag, pages, job, steps):
        sim = simulate("flat_out", pages=pages, rows=80, layouts=WIDE, lag=lag)
        for seed in range(72):
            sim.request(words(3, seed), new=25)
        for seed, (length, new) in enumerate(tall):
            sim.request(words(length, seed), new=new)
        if job:
            sim.microbatch(lengths=[100, 60], pages_per_block=2)
        for _ in range(steps):
            sim.step()
        alive = sorted(set(sim.requests) - set(sim.reasons))
        cancelled = {alive[0]} if alive and sim.scheduler.cancel(alive[0]) else set()
        sim.drain()
        sim.verify()
        assert set(sim.reasons) == set(sim.requests) - cancelled
        last = max(sim.requests)
        rows = [slot.row for iteration in sim.history for slot in iteration.decode if slot.request_id == last]
        moved.extend(row for row in rows[-1:] if row < 16 <= rows[0])

    run()
    assert moved
