"""TrainedModels: adapters that jobs of this service made. The engine hears of one when it is asked for."""

import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import flexjax
from flexjax.engine.adapters import UnknownAdapter
from flexjax.server.data_folder import DataFolder
from flexjax.server.errors import ApiError, model_not_found
from flexjax.server.job_events import FINAL
from flexjax.server.store import Store

JOB_NAMES = "ft:"
"""Begins the names of models that jobs make, and of no adapter that a client loads."""


class TrainedModels:
    """Any thread may call it.

    Args:
        kept: checkpoints of each job, the newest; 0 keeps all.
    """

    def __init__(self, engine: "flexjax.Engine", store: Store, folder: DataFolder, kept: int = 0):
        self._engine, self._store, self._folder, self._kept = engine, store, folder, kept
        self._registering = threading.Lock()
        self._owners: dict[str, str] = {}  # of names that were asked for; they never change

    def names(self, owner: str) -> list[str]:
        """Models of an owner's jobs that succeeded, and checkpoints of all of them, on the device or not."""
        jobs = {row["id"]: row for row in self._store.rows("jobs", {"owner": owner})}
        models = [row["name"] for row in jobs.values() if is_model(row)]
        return [*models, *(row["name"] for row in self._store.rows("checkpoints", {}) if row["job"] in jobs)]

    def owner_of(self, name: str) -> str | None:
        """Whose job makes, or made, the model or checkpoint; None for a name that is neither."""
        if name not in self._owners and name.startswith(JOB_NAMES):
            job, _ = self._rows(name)
            if job is not None:
                self._owners[name] = job["owner"]
        return self._owners.get(name)

    def folder_of(self, name: str) -> Path | None:
        """Of a model or a checkpoint, in PEFT's format; None for a name that is neither."""
        job, checkpoint = self._rows(name)
        if checkpoint is not None:
            return self._folder.checkpoint(checkpoint["job"], checkpoint["step"])
        return self._folder.adapter(name) if job is not None and is_model(job) else None

    def _rows(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The job of a model or a checkpoint, and the checkpoint, if that is what has the name."""
        job, checkpoint = self._store.find("jobs", name=name), None
        if job is None and (checkpoint := self._store.find("checkpoints", name=name)) is not None:
            job = self._store.find("jobs", id=checkpoint["job"])
        return job, checkpoint

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

    def delete(self, name: str) -> None:
        """Take away a model or a checkpoint, with its files. Requests that use it go on.

        Raises:
            ApiError: it is not there, or a job that has not ended needs it.
        """
        with self._registering:
            job, _ = self._rows(name)
            if job is not None and job["status"] not in FINAL:
                message = f"The job {job['id']} is {job['status']}; its models can be deleted once it has ended."
                raise ApiError(400, message, "model", "model_in_use")
            if name in (starts := self._starts()):
                message = f"The job {starts[name]} starts from {name!r} and has not ended."
                raise ApiError(400, message, "model", "model_in_use")
            self._forget(name)

    def prune(self, job: str) -> None:
        """Take away a job's checkpoints but the newest, and those that other jobs start from."""
        if not self._kept or len(self._checkpoints(job)) <= self._kept:
            return
        with self._registering:
            starts = self._starts()
            for row in self._checkpoints(job)[self._kept :]:  # again: a client may have deleted one
                if row["name"] not in starts:
                    self._forget(row["name"])

    def _checkpoints(self, job: str) -> list[dict[str, Any]]:
        """The newest first."""
        return self._store.rows("checkpoints", {"job": job}, newest_first=True)

    def left_over(self) -> list[Path]:
        """Folders of what was taken away before a process was killed."""
        jobs = self._store.rows("jobs", {})
        kept = {self._folder.checkpoint(row["job"], row["step"]) for row in self._store.rows("checkpoints", {})}
        steps = [each for row in jobs for each in self._folder.checkpoints(row["id"]) if each not in kept]
        return [*steps, *(self._folder.adapter(row["name"]) for row in jobs if row["deleted"] is not None)]

    def _starts(self) -> dict[str, str]:
        """Models that jobs start from which have not ended, with such a job."""
        unfinished = [row for row in self._store.rows("jobs", {}) if row["status"] not in FINAL]
        return {row["request"]["model"]: row["id"] for row in unfinished}

    def _forget(self, name: str) -> None:
        """First in the database: what is not there is not loaded again. Raises ApiError."""
        folder, (job, checkpoint) = self.folder_of(name), self._rows(name)
        if folder is None:
            raise model_not_found(name)
        with self._store.writing():
            if checkpoint is None:
                self._store.change("jobs", job["id"], deleted=int(time.time()))
            else:
                self._store.remove("checkpoints", checkpoint["id"])
        with suppress(UnknownAdapter):
            self._engine.unload_adapter(name)
        shutil.rmtree(folder, ignore_errors=True)

    def written(self, name: str) -> None:
        """A new model's files are there: it need not stay in the host's memory."""
        with suppress(UnknownAdapter):  # a client has unloaded it already
            self._engine.library.saved(name, self._folder.adapter(name))


def is_model(job: dict[str, Any]) -> bool:
    """Whether what the job made can be asked for."""
    return job["status"] == "succeeded" and job["deleted"] is None
