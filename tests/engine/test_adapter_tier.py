"""The tier in virtual time: places written and read by hand, loads that end when the test says so, and every user asked
whether what lies in its place is the version it began with."""

import itertools
import random
from dataclasses import dataclass, field

import pytest

from flexjax.engine.adapter_tier import AdapterTier, User
from flexjax.engine.adapters import NOWHERE, AdapterTable, AdapterVersion, NoRoomForAdapter


class Later(list):
    """An executor that does nothing by itself; ``list.pop(0)()`` is the next thing it was given."""

    def submit(self, function, *arguments) -> None:
        self.append(lambda: function(*arguments))


@dataclass
class World:
    """Attributes:
    device: index -> number of the version that was written there last.
    faulty: versions whose files cannot be read.
    running, refused, waiting: keys of users; of those that run, with their versions.
    """

    places: int = 3
    capacity: int = 24
    device: dict[int, int] = field(default_factory=dict)
    faulty: set[int] = field(default_factory=set)
    running: dict[int, AdapterVersion] = field(default_factory=dict)
    waiting: dict[int, AdapterVersion] = field(default_factory=dict)
    refused: list[int] = field(default_factory=list)
    started: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.loads, self.keys = Later(), itertools.count()
        self.table = AdapterTable(self.places + 1, self.capacity)
        self.tier = AdapterTier(self.table, self.loads)
        self.tier.open(lambda command, *arguments: command(*arguments), self.stage, self.publish)

    def stage(self, version: AdapterVersion) -> int:
        if version.version in self.faulty:
            raise OSError("the file is gone")
        return version.version

    def publish(self, version: AdapterVersion, staged: int) -> None:
        self.device[version.index] = staged

    def load(self, name: str, rank: int = 8) -> AdapterVersion:
        version = self.table.new(name, rank, 1.0)
        self.table.announce(version)
        return version

    def ask(self, version: AdapterVersion, priority: int = 0) -> int:
        """A user arrives; its key."""
        key = next(self.keys)
        self.waiting[key] = version

        def start() -> None:
            self.running[key] = self.waiting.pop(key)
            self.started.append(key)

        def refuse(_: Exception) -> None:
            del self.waiting[key]
            self.refused.append(key)

        self.tier.want(version, key, User((priority, float(key), key), start, refuse))
        self.tier.advance()
        return key

    def train(self, name: str, rank: int = 8) -> AdapterVersion:
        """A job asks for a place, which it fills itself."""
        version = self.table.new(name, rank, 1.0)
        fill = lambda: self.device.__setitem__(version.index, version.version)
        self.tier.want(version, name, User((0, float(next(self.keys)), 0), fill, lambda error: None))
        self.tier.advance()
        return version

    def end(self, key: int) -> None:
        self.tier.release(self.running.pop(key))
        self.tier.advance()

    def give_up(self, key: int) -> None:
        assert self.tier.give_up(self.waiting.pop(key), key)
        self.tier.advance()

    def finish_load(self) -> None:
        self.loads.pop(0)()
        self.tier.advance()

    def finish_loads(self) -> None:
        while self.loads:
            self.finish_load()

    def check(self) -> None:
        """Everybody who runs finds its version in its place; nobody waits without reason."""
        for key, version in self.running.items():
            assert self.table.resident[version.index] is version, f"user {key} lost its place"
            assert self.device[version.index] == version.version, f"user {key} runs with another's adapter"
            assert version not in self.tier.loading
        assert self.tier.waiting == len(self.waiting)
        held = {version for version in self.table.resident.values() if version.holds}
        if self.waiting and not self.loads:
            assert held, "somebody waits, but nothing is held and nothing comes"


@pytest.fixture
def world() -> World:
    return World()


def test_an_adapter_comes_when_it_is_asked_for_and_goes_when_another_is(world):
    a, b, c, d = (world.load(name) for name in "abcd")
    for version in (a, b, c):
        key = world.ask(version)
        assert key in world.waiting
        world.finish_loads()
        assert key in world.running
        world.end(key)
    world.end(world.ask(a))
    key = world.ask(d)
    assert [each.name for each in world.tier.loading] == ["d"] and b.index == NOWHERE, "b was used longest ago"
    world.finish_loads()
    assert world.device[d.index] == d.version and world.tier.evictions == 1 and world.tier.loads == 4
    world.end(key)


def test_serving_goes_on_while_an_adapter_is_on_its_way(world):
    a, b = world.load("a"), world.load("b")
    world.ask(a), world.finish_loads()
    slow = world.ask(b)
    again = world.ask(a)
    assert again in world.running and slow in world.waiting and len(world.loads) == 1
    world.check()


