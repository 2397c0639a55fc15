"""What an engine asks of the interpreter while it runs, and that its memory comes back afterwards."""

import gc
import sys
import weakref

import pytest

from flexjax.engine.interpreter import SWITCH_SECONDS, prompt_interpreter


@pytest.fixture(autouse=True)
def as_it_was():
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)


class Loop:
    """Refers to itself, as an engine does through its thread."""

    def __init__(self):
        self.itself = self


def test_what_was_there_before_is_not_searched_meanwhile():
    with prompt_interpreter():
        assert gc.get_freeze_count() > 1000
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    assert gc.get_freeze_count() == 0


def test_what_was_there_before_can_go_afterwards():
    """Also if another engine began while this one ran: both are given up, cycles and all."""
    first = Loop()
    with prompt_interpreter():
        second = Loop()
        with prompt_interpreter():
            gone = [weakref.ref(first), weakref.ref(second)]
            del first, second
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_an_engine_that_fails_leaves_nothing_behind():
    with pytest.raises(ZeroDivisionError), prompt_interpreter():
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0
