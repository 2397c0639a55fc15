"""AdapterTable: which adapter versions there are, which of them have a place on the device, and who uses them. Plain
Python.

A version, once announced, never changes; a request pins the version that it began with. A name points to its newest
version; older ones go when their last pin does. A version that nobody holds may lose its place and get another one
later. The flat rank axis is handed out in units of 8 columns.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from flexjax.layout import RANK_UNIT

NOWHERE = -1
"""Index of a version without a place: not 0, which would mean the base model."""


class UnknownAdapter(ValueError):
    """A request names an adapter that is not loaded. Never answered by the base model."""


class NoRoomForAdapter(ValueError):
    """An adapter can have no place on the device, or none in the host's memory."""


@dataclass(eq=False)
class AdapterVersion:
    """One immutable set of adapter weights.

    Attributes:
        version: unique number, never reused; 0 is the base model.
        units: of the rank axis that it needs.
        scale: what x A B is multiplied by.
        products: positions in `flexjax.models.lora.PRODUCTS` of those that it adds to; None as long as nobody knows.
        index: place on the stacked adapter axis; 0 means no adapter, NOWHERE that it has no place now.
        first_unit: where its range of the rank axis begins.
        pins: requests, tapes and jobs that use it, or wait until they can.
        holds: those of them that need its place; while there are any it keeps it.
        used: rises with every hold: of two versions, the smaller was used longer ago.
        announced: it serves, or has served; a job's version is not announced before the job has succeeded.
        retired: no name points to it any more.
    """

    name: str | None
    version: int
    units: int
    scale: float
    products: tuple[int, ...] | None = None
    index: int = NOWHERE
    first_unit: int = 0
    pins: int = 0
    holds: int = 0
    used: int = 0
    announced: bool = False
    retired: bool = False

    @property
    def first_column(self) -> int:
        return self.first_unit * RANK_UNIT


BASE = AdapterVersion(name=None, version=0, units=0, scale=0.0, index=0, announced=True)


