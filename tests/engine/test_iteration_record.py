"""Where the time of an iteration went, worked out by hand, and what is remembered of all of them."""

import gc

import pytest

from flexjax.engine.metrics import History, IterationRecord, SettledMicrobatch, record_of
from flexjax.layout import SlotLayout
from flexjax.scheduler.output import DecodeSlot, Iteration, Unit, UnitKind, WindowSegment

LAYOUT = SlotLayout(rows=4, chunk=64, tape=True)
DECODE = (DecodeSlot(row=0, request_id=1, position=5, pages=(3,)),)
WINDOWS = (WindowSegment("job", 0, 0, 0, 0, 64, 0),)
UNITS = (Unit(UnitKind.BACKWARD, "job", 0, layer=1, window=0, slots=64),)


def record(decode=(), windows=(), units=(), unit_seconds=0.0, serving_seconds=0.0) -> IterationRecord:
    """It was to take 8 s and took 16."""
    iteration = Iteration(0, LAYOUT, decode, (), windows, units, 8.0, None, 0, unit_seconds=unit_seconds)
    return record_of(iteration, start=0.0, seconds=16.0, serving_seconds=serving_seconds)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        # 2 of 8 for the row alone and 5 for units, which leaves 1 for the windows: all twice as long
        (dict(decode=DECODE, windows=WINDOWS, units=UNITS, unit_seconds=5.0, serving_seconds=2.0), (4, 0, 2, 10)),
        # without windows all that is not the row's is the units', the engine's own time included
        (dict(decode=DECODE, units=UNITS, unit_seconds=5.0, serving_seconds=2.0), (4, 0, 0, 12)),
        (dict(units=UNITS, unit_seconds=7.0), (0, 0, 0, 16)),
        (dict(windows=WINDOWS), (0, 0, 16, 0)),
        (dict(decode=DECODE, windows=WINDOWS, serving_seconds=6.0), (12, 0, 4, 0)),
        (dict(decode=DECODE, serving_seconds=8.0), (16, 0, 0, 0)),
        # foretold shares that overlap are cut at what there is
        (dict(decode=DECODE, windows=WINDOWS, units=UNITS, unit_seconds=7.0, serving_seconds=4.0), (8, 0, 0, 8)),
    ],
)
def test_parts(values, parts):
    found = record(**values)
    assert found.parts == parts and sum(found.parts) == found.seconds
    assert found.split == (parts[0], parts[1], parts[2] + parts[3])


def test_a_history_keeps_the_newest():
    made = [SettledMicrobatch("a job", index, 64, 60) for index in range(5)]
    history = History(SettledMicrobatch, most=3)
    assert not history and list(history) == []
    for each in made:
        history.append(each)
    assert len(history) == 3 and list(history) == made[2:] and list(reversed(history)) == made[:1:-1]
    assert (history[0], history[-1]) == (made[2], made[4]) and history[-1].tokens == 64
    shown = iter(history)
    history.append(made[0])
    assert list(shown) == made[2:], "others may read while the engine goes on"


def searched() -> int:
    gc.collect()
    return len(gc.get_objects())


def test_what_is_remembered_is_not_searched_for_garbage():
    history, before = History(IterationRecord, most=1000), searched()
    for _ in range(2000):
        history.append(record(decode=DECODE))
    assert searched() - before < 100
    assert history[-1] == history[0] == record(decode=DECODE)
