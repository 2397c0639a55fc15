"""Who is seated next: in time, late, late for too long, and given up for others."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.layout import PAGE_TOKENS
from flexjax.request import Request, SamplingParams
from flexjax.scheduler.sequence import Sequence
from flexjax.scheduler.waiting import LOOK_SECONDS, OTHERS_FIRST, WaitingQueue

NEVER = -1e9


def sequence(identifier, arrival, priority=0, tiles=1):
    params = SamplingParams(max_tokens=4)
    prompt = (1,) * (PAGE_TOKENS * tiles - 3)
    return Sequence(Request(identifier, prompt, params, 4, arrival=arrival, priority=priority))


def order(queue, **bounds):
    """Ids in the order in which they would be seated."""
    found = []
    while (first := queue.peek(**bounds)) is not None:
        found.append(first.request.id)
        queue.remove(first)
    return found


def filled(*sequences):
    queue = WaitingQueue()
    for each in sequences:
        queue.push(each)
    return queue


def test_without_a_deadline_they_are_seated_in_turn():
    assert order(filled(sequence(1, 3.0), sequence(2, 1.0), sequence(3, 2.0))) == [2, 3, 1]


def test_those_already_late_stand_behind_those_in_time():
    queue = filled(sequence(1, 3.0), sequence(2, 1.0), sequence(3, 2.0), sequence(4, 6.0))
    assert order(queue, late_before=2.5) == [1, 4, 2, 3]


def test_those_late_for_too_long_are_first_again():
    queue = filled(sequence(1, 9.0), sequence(2, 1.0), sequence(3, 4.0))
    assert order(queue, late_before=8.0, lost_before=2.0) == [2, 1, 3]


def test_priority_comes_before_lateness_and_a_begun_answer_is_never_late():
    begun = sequence(3, 0.0)
    begun.tokens.append(7)
    queue = filled(sequence(1, 9.0, priority=1), sequence(2, 1.0), begun, sequence(4, 8.0))
    assert order(queue, late_before=5.0) == [3, 4, 2, 1]
    assert len(queue) == queue.tokens == 0


def in_time(queue, tiles):
    """How many have their prompt computed by their deadline, which is their arrival, at a tile a second."""
    now = count = 0
    while len(queue):
        queue.give_up(now, pace=1.0)
        first = queue.peek(now, NEVER)
        queue.remove(first)
        now += tiles[first.request.id]
        count += now <= first.request.arrival
    return count


def most_in_time(jobs):
    """Of all orders, the best."""
    best = 0
    for order in permutations(jobs):
        now = count = 0
        for tiles, deadline in order:
            now += tiles
            count += now <= deadline
        best = max(best, count)
    return best


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20)), max_size=6))
def test_no_order_has_fewer_late(jobs):
    tiles = [job[0] for job in jobs]
    queue = filled(*(sequence(place, deadline, tiles=size) for place, (size, deadline) in enumerate(jobs)))
    assert in_time(queue, tiles) == most_in_time(jobs)


def five(first_tiles=7):
    """Pinedo, Scheduling, example 3.3.3: deadlines at 9, 17, 18, 19 and 21 seconds, at a tile a second."""
    jobs = (first_tiles, 9), (8, 17), (4, 18), (6, 19), (6, 21)
    return filled(*(sequence(place, deadline, tiles=tiles) for place, (tiles, deadline) in enumerate(jobs, 1)))


def test_the_longest_in_the_way_are_given_up():
    """1 and 2 are done after 7 and 15 seconds, 3 after 19: too late, and 2 goes. 4 is done after 17 seconds, 5 after
    23: too late, and 1 goes."""
    queue = five()
    queue.give_up(0.0, pace=1.0)
    assert order(queue, late_before=0.0) == [3, 4, 5, 1, 2]


def test_nobody_is_given_up_while_all_are_in_time_or_the_pace_or_the_deadline_is_unknown():
    for late_before, pace in ((0.0, 31 / 21 + 0.01), (0.0, None), (None, 1.0)):
        queue = five(first_tiles=6)
        queue.give_up(late_before, pace)
        assert order(queue, late_before=late_before) == [1, 2, 3, 4, 5]


def test_equal_prompts_keep_their_turn():
    queue = filled(*(sequence(place, 10.0 + place, tiles=3) for place in range(20)))
    queue.give_up(0.0, pace=1.0)
    assert order(queue, late_before=0.0) == list(range(20))


def test_who_would_be_late_even_as_the_first_takes_nobodys_place():
    queue = filled(sequence(1, 4.0, tiles=5), sequence(2, 5.0, tiles=5), sequence(3, 6.0, tiles=5))
    queue.give_up(0.0, pace=1.0)
    assert order(queue, late_before=0.0) == [2, 3, 1]


def test_nobody_is_given_up_for_a_lower_priority():
    """The urgent one takes 5 seconds. Of the others, 4 and 1 are done at 9 and 10 seconds and another 1 at 11."""
    others = (2, 10.0, 4), (3, 10.0, 1), (4, 10.5, 1)
    low = [sequence(place, deadline, priority=1, tiles=tiles) for place, deadline, tiles in others]
    queue = filled(sequence(1, 50.0, tiles=5), *low)
    queue.give_up(0.0, pace=1.0)
    assert order(queue, late_before=0.0) == [1, 3, 4, 2]


def test_a_begun_answer_takes_its_time_and_is_not_given_up():
    begun = sequence(1, 0.0, tiles=8)
    begun.tokens.append(7)
    queue = filled(begun, sequence(2, 11.0, tiles=3), sequence(3, 12.0, tiles=2))
    queue.give_up(0.0, pace=1.0)
    assert order(queue, late_before=0.0) == [1, 3, 2]


def test_those_given_up_are_first_when_they_have_waited_enough_and_served_when_nobody_else_waits():
    queue = five()
    queue.give_up(0.0, pace=1.0)
    newcomer = sequence(6, 40.0)
    queue.push(newcomer)
    assert queue.peek(late_before=30.0, lost_before=8.0) is newcomer
    assert queue.peek(late_before=30.0, lost_before=10.0).request.id == 1
    queue.remove(newcomer)
    assert queue.peek(late_before=30.0, lost_before=8.0).request.id == 1


@pytest.mark.parametrize(("later", "first"), [(0.4, 1), (1.1, 2)])
def test_it_looks_only_now_and_then(later, first):
    queue = filled(sequence(1, 9.0, tiles=5))
    queue.give_up(0.0, pace=1.0)
    queue.push(sequence(2, 9.5, tiles=4))
    queue.push(sequence(3, 9.6, tiles=2))
    queue.give_up(later * LOOK_SECONDS, pace=1.0)
    assert queue.peek(late_before=0.0).request.id == first


def taken(queue, **bounds):
    """Ids in the order in which they are seated."""
    found = []
    while (first := queue.peek(**bounds)) is not None:
        found.append(first.request.id)
        queue.take(first, bounds["lost_before"])
    return found


def test_those_late_for_too_long_get_a_share_and_not_everything():
    lost = [sequence(place, 1.0 + place, tiles=2) for place in range(3)]
    others = [sequence(100 + place, 90.0 + place) for place in range(3 * OTHERS_FIRST)]
    late = sequence(50, 60.0)
    share = 2 * OTHERS_FIRST
    expected = [0, *range(100, 100 + share), 1, *range(100 + share, 100 + len(others)), 2, 50]
    assert taken(filled(*lost, *others, late), late_before=80.0, lost_before=50.0) == expected


def test_a_share_that_nobody_missed_is_not_saved_up():
    queue = filled(*(sequence(place, 90.0 + place, tiles=50) for place in range(5)))
    taken(queue, late_before=80.0, lost_before=50.0)
    for each in (sequence(10, 1.0), sequence(11, 2.0), sequence(12, 99.0)):
        queue.push(each)
    assert taken(queue, late_before=80.0, lost_before=50.0) == [10, 12, 11]


def test_a_share_taken_while_nobody_else_waited_is_not_owed():
    queue = filled(*(sequence(place, 1.0, tiles=10) for place in range(20)))
    taken(queue, late_before=80.0, lost_before=50.0)
    last, others = sequence(99, 2.0), [sequence(100 + place, 90.0) for place in range(200)]
    for each in (last, *others):
        queue.push(each)
    assert taken(queue, late_before=80.0, lost_before=50.0).index(99) <= 10 * OTHERS_FIRST


def test_those_given_up_come_back_when_the_pace_was_wrong():
    queue = filled(*(sequence(place, 10.0 + place / 100, tiles=8) for place in range(5)), sequence(9, 10.2))
    queue.give_up(8.0, pace=1.0)
    assert queue.peek(late_before=8.0).request.id == 9
    queue.give_up(8.0 + LOOK_SECONDS, pace=1000.0)
    assert order(queue, late_before=8.0 + LOOK_SECONDS) == [0, 1, 2, 3, 4, 9]


def test_those_given_up_come_back_when_the_pace_is_not_known_any_more():
    queue = five()
    queue.give_up(0.0, pace=1.0)
    queue.give_up(LOOK_SECONDS, pace=None)
    assert order(queue, late_before=LOOK_SECONDS) == [1, 2, 3, 4, 5]


def test_the_shortest_are_those_of_a_priority():
    urgent, others = sequence(1, 50.0), [sequence(place, 10.0 + place, priority=1, tiles=3) for place in range(2, 20)]
    queue = filled(urgent, *others)
    queue.give_up(0.0, pace=1.0)
    assert order(queue, late_before=0.0) == list(range(1, 20))


def test_a_preempted_request_stands_in_the_queue_once():
    queue, first = filled(sequence(1, 1.0), sequence(2, 2.0)), sequence(0, 0.0)
    queue.push(first)
    queue.take(queue.peek())
    queue.push(first)
    assert order(queue) == [0, 1, 2]
    assert len(queue._heap) == 0
