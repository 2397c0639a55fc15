"""AdapterTier: who gets a place on the device when there are more adapters than places, and who waits for one.

Everything happens on the engine's thread, but what brings an adapter to the device: reading its file and copying it
take long, and iterations go on meanwhile.

Order: whoever finds its adapter on the device starts at once. Others wait, and the most senior of them goes first:
its adapter takes the place of the one least recently used that nobody holds. Where all are held, one of them is
*drained*: those who hold it end in peace, but its later requests line up behind the senior one, so that nobody waits
for ever. (Who holds a place may itself wait for a row, behind requests of higher priority; if there are always some,
both wait.)
"""

import heapq
import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

from flexjax.engine.adapters import NOWHERE, AdapterTable, AdapterVersion, NoRoomForAdapter

logger = logging.getLogger(__name__)

Seniority = tuple[int, float, int]
"""Priority, arrival in seconds, number: the smaller goes first."""


@dataclass(frozen=True)
class User:
    """Somebody who needs an adapter on the device.

    Attributes:
        start: called when it is there; refuse: called with the reason if it cannot be brought there.
    """

    seniority: Seniority
    start: Callable[[], None]
    refuse: Callable[[Exception], None]


@dataclass(eq=False)
class Line:
    """Users who wait for one version, the most senior first."""

    users: dict[Any, User] = field(default_factory=dict)
    _heap: list[tuple[Seniority, Any]] = field(default_factory=list)

    def add(self, key: Any, user: User) -> None:
        self.users[key] = user
        heapq.heappush(self._heap, (user.seniority, key))

    @property
    def first(self) -> Seniority:
        """Of the most senior; there must be one."""
        while self._heap[0][1] not in self.users:
            heapq.heappop(self._heap)
        return self._heap[0][0]

    def in_order(self) -> list[User]:
        return sorted(self.users.values(), key=lambda user: user.seniority)


class AdapterTier:
    """Args:
    loader: runs one thing after another.

    Attributes:
    lines: users who wait, by version.
    loading: versions that have a place but are not there yet.
    draining: versions that are to leave, each with the seniority of the user they leave for.
    loads, evictions: so far.
    """

    def __init__(self, table: AdapterTable, loader: Executor):
        self.table, self._loader = table, loader
        self.lines: dict[AdapterVersion, Line] = {}
        self.loading: set[AdapterVersion] = set()
        self.draining: dict[AdapterVersion, Seniority] = {}
        self.loads = self.evictions = 0
        self._changed = False

    def open(
        self,
        post: Callable[..., Any],
        stage: Callable[[AdapterVersion], Any],
        publish: Callable[[AdapterVersion, Any], None],
    ) -> None:
        """Before anything else.

        Args:
            post: has a function called on the engine's thread.
            stage: called on the loader's thread; what it returns, ``publish`` takes on the engine's.
        """
        self._post, self._stage, self._publish = post, stage, publish

    def close(self) -> None:
        """Wait for what is being loaded; nothing is loaded any more."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Users who wait for an adapter that serves; jobs are not counted."""
        return sum(len(line.users) for version, line in self.lines.items() if version.announced)

    @property
    def wants_turn(self) -> bool:
        """`advance` may find something to do."""
        return self._changed and bool(self.lines)

    def require_possible(self, version: AdapterVersion) -> None:
        """Raises NoRoomForAdapter if only the end of a job could make room for it."""
        if version.index == NOWHERE and self.table.leavers(version) is None:
            jobs = sorted(each.name for each in self.table.resident.values() if not each.announced)
            raise NoRoomForAdapter(
                f"adapter {version.name!r} finds no place beside the running jobs {', '.join(jobs)}, which keep theirs "
                f"to their end; of {self.table.adapters - 1} places and {self.table.rank_capacity} columns they leave "
                "too few: raise max_adapters or adapter_rank_capacity, or cancel one"
            )

    def want(self, version: AdapterVersion, key: Any, user: User) -> None:
        """Start a user now, or once its adapter is on the device. It pins the version until `release` or `give_up`."""
        self.table.pin(version)
        if self._ready(version) and not self._in_line(version, user):
            self._start(version, user)
            return
        self.lines.setdefault(version, Line()).add(key, user)
        self._changed = True

    def give_up(self, version: AdapterVersion, key: Any) -> bool:
        """A user that still waits does so no more; False if it does not wait."""
        if version not in self.lines or key not in self.lines[version].users:
            return False
        del self.lines[version].users[key]
        if not self.lines[version].users:
            del self.lines[version]
        self._changed = True
        self.table.unpin(version)
        return True

    def release(self, version: AdapterVersion) -> None:
        """A user that was started has ended."""
        self.table.release(version)
        self._changed = self._changed or version.holds == 0

    def prefetch(self, version: AdapterVersion) -> bool:
        """Give a version a place if one is free; whether it has one. The caller publishes it at once."""
        return self.table.try_seat(version)

    def advance(self) -> None:
        """Give places to those who wait, as far as there are any. Cheap if nothing has changed."""
        while self.wants_turn:
            self._changed = False
            self._settle()

    def _settle(self) -> None:
        self.draining = {}
        for version in sorted(self.lines, key=lambda each: self.lines[each].first):
            if version in self.loading:
                continue
            if self._ready(version):
                if version not in self.draining:
                    self._start_all(version)
            elif self.table.leavers(version) is not None and not self._claim(version):
                return  # nobody overtakes

    def _claim(self, version: AdapterVersion) -> bool:
        """Find a place for the most senior line; False if all are promised to others already."""
        leaving = self.table.leavers(version, staying=self.loading | self.draining.keys())
        if leaving is None:
            return False
        if any(each.holds for each in leaving):
            self.draining.update(dict.fromkeys(leaving, self.lines[version].first))
            return True
        for each in leaving:
            self.table.evict(each)
            self.evictions += 1
        seated = self.table.try_seat(version)
        assert seated, f"adapter version {version.version} does not fit where room was made for it"
        if version.announced:
            self.loading.add(version)
            self._loader.submit(self._load, version)
        else:
            self._start_all(version)  # a job fills its place itself
        return True

    def _load(self, version: AdapterVersion) -> None:
        """On the loader's thread."""
        staged: Future = Future()
        try:
            staged.set_result(self._stage(version))
        except Exception as error:  # told to those who wait for it
            staged.set_exception(error)
        self._post(self._loaded, version, staged)

    def _loaded(self, version: AdapterVersion, staged: Future) -> None:
        self.loading.discard(version)
        self._changed = True
        if self.table.resident.get(version.index) is not version:
            return  # it was unloaded meanwhile
        try:
            self._publish(version, staged.result())
        except Exception as error:  # of reading, copying or writing; the place must not be taken for filled
            self._refuse_all(version, error)
            return
        self.loads += 1
        self._start_all(version)

    def _refuse_all(self, version: AdapterVersion, error: Exception) -> None:
        logger.error("adapter %r cannot be brought to the device: %s", version.name, error)
        self.table.evict(version)
        for user in self.lines.pop(version, Line()).in_order():
            user.refuse(error)
            self.table.unpin(version)

    def _ready(self, version: AdapterVersion) -> bool:
        return version.index != NOWHERE and version not in self.loading

    def _in_line(self, version: AdapterVersion, user: User) -> bool:
        """Whether a user has to wait although its adapter is there."""
        return version in self.draining and user.seniority > self.draining[version]

    def _start_all(self, version: AdapterVersion) -> None:
        for user in self.lines.pop(version, Line()).in_order():
            self._start(version, user)

    def _start(self, version: AdapterVersion, user: User) -> None:
        self.table.hold(version)
        user.start()
