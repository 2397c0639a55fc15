"""TrainedModels: adapters that jobs of this service made. The engine hears of one when it is asked for."""

import contextlib
import threading
from pathlib import Path

import flexjax
from flexjax.engine.adapters import UnknownAdapter
from flexjax.server.data_folder import DataFolder
from flexjax.server.errors import ApiError
from flexjax.server.store import Store


class TrainedModels:
    """Any thread may call it."""

    def __init__(self, engine: "flexjax.Engine", store: Store, folder: DataFolder):
        self._engine, self._store, self._folder = engine, store, folder
        self._registering = threading.Lock()

    def names(self) -> list[str]:
        """Models of jobs that succeeded, and checkpoints of all jobs, whether or not they were ever asked for."""
        models = [row["name"] for row in self._store.rows("jobs", {"status": "succeeded"})]
        return [*models, *(row["name"] for row in self._store.rows("checkpoints", {}))]

    def folder_of(self, name: str) -> Path | None:
        """Of a model or a checkpoint, in PEFT's format; None for a name that is neither."""
        if self._store.find("jobs", name=name, status="succeeded") is not None:
            return self._folder.adapter(name)
        checkpoint = self._store.find("checkpoints", name=name)
        return None if checkpoint is None else self._folder.checkpoint(checkpoint["job"], checkpoint["step"])

    def find(self, name: str) -> bool:
        """Whether the engine can be asked for it, by this service or by anybody.

        Raises:
            ApiError: its files cannot be read.
        """
        if name in self._engine.adapters.named:
            return True
        with self._registering:
            if name in self._engine.adapters.named:
                return True  # another request was first
            folder = self.folder_of(name)
            if folder is None:
                return False
            try:
                self._engine.register_adapter(name, folder)
            except (ValueError, OSError) as error:
                hidden = str(error).replace(f"{self._folder.root}/", "")
                raise ApiError(400, f"The model {name!r} cannot be loaded: {hidden}", "model") from error
            return True

    def written(self, name: str) -> None:
        """A new model's files are there: it need not stay in the host's memory."""
        with contextlib.suppress(UnknownAdapter):  # a client has unloaded it already
            self._engine.library.saved(name, self._folder.adapter(name))