def test_where_all_places_are_held_requests_wait_and_nobody_overtakes_for_ever(world):
    """Users of a, b and c come and go without a pause; one for d comes once."""
    versions = [world.load(name) for name in "abc"]
    keys = [world.ask(version) for version in versions]
    world.finish_loads()
    late = world.ask(world.load("d"))
    for turn in range(12):  # noqa: B007 (looked at behind the loop)
        keys += [world.ask(version) for version in versions]
        if keys[0] in world.running:
            world.end(keys.pop(0))
        world.finish_loads()
        world.check()
        if late in world.running:
            break
    assert turn == 0, "the first place that is drained is free when its one user ends"
    assert sum(key in world.waiting for key in keys) == 1, "of the three that came with it only a's waits"


def test_who_came_before_goes_before_though_its_place_is_drained(world):
    world = World(places=1, capacity=8)
    a, b = world.load("a"), world.load("b")
    first = world.ask(a)
    world.finish_loads()
    other, second, urgent = world.ask(b), world.ask(a), world.ask(a, priority=-1)
    assert urgent in world.running and {other, second} <= set(world.waiting)
    world.end(first), world.end(urgent), world.finish_loads()
    assert other in world.running and second in world.waiting
    world.end(other), world.finish_loads()
    assert second in world.running


def test_users_that_give_up_hold_nobody_back():
    world = World(places=1, capacity=8)
    a, b = world.load("a"), world.load("b")
    world.ask(a), world.finish_loads()
    other, second = world.ask(b), world.ask(a)
    assert second in world.waiting
    world.give_up(other)
    assert second in world.running and b.pins == 0


def test_a_file_that_cannot_be_read_is_told_to_those_who_wait_and_to_no_other(world):
    a, b = world.load("a"), world.load("b")
    world.faulty.add(a.version)
    keys = [world.ask(a), world.ask(a), world.ask(b)]
    world.finish_loads()
    assert world.refused == keys[:2] and list(world.running) == keys[2:] and a.pins == 0 and a.index == NOWHERE
    world.faulty.clear()
    again = world.ask(a)
    world.finish_loads()
    assert again in world.running
    world.check()


def test_a_replaced_version_serves_those_who_waited_for_it(world):
    old = world.load("x")
    waits = world.ask(old)
    new = world.load("x")
    newer = world.ask(new)
    world.finish_loads()
    assert world.running == {waits: old, newer: new} and old.index != new.index
    world.check()
    world.end(waits)
    assert old not in world.table.resident.values()


def test_a_version_that_is_unloaded_on_its_way_leaves_its_place(world):
    key = world.ask(world.load("x"))
    world.give_up(key)
    world.table.remove("x")
    other = world.ask(world.load("y"))
    world.finish_loads()
    assert other in world.running and len(world.table.resident) == 1
    world.check()


def test_what_jobs_leave_no_room_for_is_refused_beforehand():
    world = World(places=2, capacity=24)
    world.train("job", rank=16)
    large, small = world.load("large", rank=16), world.load("small")
    with pytest.raises(NoRoomForAdapter, match="'large' finds no place beside the running jobs job"):
        world.tier.require_possible(large)
    world.tier.require_possible(small)
    stuck, key = world.ask(large), world.ask(small)
    world.finish_loads()
    assert key in world.running and stuck in world.waiting, "one that cannot run keeps nobody waiting"


@pytest.mark.parametrize("seed", range(30))
def test_random_lives(seed):
    """Names are loaded anew, unloaded, asked for, and jobs come and go; a name means what it meant on arrival."""
    turn = random.Random(seed)
    world = World(places=turn.randint(2, 4), capacity=turn.choice([24, 40]))
    meaning, jobs = {}, []

    def load():
        name = turn.choice("abcdefgh")
        meaning[name] = world.load(name, turn.choice([4, 8, 8, 16]))

    def remove():
        if meaning:
            name = turn.choice(sorted(meaning))
            assert world.table.remove(name) is meaning.pop(name)

    def ask():
        if meaning:
            name = turn.choice(sorted(meaning))
            assert world.table.find(name) is meaning[name]
            world.ask(meaning[name], turn.randrange(2))

    def end():
        if world.running:
            world.end(turn.choice(sorted(world.running)))

    def give_up():
        if world.waiting:
            world.give_up(turn.choice(sorted(world.waiting)))

    def begin_job():
        if not jobs:
            jobs.append(world.train("job"))

    def end_job():
        if jobs and jobs[0].index != NOWHERE:
            version = jobs.pop()
            if turn.random() < 0.5:
                world.table.announce(version)
                meaning["job"] = version
            else:
                world.table.discard(version)
            world.tier.release(version)
            world.tier.advance()

    def fail():
        world.faulty ^= {turn.randrange(1, 40)}

    acts = [ask] * 8 + [end] * 7 + [load] * 3 + [remove, give_up, begin_job, end_job, fail]
    for _ in range(400):
        turn.choice(acts)()
        if world.loads and turn.random() < 0.5:
            world.finish_load()
        world.check()
    while jobs:
        end_job()
        end(), world.finish_loads()
    while world.running or world.loads:
        world.finish_loads()
        end()
        world.check()
    assert not world.waiting and len(world.started) > 50
    assert all(version.pins == version.holds == 0 for version in world.table.resident.values())
