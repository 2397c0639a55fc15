"""Catalog: the models that an owner may name, and what the engine calls them.

Adapters that clients load have names of their owner's own, so that two owners may give the same name. Models of jobs
belong to who created the job. Other adapters are the configuration's, for everybody.
"""

import re

import flexjax
from flexjax.server.errors import ApiError
from flexjax.server.loaded_adapters import SEPARATOR, LoadedAdapters
from flexjax.server.trained_models import TrainedModels

BEFORE_OWNER = r"(?<![A-Za-z0-9_.-])"
NO_ROOM = "the adapter cannot be loaded; unload another, or raise max_adapters or adapter_rank_capacity"
"""Where the engine speaks of an adapter that has gone meanwhile."""


class Catalog:
    """Any thread may call it.

    Args:
        private: keys are asked for; else there is one owner, whose names are the engine's.
    """

    def __init__(self, engine: "flexjax.Engine", trained: TrainedModels, loaded: LoadedAdapters, private: bool):
        self._engine, self._trained, self._loaded, self.private = engine, trained, loaded, private

    def find(self, owner: str, name: str) -> str | None:
        """What the engine calls the adapter that the owner means; None if the owner has none of that name."""
        if SEPARATOR in name:
            return None
        if (loaded := self._loaded.engine_name(owner, name)) in self._loaded:
            return loaded
        maker = self._trained.owner_of(name)
        if maker is not None:
            return name if maker == owner else None
        return name if name in self._resident() else None

    def bring(self, owner: str, name: str) -> str | None:
        """As `find`, and it is on the device then. Raises ApiError if it cannot come there."""
        found = self.find(owner, name)
        if found is None:
            return None
        try:
            there = self._loaded.bring(found) if found in self._loaded else self._trained.find(found)
            return found if there else None
        except ApiError as error:
            raise ApiError(error.status, self.readable(owner, str(error)), error.param, error.code) from error

    def readable(self, owner: str, message: str) -> str:
        """What an owner may read of what the engine says: no names that are others', and the owner's own as given."""
        if not self.private:
            return message
        mine = {engine_name: name for name, engine_name in self._all_names(owner).items()}
        message = message.replace(repr(SEPARATOR)[1:-1], SEPARATOR)  # as it stands in a quoted name
        for name in sorted(self._resident(), key=len, reverse=True):
            message = message.replace(name, mine.get(name, "another's"))
        message = re.sub(f"{BEFORE_OWNER}{re.escape(self._loaded.engine_name(owner, ''))}", "", message)
        return NO_ROOM if SEPARATOR in message else message

    def names(self, owner: str) -> dict[str, str]:
        """Of those on the device, and of those that come there when they are asked for, with the engine's names. Of
        what a client has loaded they are those whose files were not found to have changed."""
        everything = self._all_names(owner)
        return {name: found for name, found in sorted(everything.items()) if self._loaded.fault(found) is None}

    def _all_names(self, owner: str) -> dict[str, str]:
        resident = self._resident()
        shared = [name for name in resident if SEPARATOR not in name and self._trained.owner_of(name) in (None, owner)]
        return {name: name for name in (*shared, *self._trained.names(owner))} | self._loaded.names(owner)

    def is_shared(self, name: str) -> bool:
        """Whether it is the name of an adapter for everybody."""
        return SEPARATOR not in name and name in self._resident() and self._trained.owner_of(name) is None

    def _resident(self) -> dict[str, object]:
        return self._engine.adapters.named.copy()  # a copy is made in one go; the engine's thread may write
