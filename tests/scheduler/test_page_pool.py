from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flexjax.scheduler.page_pool import PagePool


def test_takes_all_or_nothing():
    pool = PagePool(3)
    assert pool.allocate(4) is None
    assert pool.free == 3
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == ()


def test_refuses_double_free_and_sharing_a_free_page():
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.hold(page)
    pool.release(page)
    assert pool.free == 1
    pool.release(page)
    assert pool.free == 2
    with pytest.raises(ValueError, match="released twice"):
        pool.release(page)
    with pytest.raises(ValueError, match="is free"):
        pool.hold(page)


def test_refuses_an_empty_pool():
    with pytest.raises(ValueError, match="pages is 0"):
        PagePool(0)


class PoolMachine(RuleBasedStateMachine):
    """Against a plain bag of references."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(7)
        self.bag = Counter()

    @rule(count=st.integers(0, 9))
    def allocate(self, count):
        pages = self.pool.allocate(count)
        assert (pages is None) == (count > 7 - len(self.bag))
        for page in pages or ():
            assert page not in self.bag
            self.bag[page] = 1

    @precondition(lambda self: self.bag)
    @rule(data=st.data())
    def hold(self, data):
        page = data.draw(st.sampled_from(sorted(self.bag)))
        self.pool.hold(page)
        self.bag[page] += 1

    @precondition(lambda self: self.bag)
    @rule(data=st.data())
    def release(self, data):
        page = data.draw(st.sampled_from(sorted(self.bag)))
        self.pool.release(page)
        self.bag[page] -= 1
        self.bag = +self.bag

    @invariant()
    def counts_agree(self):
        assert self.pool.free == 7 - len(self.bag)
        assert all(self.pool.references(page) == self.bag[page] for page in range(7))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
