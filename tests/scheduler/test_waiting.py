"""Who is seated next, in time, late, and late for too long."""

from flexjax.request import Request, SamplingParams
from flexjax.scheduler.sequence import Sequence
from flexjax.scheduler.waiting import WaitingQueue


def sequence(identifier, arrival, priority=0):
    params = SamplingParams(max_tokens=4)
    return Sequence(Request(identifier, (1, 2, 3), params, 4, arrival=arrival, priority=priority))


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
