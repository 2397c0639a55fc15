"""TrainedModels: adapters that jobs of this service made, and how they come onto the device when they are asked for."""

import logging
import threading
from pathlib import Path

import flexjax
from flexjax.engine.adapters import NoRoomForAdapter
from flexjax.server.data_folder import DataFolder
from flexjax.server.errors import ApiError
from flexjax.server.store import Store

JOB_NAMES = "ft:"
"""Begins the names of models that jobs make, and of no adapter that a client loads."""

logger = logging.getLogger(__name__)


class TrainedModels:
    """Any thread may call it."""

    def __init__(self, engine: "flexjax.Engine", store: Store, folder: DataFolder):
        self._engine, self._store, self._folder = engine, store, folder
        self._loading = threading.Lock()
        self._owners: dict[str, str] = {}  # of names that were asked for; they never change

    def names(self, owner: str) -> list[str]:
        """Models of an owner's jobs that succeeded, and checkpoints of all of them, on the device or not."""
        jobs = {row["id"]: row for row in self._store.rows("jobs", {"owner": owner})}
        models = [row["name"] for row in jobs.values() if row["status"] == "succeeded"]
        return [*models, *(row["name"] for row in self._store.rows("checkpoints", {}) if row["job"] in jobs)]

    def owner_of(self, name: str) -> str | None:
        """Whose job makes, or made, the model or checkpoint; None for a name that is neither."""
        if name not in self._owners and name.startswith(JOB_NAMES):
            job = self._store.find("jobs", name=name)
            if job is None and (checkpoint := self._store.find("checkpoints", name=name)) is not None:
                job = self._store.find("jobs", id=checkpoint["job"])
            if job is not None:
                self._owners[name] = job["owner"]
        return self._owners.get(name)

    def folder_of(self, name: str) -> Path | None:
        """Of a model or a checkpoint, in PEFT's format; None for a name that is neither."""
        if self._store.find("jobs", name=name, status="succeeded") is not None:
            return self._folder.adapter(name)
        checkpoint = self._store.find("checkpoints", name=name)
        return None if checkpoint is None else self._folder.checkpoint(checkpoint["job"], checkpoint["step"])

    def load(self, name: str) -> bool:
        """Bring it onto the device unless it is there; whether there is such a model.

        Raises:
            ApiError: there is no room, or its files cannot be read.
        """
        if name in self._engine.adapters.named:
            return True
        with self._loading:
            if name in self._engine.adapters.named:
                return True  # another request has brought it
            folder = self.folder_of(name)
            if folder is None:
                return False
            try:
                self._engine.load_adapter(name, folder)
            except (ValueError, OSError) as error:
                hidden = str(error).replace(f"{self._folder.root}/", "")
                raise ApiError(400, f"The model {name!r} cannot be loaded: {hidden}", "model", "no_room") from error
            return True

    def load_newest(self) -> None:
        """The newest models, as many as leave room for the jobs that may run; others come when they are asked for."""
        config = self._engine.config
        models = self._store.rows("jobs", {"status": "succeeded"}, newest_first=True)
        for row in models[: max(0, config.max_adapters - config.max_running_jobs)]:
            try:
                if not self.load(row["name"]):
                    logger.warning("the model %s is not there any more", row["name"])
            except ApiError as error:
                logger.warning("%s", error)
                if isinstance(error.__cause__, NoRoomForAdapter):
                    return
