"""HostAdapters: adapter versions in main memory, within a number of bytes; beyond it they are read from their files
again. It knows neither names nor the device. Any thread may call it.

A version's weights never change. So a file counts as a version's only if what is read from it is what the version had
when it was last in memory; else whoever asks is refused.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexjax.engine.adapters import NoRoomForAdapter
from flexjax.weights.adapter import LoraAdapter


@dataclass(eq=False)
class Kept:
    """What is known of a version.

    Attributes:
        outline: the adapter without its weights; it decides rank and scale.
        adapter: None while it is not in memory.
        folder: where it can be read again, in PEFT's format; None: nowhere, so that it stays in memory.
        fingerprint: of what it must be; None where that is not known before it is in memory for the first time.
        bytes: in memory.
        fault: why it could not be read when it was last tried; None if it could.
    """

    outline: LoraAdapter
    adapter: LoraAdapter | None = None
    folder: Path | None = None
    fingerprint: str | None = None
    bytes: int = 0
    fault: str | None = None


class HostAdapters:
    """Args:
    limit: bytes of weights in memory.
    read: an adapter from its folder; raises OSError, ValueError.
    """

    def __init__(self, limit: int, read: Callable[[Path], LoraAdapter]):
        self.limit, self._read = limit, read
        self._kept: OrderedDict[int, Kept] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """In memory now. More than the limit only where jobs have left adapters that are in no file."""
        with self._lock:
            return self._bytes

    def keep(
        self, version: int, adapter: LoraAdapter, folder: Path | None = None, fingerprint: str | None = None
    ) -> None:
        """A new version. It stays in memory until it has a folder and others need the room.

        Args:
            fingerprint: of the adapter, where the caller knows it: it takes long to compute.
        """
        kept = Kept(adapter.outline, adapter, folder, fingerprint or adapter.fingerprint, adapter.nbytes)
        with self._lock:
            self._kept[version] = kept
            self._make_room()

    def know(self, version: int, outline: LoraAdapter, folder: Path, fingerprint: str | None = None) -> None:
        """A new version that is read when it is needed first.

        Args:
            outline: the adapter without weights.
            fingerprint: of the adapter that it must be; None takes what is found.
        """
        with self._lock:
            self._kept[version] = Kept(outline, folder=folder, fingerprint=fingerprint)

    def fetch(self, version: int) -> LoraAdapter:
        """A version's adapter, from memory or from its folder.

        Raises:
            LookupError: the version is unknown. OSError, ValueError: its folder cannot be read, or holds another one.
        """
        with self._lock:
            kept = self._kept[version]
            self._kept.move_to_end(version)
            if kept.adapter is not None:
                return kept.adapter
        adapter = self._reread(kept)
        with self._lock:
            kept.adapter, kept.fingerprint, kept.bytes = adapter, adapter.fingerprint, adapter.nbytes
            self._make_room()
        return adapter

    def fault(self, version: int) -> str | None:
        """Why a version could not be read when it was last tried; None if it could, or is unknown."""
        with self._lock:
            kept = self._kept.get(version)
            return None if kept is None else kept.fault

    def saved(self, version: int, folder: Path) -> bool:
        """A version was written to a folder: whether the very same is read from there. If so it need not stay in
        memory."""
        with self._lock:
            kept = self._kept.get(version)
        if kept is None:
            return False  # nobody can ask for it any more
        try:
            require_same(kept, self._read(folder))
        except (OSError, ValueError):
            return False
        with self._lock:
            kept.folder = folder
            self._make_room()
        return True

    def require_room(self, nbytes: int) -> None:
        """Raises NoRoomForAdapter unless so many bytes, of an adapter that is in no file, fit beside the others."""
        with self._lock:
            fixed = sum(kept.bytes for kept in self._kept.values() if kept.folder is None)
            if fixed + nbytes > self.limit:
                raise NoRoomForAdapter(
                    f"an adapter of {nbytes} bytes does not fit into the host's memory for adapters: "
                    f"adapter_host_bytes is {self.limit}, and adapters that are in no file take {fixed}; export or "
                    "unload some, or raise adapter_host_bytes"
                )

    def forget(self, version: int) -> None:
        """Nobody will ask for it again; nothing happens if it is unknown."""
        with self._lock:
            self._kept.pop(version, None)

    def _reread(self, kept: Kept) -> LoraAdapter:
        """Raises OSError, ValueError."""
        try:
            adapter = self._read(kept.folder)
            require_same(kept, adapter)
        except (OSError, ValueError) as error:
            kept.fault = str(error)
            raise
        kept.fault = None
        return adapter

    @property
    def _bytes(self) -> int:
        return sum(kept.bytes for kept in self._kept.values() if kept.adapter is not None)

    def _make_room(self) -> None:
        """Let go of those that can be read again, the least recently used first."""
        total = self._bytes
        for kept in self._kept.values():
            if total <= self.limit:
                return
            if kept.adapter is not None and kept.folder is not None:
                kept.adapter = None
                total -= kept.bytes


def require_same(kept: Kept, adapter: LoraAdapter) -> None:
    """Raises ValueError unless the adapter is the one that the version had."""
    shape = lambda outline: (outline.terms, outline.use_rslora)
    if shape(adapter) != shape(kept.outline) or kept.fingerprint not in (None, adapter.fingerprint):
        raise ValueError(
            f"the adapter in {kept.folder} is not the one that was loaded from there: its files have changed; load it "
            "again, which makes a new version"
        )
