"""The adapter table: pins keep versions, names move on, ranges never overlap, and nobody gets another's version."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flexjax.engine.adapters import BASE, AdapterTable, NoRoomForAdapter, UnknownAdapter


@pytest.fixture
def table() -> AdapterTable:
    """Three places and eight units of the rank axis."""
    return AdapterTable(adapters=4, rank_capacity=64)


def load(table: AdapterTable, name: str, rank: int = 8, scale: float = 1.0):
    version = table.new(name, rank, scale)
    assert table.try_seat(version), "no place is free"
    table.announce(version)
    return version


def test_no_name_is_the_base_model(table):
    assert table.find(None) is BASE
    assert (BASE.index, BASE.version) == (0, 0)


def test_unknown_names_are_refused_with_those_that_are_loaded(table):
    with pytest.raises(UnknownAdapter, match="adapter 'x' is not loaded; loaded adapters: none"):
        table.find("x")
    load(table, "b"), load(table, "a")
    with pytest.raises(UnknownAdapter, match="loaded adapters: a, b"):
        table.remove("x")


def test_a_seated_version_is_not_found_before_it_is_announced(table):
    old = load(table, "x")
    new = table.new("x", 8, 1.0)
    assert table.try_seat(new) and table.find("x") is old
    assert table.announce(new) is old
    assert table.find("x") is new


def test_a_pinned_version_outlives_its_name_and_keeps_its_place(table):
    old = table.pin(load(table, "x", rank=16))
    new = load(table, "x", rank=16)
    assert table.find("x") is new and old.index != new.index
    load(table, "y")
    assert not table.has_room(16) and not table.try_seat(table.new("z", 16, 1.0))
    place = old.index
    table.unpin(old)
    assert load(table, "z", rank=16).index == place


def test_a_version_goes_with_its_last_pin(table):
    version = load(table, "x")
    table.pin(version), table.pin(version)
    table.remove("x")
    table.unpin(version)
    assert version in table.resident.values()
    table.unpin(version)
    assert not table.resident
    with pytest.raises(AssertionError, match="unpinned once too often"):
        table.unpin(version)


def test_a_named_version_stays_without_pins(table):
    version = load(table, "x")
    table.unpin(table.pin(version))
    assert table.find("x") is version and version.index in table.resident


def test_a_discarded_version_leaves_the_name_alone(table):
    old = load(table, "x")
    given_up = table.new("x", 8, 1.0)
    assert table.try_seat(given_up)
    table.discard(given_up)
    assert table.find("x") is old and list(table.resident) == [old.index]


def test_what_is_larger_than_all_places_is_refused_with_the_setting(table):
    words = "'c' of rank 65 needs 72 columns, and there are 64; raise adapter_rank_capacity"
    with pytest.raises(NoRoomForAdapter, match=words):
        table.new("c", 65, 1.0)


def test_those_leave_who_were_used_longest_ago(table):
    """Eight units: a has 0 and 1, b 2, c 3; the three places are taken."""
    a, b, c = load(table, "a", rank=16), load(table, "b"), load(table, "c")
    for version in (a, b, c, a):
        table.hold(table.pin(version))
    for version in (a, a, b, c):
        table.release(version)
    assert table.leavers(table.new("d", 8, 1.0)) == [b]
    table.hold(table.pin(b))
    assert table.leavers(table.new("d", 8, 1.0)) == [c], "b is held"
    assert table.leavers(table.new("d", 48, 1.0)) == [c, b], "the range before them is too short, so c is not enough"
    assert table.leavers(table.new("d", 40, 1.0)) == [c], "units 3 to 7"
    assert table.leavers(table.new("d", 8, 1.0), staying={a, c}) == [b], "none but one that is held"
    assert table.leavers(table.new("d", 8, 1.0), staying={a, b, c}) is None


def test_jobs_never_leave(table):
    """The version of a job is not announced before its end; it lies in the middle here."""
    load(table, "a")
    job = table.new("job", 8, 1.0)
    assert table.try_seat(job) and table.leavers(table.new("d", 48, 1.0)) == []
    assert table.leavers(table.new("d", 56, 1.0)) is None
    table.announce(job)
    assert len(table.leavers(table.new("d", 64, 1.0))) == 2


def test_an_evicted_version_has_no_place_and_gets_another(table):
    version = load(table, "x")
    table.evict(version)
    with pytest.raises(AssertionError, match="no place to hold"):
        table.hold(table.pin(version))
    load(table, "y")
    assert table.try_seat(version) and (version.index, version.first_unit) == (2, 1)
    assert table.find("x") is version


def test_a_version_that_nobody_can_ask_for_is_told_of():
    dropped = []
    table = AdapterTable(adapters=2, rank_capacity=8, on_drop=dropped.append)
    first = table.pin(load(table, "x"))
    table.evict(first)
    second = load(table, "x")
    assert dropped == []
    table.unpin(first)
    assert dropped == [first]
    table.remove("x")
    assert dropped == [first, second]


def test_a_gap_is_used_again(table):
    for name, rank in (("a", 16), ("b", 9), ("c", 32)):
        load(table, name, rank)
    table.remove("b")
    assert load(table, "d", rank=16).first_column == 16


def test_fill_writes_owners_by_unit_and_scales_by_index(table):
    load(table, "gone", rank=8)
    first = load(table, "a", rank=12, scale=0.5)
    table.remove("gone")
    second = load(table, "b", rank=8, scale=2.0)
    owner, scale = np.full((1, 8), 9, np.int32), np.zeros(4, np.float32)
    table.fill(owner, scale)
    assert owner[0].tolist() == [second.index, first.index, first.index, 0, 0, 0, 0, 0]
    assert (scale[first.index], scale[second.index]) == (0.5, 2.0)


class Life(RuleBasedStateMachine):
    """Loads, requests and removals in any order, against a list of who pinned what."""

    def __init__(self):
        super().__init__()
        self.table = AdapterTable(adapters=5, rank_capacity=72)
        self.pinned, self.newest, self.seen = [], {}, []

    @rule(name=st.sampled_from("abc"), rank=st.integers(1, 40))
    def load(self, name, rank):
        if not self.table.has_room(rank):
            return
        version = load(self.table, name, rank)
        self.newest[name] = version
        self.seen.append(version.version)

    @rule(name=st.sampled_from("abc"))
    def begin_request(self, name):
        if name in self.newest:
            self.pinned.append((self.table.pin(self.table.find(name)), self.newest[name]))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def end_request(self, data):
        version, _ = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        self.table.unpin(version)

    @rule(name=st.sampled_from("abc"))
    def remove(self, name):
        if self.newest.pop(name, None):
            self.table.remove(name)

    @invariant()
    def requests_keep_the_version_they_began_with(self):
        for version, begun_with in self.pinned:
            assert version is begun_with and self.table.resident[version.index] is version

    @invariant()
    def only_what_is_named_or_pinned_stays(self):
        needed = {id(version) for version, _ in self.pinned} | {id(version) for version in self.newest.values()}
        assert {id(version) for version in self.table.resident.values()} == needed

    @invariant()
    def ranges_do_not_overlap(self):
        units = [unit for v in self.table.resident.values() for unit in range(v.first_unit, v.first_unit + v.units)]
        assert len(units) == len(set(units)) and all(0 <= unit < 9 for unit in units)
        assert 0 not in self.table.resident

    @invariant()
    def numbers_are_never_used_again(self):
        assert len(self.seen) == len(set(self.seen)) and 0 not in self.seen


TestLife = Life.TestCase