@dataclass
class AdapterTable:
    """Versions by name, index and range.

    Args:
        adapters: adapter indices, 0 included (`max_adapters` + 1).
        rank_capacity: columns of the flat rank axis (`adapter_rank_capacity`).
        on_drop: called with a version that nobody can ask for any more.
    """

    adapters: int
    rank_capacity: int
    on_drop: Callable[[AdapterVersion], None] = lambda version: None
    named: dict[str, AdapterVersion] = field(default_factory=dict)
    resident: dict[int, AdapterVersion] = field(default_factory=dict)
    newest: int = 0
    _uses: int = 0

    def new(self, name: str, rank: int, scale: float) -> AdapterVersion:
        """A version without a place, that no name points to yet (see `announce`).

        Raises:
            NoRoomForAdapter: it is larger than all places together.
        """
        self.require_size(name, rank)
        self.newest += 1
        return AdapterVersion(name, self.newest, -(-rank // RANK_UNIT), scale)

    def require_size(self, name: str, rank: int) -> None:
        """Raises NoRoomForAdapter if an adapter is larger than all places together."""
        columns = -(-rank // RANK_UNIT) * RANK_UNIT
        if columns > self.rank_capacity:
            raise NoRoomForAdapter(
                f"adapter {name!r} of rank {rank} needs {columns} columns, and there are {self.rank_capacity}; raise "
                "adapter_rank_capacity"
            )

    def has_room(self, rank: int) -> bool:
        """Whether a version of this rank finds a place that is free."""
        return self._vacancy(-(-rank // RANK_UNIT)) is not None

    def try_seat(self, version: AdapterVersion) -> bool:
        """Give it a free index and a free range, if there are both."""
        found = self._vacancy(version.units)
        if found is not None:
            version.index, version.first_unit = found
            self.resident[version.index] = version
        return found is not None

    def evict(self, version: AdapterVersion) -> None:
        """Take its place away; nobody must hold it."""
        assert version.holds == 0, f"adapter version {version.version} was evicted while {version.holds} hold it"
        del self.resident[version.index]
        version.index = NOWHERE

    def leavers(self, version: AdapterVersion, staying: Collection[AdapterVersion] = ()) -> list[AdapterVersion] | None:
        """Who has to leave so that a version fits: as few as possible, first those that nobody holds, the least
        recently used first. None if it does not fit beside ``staying`` and the versions of jobs, which never leave."""
        movable = [each for each in self.resident.values() if each.announced and each not in staying]
        movable.sort(key=lambda each: (each.holds > 0, each.used))
        fits = lambda gone: self._vacancy(version.units, gone) is not None
        count = next((n for n in range(len(movable) + 1) if fits(movable[:n])), None)
        if count is None:
            return None
        gone = movable[:count]
        for each in movable[:count][::-1]:  # a gap between two that stay may be what was needed
            rest = [other for other in gone if other is not each]
            gone = rest if fits(rest) else gone
        return gone

    def announce(self, version: AdapterVersion) -> AdapterVersion | None:
        """Point the version's name to it; returns the version that the name pointed to before, now retired."""
        before = self.named.get(version.name)
        self.named[version.name] = version
        version.announced = True
        if before is version:
            return None
        if before is not None:
            self._retire(before)
        return before

    def find(self, name: str | None) -> AdapterVersion:
        """The newest version of a name; None is the base model.

        Raises:
            UnknownAdapter: no adapter of that name is loaded.
        """
        if name is None:
            return BASE
        if name not in self.named:
            loaded = ", ".join(sorted(self.named)) or "none"
            raise UnknownAdapter(f"adapter {name!r} is not loaded; loaded adapters: {loaded}")
        return self.named[name]

    def pin(self, version: AdapterVersion) -> AdapterVersion:
        version.pins += 1
        return version

    def unpin(self, version: AdapterVersion) -> None:
        assert version.pins > 0, f"adapter version {version.version} was unpinned once too often"
        version.pins -= 1
        self._drop_if_unused(version)

    def hold(self, version: AdapterVersion) -> None:
        """Somebody who has pinned it needs its place from now on."""
        assert version.index != NOWHERE, f"adapter version {version.version} has no place to hold"
        version.holds += 1
        self._uses += 1
        version.used = self._uses

    def release(self, version: AdapterVersion) -> None:
        """The end of a hold and its pin."""
        assert version.holds > 0, f"adapter version {version.version} was released once too often"
        version.holds -= 1
        self.unpin(version)

    def remove(self, name: str) -> AdapterVersion:
        """Take a name away; requests that pinned its version keep it. Raises UnknownAdapter."""
        version = self.find(name)
        del self.named[name]
        self._retire(version)
        return version

    def discard(self, version: AdapterVersion) -> None:
        """Give up a version that was never announced."""
        self._retire(version)

    def fill(self, owner: np.ndarray, scale: np.ndarray) -> None:
        """Write who owns each unit of the rank axis in each product, [products, units] int32, and every scale,
        [adapters] float32."""
        owner[...] = 0
        for version in self.resident.values():
            products = slice(None) if version.products is None else list(version.products)
            owner[products, version.first_unit : version.first_unit + version.units] = version.index
            scale[version.index] = version.scale

    def _retire(self, version: AdapterVersion) -> None:
        version.retired = True
        self._drop_if_unused(version)

    def _drop_if_unused(self, version: AdapterVersion) -> None:
        if not version.retired or version.pins:
            return
        if self.resident.get(version.index) is version:
            self.evict(version)
        self.on_drop(version)

    def _vacancy(self, units: int, without: Collection[AdapterVersion] = ()) -> tuple[int, int] | None:
        """A free index and the first unit of a free range, if those in ``without`` were gone."""
        index = next((i for i in range(1, self.adapters) if self._free(i, without)), None)
        staying = [each for each in self.resident.values() if each not in without]
        start = 0
        for first, end in sorted((each.first_unit, each.first_unit + each.units) for each in staying):
            if first - start >= units:
                break
            start = end
        else:
            if self.rank_capacity // RANK_UNIT - start < units:
                return None
        return None if index is None else (index, start)

    def _free(self, index: int, without: Collection[AdapterVersion]) -> bool:
        return index not in self.resident or self.resident[index] in without
