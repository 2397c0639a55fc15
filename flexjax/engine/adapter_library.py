"""AdapterLibrary: adapters by name, from their files to the host's memory and on to the device.

Names and files are dealt with on the caller's thread, versions on the engine's.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

from flexjax.config import EngineConfig
from flexjax.engine.adapter_host import HostAdapters
from flexjax.engine.adapter_tier import AdapterTier
from flexjax.engine.adapters import AdapterTable, AdapterVersion, UnknownAdapter
from flexjax.engine.loop import Loop
from flexjax.engine.programs import JobShape
from flexjax.engine.runner import Runner
from flexjax.engine.trainer import padded_factors
from flexjax.models.config import ModelConfig
from flexjax.state import padded_rank
from flexjax.weights.adapter import LoraAdapter
from flexjax.weights.peft import read_adapter, read_outline, write_adapter


class Staged(NamedTuple):
    """An adapter's factors on the device, not yet where steps read them."""

    shape: JobShape
    factors: dict


class Ready(NamedTuple):
    """An adapter that was read and needs only its name.

    Attributes:
        fingerprint: of the adapter, computed here since the engine's thread has no time for it.
        staged: None where no place on the device was free.
    """

    adapter: LoraAdapter
    folder: Path
    fingerprint: str
    staged: Staged | None


class AdapterLibrary:
    """Args:
    config: how many places there are and how much memory.
    forget_pages: called with the number of a version that no name points to any more, on the engine's thread.
    """

    def __init__(
        self, runner: Runner, model: ModelConfig, config: EngineConfig, forget_pages: Callable[[int], None]
    ):
        self._runner, self._model, self._forget_pages = runner, model, forget_pages
        self.host = HostAdapters(config.adapter_host_bytes, lambda folder: read_adapter(folder, model))
        forget = lambda version: self.host.forget(version.version)
        self.table = AdapterTable(config.max_adapters + 1, config.adapter_rank_capacity, on_drop=forget)
        self.tier = AdapterTier(self.table, ThreadPoolExecutor(1, thread_name_prefix="flexjax-adapters"))

    def open(self, loop: Loop) -> None:
        """Before anything else."""
        self._loop = loop
        self.tier.open(loop.post, self.stage, self.publish)

    def prepare(self, name: str, directory: str | os.PathLike) -> Ready:
        """An adapter that is to be a new version of a name, read now. Raises FileNotFoundError, ValueError."""
        adapter, folder = read_adapter(directory, self._model), Path(directory).resolve()
        self.table.require_size(name, adapter.rank)
        free = len(self.table.resident) < self.table.adapters - 1  # a guess from another thread: nothing depends on it
        return Ready(adapter, folder, adapter.fingerprint, self._staged(adapter) if free else None)

    def add(self, name: str, ready: Ready) -> None:
        """The name means it from now on. It gets a place at once if one is free, else when it is asked for."""
        keep = lambda number: self.host.keep(number, ready.adapter, ready.folder, ready.fingerprint)
        self._loop.call(self._add, name, ready.adapter, keep, ready.staged)

    def register(self, name: str, directory: str | os.PathLike, fingerprint: str | None = None) -> None:
        """As `prepare` and `add`, but the weights are read when they are needed first. The folder must not change any
        more."""
        outline, folder = read_outline(directory, self._model), Path(directory).resolve()
        know = lambda number: self.host.know(number, outline, folder, fingerprint)
        self._loop.call(self._add, name, outline, know, None)

    def unload(self, name: str) -> None:
        def unload() -> None:
            self._forget_pages(self.table.remove(name).version)

        self._loop.call(unload)

    def export(self, name: str, directory: str | os.PathLike) -> None:
        write_adapter(directory, self.get(name))
        self.saved(name, directory)

    def saved(self, name: str, directory: str | os.PathLike) -> None:
        """The newest version of a name was written there; if the same is read again, it need not stay in memory."""
        self.host.saved(self._newest(name).version, Path(directory).resolve())

    def fault(self, name: str) -> str | None:
        """Why the newest version of a name could not be read when it was last tried; None if it could."""
        found = self.table.named.get(name)
        return None if found is None else self.host.fault(found.version)

    def get(self, name: str) -> LoraAdapter:
        """The newest version of a name, on the host."""
        try:
            return self.host.fetch(self._newest(name).version)
        except LookupError as error:  # unloaded meanwhile
            raise UnknownAdapter(f"adapter {name!r} is not loaded") from error

    def announce(self, version: AdapterVersion, adapter: LoraAdapter) -> None:
        """On the engine's thread: what a job has trained serves under its name."""
        self.host.keep(version.version, adapter)
        self._announce(version)

    def stage(self, version: AdapterVersion) -> Staged:
        """On the loader's thread. Raises OSError, ValueError."""
        return self._staged(self.host.fetch(version.version))

    def publish(self, version: AdapterVersion, staged: Staged) -> None:
        """On the engine's thread: the version's place takes the factors."""
        self._runner.publish(staged.factors, staged.shape, version)

    def _staged(self, adapter: LoraAdapter) -> Staged:
        """Waits until the factors are on the device, so that no step has to."""
        shape, programs = JobShape(padded_rank(adapter.rank), adapter.target_modules), self._runner.programs
        programs.publish(shape)
        factors = programs.place_factors(padded_factors(adapter, shape.rank), shape)
        return Staged(shape, jax.block_until_ready(factors))

    def _add(
        self, name: str, outline: LoraAdapter, remember: Callable[[int], None], staged: Staged | None
    ) -> AdapterVersion:
        version = self.table.new(name, outline.rank, outline.scale)
        remember(version.version)
        if staged is not None and self.tier.prefetch(version):
            self.publish(version, staged)
        self._announce(version)
        return version

    def _announce(self, version: AdapterVersion) -> None:
        before = self.table.announce(version)
        if before is not None:
            self._forget_pages(before.version)

    def _newest(self, name: str) -> AdapterVersion:
        found = self.table.named.get(name)
        if found is None:
            loaded = sorted(self.table.named.copy()) or "none"
            raise UnknownAdapter(f"adapter {name!r} is not loaded; loaded adapters: {loaded}")
        return found
