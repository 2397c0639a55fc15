"""Curves: few points of long ones, and what is written while they are kept."""

import math

from flexjax.server.curves import MOST_CURVES, MOST_POINTS, Curves, Thinned
from flexjax.server.data_folder import DataFolder
from flexjax.server.job_book import JobBook
from flexjax.server.store import Store


def thinned(steps) -> Thinned:
    found = Thinned()
    for step in steps:
        found.take(step, 1.0 / step)
    return found


def test_short_curves_are_whole():
    assert thinned([]).points == []
    assert thinned(range(1, 100)).points == [(step, 1.0 / step) for step in range(1, 100)]


def test_long_curves_keep_even_distances_and_the_newest():
    """Of 10,000 steps every 128th is left: 120 points at the most, halved seven times."""
    points = thinned(range(1, 10_001)).points
    steps = [step for step, _ in points]
    assert steps == [*range(1, 10_000, 128), 10_000] and len(points) <= MOST_POINTS + 1
    assert all(value == 1.0 / step for step, value in points)


def test_steps_that_are_told_again_are_passed_over():
    assert [step for step, _ in thinned([1, 2, 3, 2, 3, 4]).points] == [1, 2, 3, 4]


def test_a_loss_that_is_no_number_leaves_a_gap():
    """JSON has no such numbers."""
    found = Thinned()
    for step, value in enumerate((2.0, math.nan, math.inf, 1.0), 1):
        found.take(step, value)
    assert found.points == [(1, 2.0), (2, None), (3, None), (4, 1.0)]


def step_event(step: int) -> dict:
    return {"type": "step", "time": 5.0, "step": step, "loss": 8.0 / step, "learning_rate": 0.1, "grad_norm": 1.0} | {
        "tokens": 10
    }


def test_what_is_written_after_the_first_look_is_in_it_once(tmp_path):
    folder, store = DataFolder(tmp_path), Store(tmp_path / "state.sqlite")
    book = JobBook(store, folder)
    row = {"id": "ftjob-a", "created": 5, "name": "ft:a", "request": {}, "status": "queued", "trained_tokens": 0}
    assert store.add("jobs", **row)
    book.follow("ftjob-a", [step_event(1)], 0, 3, "running")
    curve = book.curves.of("ftjob-a")
    evaluation = {"type": "evaluation", "time": 6.0, "step": 2, "loss": 5.0}
    events = [step_event(1), step_event(2), evaluation]
    for _ in range(2):  # a job that resumes tells again
        book.follow("ftjob-a", events, 0, 3, "running")
    for found in (curve, Curves(store).of("ftjob-a")):
        assert (found.step, found.total_steps) == (2, 3)
        assert found.train.points == [(1, 8.0), (2, 4.0)] and found.validation.points == [(2, 5.0)]
    for number in range(MOST_CURVES):
        assert book.curves.of(f"ftjob-{number}").train.points == []
    assert book.curves.of("ftjob-a") is not curve, "those that nobody looks at are forgotten"
    assert book.curves.of("ftjob-a").train.points == curve.train.points
    store.close()
    folder.close()
