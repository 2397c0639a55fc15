"""AdapterTable: which adapter versions are on the device, where, and who still uses them. Plain Python.

A version, once published, never changes; a request pins the version it started with. A name points to its newest
version; older ones go when their last pin does. The flat rank axis is handed out in units of 8 columns.
"""

from dataclasses import dataclass, field

import numpy as np

from flexjax.layout import RANK_UNIT


class UnknownAdapter(ValueError):
    """A request names an adapter that is not loaded. Never answered by the base model."""


class NoRoomForAdapter(ValueError):
    """Neither an adapter index nor a range of the rank axis is free."""


@dataclass(eq=False)
class AdapterVersion:
    """One immutable set of adapter weights on the device.

    Attributes:
        version: unique number, never reused; 0 is the base model.
        index: place on the stacked adapter axis; 0 means no adapter.
        first_unit, units: its range of the flat rank axis.
        scale: what x A B is multiplied by.
        pins: requests and tapes that use it.
        retired: no name points to it any more.
    """

    name: str | None
    version: int
    index: int
    first_unit: int
    units: int
    scale: float
    pins: int = 0
    retired: bool = False

    @property
    def first_column(self) -> int:
        return self.first_unit * RANK_UNIT


BASE = AdapterVersion(name=None, version=0, index=0, first_unit=0, units=0, scale=0.0)


@dataclass
class AdapterTable:
    """Versions by name, index and range.

    Args:
        adapters: adapter indices, 0 included (`max_adapters` + 1).
        rank_capacity: columns of the flat rank axis (`adapter_rank_capacity`).
    """

    adapters: int
    rank_capacity: int
    named: dict[str, AdapterVersion] = field(default_factory=dict)
    resident: dict[int, AdapterVersion] = field(default_factory=dict)
    newest: int = 0

    def place(self, name: str, rank: int, scale: float) -> AdapterVersion:
        """Reserve an index and a range for a version that no name points to yet (see `announce`).

        Raises:
            NoRoomForAdapter: names what is full and the setting that enlarges it.
        """
        units = -(-rank // RANK_UNIT)
        index = next((i for i in range(1, self.adapters) if i not in self.resident), None)
        if index is None:
            raise NoRoomForAdapter(
                f"adapter {name!r} finds all {self.adapters - 1} places taken by {self._holders()}; "
                "unload one or raise max_adapters"
            )
        first = self._first_fit(units)
        if first is None:
            raise NoRoomForAdapter(
                f"adapter {name!r} of rank {rank} needs {units * RANK_UNIT} free columns in a row of the "
                f"{self.rank_capacity} that {self._holders()} share; unload one or raise adapter_rank_capacity"
            )
        self.newest += 1
        version = AdapterVersion(name, self.newest, index, first, units, scale)
        self.resident[index] = version
        return version

    def announce(self, version: AdapterVersion) -> AdapterVersion | None:
        """Point the version's name to it; returns the version that the name pointed to before, now retired."""
        before = self.named.get(version.name)
        self.named[version.name] = version
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

    def remove(self, name: str) -> AdapterVersion:
        """Take a name away; requests that pinned its version keep it. Raises UnknownAdapter."""
        version = self.find(name)
        del self.named[name]
        self._retire(version)
        return version

    def discard(self, version: AdapterVersion) -> None:
        """Give up a version that was placed but never announced."""
        self._retire(version)

    def fill(self, owner: np.ndarray, scale: np.ndarray) -> None:
        """Write who owns each unit of the rank axis, [units] int32, and every scale, [adapters] float32."""
        owner[...] = 0
        for version in self.resident.values():
            owner[version.first_unit : version.first_unit + version.units] = version.index
            scale[version.index] = version.scale

    def _retire(self, version: AdapterVersion) -> None:
        version.retired = True
        self._drop_if_unused(version)

    def _drop_if_unused(self, version: AdapterVersion) -> None:
        if version.retired and version.pins == 0 and self.resident.get(version.index) is version:
            del self.resident[version.index]

    def _first_fit(self, units: int) -> int | None:
        taken = sorted((v.first_unit, v.first_unit + v.units) for v in self.resident.values())
        start = 0
        for first, end in taken:
            if first - start >= units:
                return start
            start = end
        return start if self.rank_capacity // RANK_UNIT - start >= units else None

    def _holders(self) -> str:
        return ", ".join(sorted(str(v.name) for v in self.resident.values())) or "nobody"
