"""LoadedAdapters: adapters that clients have loaded, for as long as they do not unload them: they outlive the process.

What is acknowledged is in the database before. The next process tells the engine of one when it is asked for, with the
fingerprint of what was loaded: a name never means other weights than it did.
"""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import flexjax
from flexjax.engine.adapters import UnknownAdapter
from flexjax.server.adapter_folders import AdapterFolders
from flexjax.server.errors import ApiError
from flexjax.server.keys import OPERATOR
from flexjax.server.prompts import BodyError
from flexjax.server.store import Store, new_id

logger = logging.getLogger(__name__)

SEPARATOR = "\x1f"
"""Stands between an owner and a name. It is not printable, and no name that a client may give is not."""


@dataclass(eq=False)
class Loaded:
    """Attributes:
    row: of the database.
    here: the engine of this process has heard of it.
    fault: why it could not be told of it; None if it could, or nobody has asked.
    """

    row: dict[str, Any]
    here: bool = False
    fault: str | None = None


class LoadedAdapters:
    """Any thread may call it. The engine's names are the clients' names, or, where owners are apart, made of both.

    Args:
        private: keys are asked for; else there is one owner, whose names are the engine's.
    """

    def __init__(self, engine: "flexjax.Engine", store: Store, folders: AdapterFolders, private: bool):
        self._engine, self._store, self._folders, self._private = engine, store, folders, private
        self._changing = threading.Lock()
        self._known: dict[str, Loaded] = {}  # as the database has them, by the engine's names
        for row in store.rows("adapters", {}):
            name = self.engine_name(row["owner"], row["name"])
            if self.is_of_a_job(name):
                logger.warning("the loaded adapter %r is not served: a job of the configuration has its name", name)
            elif private or row["owner"] == OPERATOR:
                self._known[name] = Loaded(row, fault=self._absence(row))

    def __contains__(self, engine_name: str) -> bool:
        return engine_name in self._known

    def engine_name(self, owner: str, name: str) -> str:
        """What the engine calls an adapter that the owner loads under a name."""
        return f"{owner}{SEPARATOR}{name}" if self._private else name

    def is_of_a_job(self, engine_name: str) -> bool:
        """Whether a job that no client created trains, or has trained, an adapter of this name in this process."""
        return engine_name in self._engine.trainer.jobs

    def names(self, owner: str) -> dict[str, str]:
        """The owner's names, with the engine's."""
        known = self._known.copy()  # a copy is made in one go; other threads may write
        return {each.row["name"]: name for name, each in known.items() if each.row["owner"] == owner}

    def path_of(self, engine_name: str) -> str | None:
        """Where a client said that it is; None of those that no client has loaded."""
        found = self._known.get(engine_name)
        return None if found is None else found.row["path"]

    def fault(self, engine_name: str) -> str | None:
        """Why a client's adapter could not be had when it was last asked for; None if it could, or nobody has asked.
        It is given as its owner may read it."""
        found = self._known.get(engine_name)
        if found is None:
            return None
        fault = self._engine.library.fault(engine_name) if found.here else found.fault
        return None if fault is None else self._folders.hidden(found.row["owner"], fault)

    def hidden(self, owner: str, message: str) -> str:
        """What the owner may read of a message."""
        return self._folders.hidden(owner, message)

    def load(self, owner: str, name: str, path: str) -> None:
        """A new adapter, or another for a name: requests that run keep theirs.

        Raises:
            BodyError, ApiError: there is no such folder for the owner. OSError, ValueError: what is in it cannot be
                loaded. sqlite3.Error: the database cannot be written. Then everything is as it was.
        """
        engine_name, folder = self.engine_name(owner, name), self._folders.find(owner, path)
        ready = self._engine.prepare_adapter(engine_name, folder)
        row = {"id": new_id("adapter"), "created": int(time.time()), "owner": owner, "name": name, "path": path}
        row |= {"folder": self._folders.place_of(owner, folder), "fingerprint": ready.fingerprint}
        with self._changing:
            self._write(row)
            try:
                self._engine.library.add(engine_name, ready)
            except BaseException:
                self._take_back(row, self._known.get(engine_name))
                raise
            self._known[engine_name] = Loaded(row, here=True)

    def unload(self, engine_name: str) -> None:
        """Requests that use it go on. Raises UnknownAdapter; sqlite3.Error, and then it stays."""
        with self._changing:
            known = self._known.get(engine_name)
            if known is not None:
                self._store.remove("adapters", known.row["id"])
                del self._known[engine_name]
            try:
                self._engine.unload_adapter(engine_name)
            except UnknownAdapter:
                if known is None:
                    raise

    def bring(self, engine_name: str) -> bool:
        """Whether the engine can be asked for a client's adapter: it has heard of it, or hears of it now.

        Raises:
            ApiError: its files cannot be read.
        """
        found = self._known.get(engine_name)
        if found is None or found.here:
            return found is not None
        with self._changing:
            if self._known.get(engine_name) is not found:
                return engine_name in self._known  # it was loaded or unloaded meanwhile
            if not found.here:
                self._register(engine_name, found)
            return True

    def _absence(self, row: dict[str, Any]) -> str | None:
        """Why there is no folder any more; None if it is there."""
        try:
            self._folders.find(row["owner"], row["folder"])
        except (BodyError, ApiError) as error:
            return str(error)
        return None

    def _register(self, engine_name: str, found: Loaded) -> None:
        row = found.row
        try:
            folder = self._folders.find(row["owner"], row["folder"])
            self._engine.register_adapter(engine_name, folder, row["fingerprint"])
        except (BodyError, ApiError, ValueError, OSError) as error:
            found.fault = str(error)
            raise cannot_be_loaded(row["name"], self.fault(engine_name)) from error
        found.here, found.fault = True, None

    def _write(self, row: dict[str, Any]) -> None:
        """In the place of the row of that name."""
        with self._store.writing():
            before = self._store.find("adapters", owner=row["owner"], name=row["name"])
            if before is not None:
                self._store.remove("adapters", before["id"])
            self._store.add("adapters", **row)

    def _take_back(self, row: dict[str, Any], before: Loaded | None) -> None:
        """The row of an adapter that the engine has not taken goes, and the one before it is there again."""
        try:
            with self._store.writing():
                self._store.remove("adapters", row["id"])
                if before is not None:
                    self._store.add("adapters", **before.row)
        except Exception:  # what the engine said is what the client has to know
            logger.exception("the adapter %r was not loaded, and its row stays", row["name"])


def cannot_be_loaded(name: str, fault: str) -> ApiError:
    return ApiError(400, f"The model {name!r} cannot be loaded: {fault}", "model", "model_cannot_be_loaded")
