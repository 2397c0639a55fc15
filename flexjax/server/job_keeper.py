"""JobKeeper: fine-tuning jobs of clients, from the database into the engine and back.

A job is written down before the client is told of it. A thread starts jobs one after another (reading data and
compiling take time); another writes down what the engine tells of them.
"""

import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import flexjax
from flexjax.engine.loop import EngineStopped
from flexjax.finetuning.job import FinetuneJob
from flexjax.server.catalog import Catalog
from flexjax.server.errors import ApiError, is_full, stopping
from flexjax.server.job_book import JobBook
from flexjax.server.job_events import FINAL
from flexjax.server.job_request import JobRequest
from flexjax.server.live_job import Live
from flexjax.server.prompts import BodyError
from flexjax.server.trained_models import TrainedModels
from flexjax.weights.adapter import LoraAdapter

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.05
FAULT_SECONDS = 1.0
"""Between two tries to write down what could not be written."""


class JobKeeper:
    """Args:
    organization: in the names of models.
    """

    def __init__(
        self,
        engine: "flexjax.Engine",
        book: JobBook,
        models: TrainedModels,
        catalog: Catalog,
        organization: str = "flexjax",
    ):
        self._engine, self._book, self._models, self._catalog = engine, book, models, catalog
        self._base_names = engine.config.served_model_name, engine.config.model
        self._organization = organization
        self._live: dict[str, Live] = {}
        self._starting: dict[str, Future] = {}
        self._lock, self._closing = threading.RLock(), threading.Event()
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="flexjax-jobs")
        self._follower = threading.Thread(target=self._follow, name="flexjax-follower", daemon=True)

    def open(self) -> None:
        """Go on where the last process ended, in the background."""
        store, unfinished = self._book.store, self._book.unfinished()
        ended = [row["name"] for row in store.rows("jobs", {}) if row["status"] in FINAL]
        directory = self._engine.config.checkpoint_dir
        checkpoints = [] if directory is None else [Path(directory) / name for name in ended]
        self._book.folder.sweep({row["id"] for row in store.rows("files", {})}, checkpoints + self._models.left_over())
        for row in unfinished:
            self._starting[row["id"]] = self._starter.submit(self._start, row)
        self._follower.start()

    def close(self) -> None:
        """Jobs go on in the engine, and their checkpoints are still written down."""
        self._closing.set()
        self._starter.shutdown(wait=True, cancel_futures=True)
        if self._follower.is_alive():
            self._follower.join()

    def create(self, request: JobRequest, owner: str, base: str) -> dict[str, Any]:
        """A new job's row. Raises BodyError."""
        self._job(request, "ft:checked")
        row = self._book.create(request, owner, base, self._organization)
        try:
            self._starting[row["id"]] = self._starter.submit(self._start, row)
        except RuntimeError as error:  # the service has been told to stop; the job starts when it is there again
            raise stopping() from error
        return row

    def pause(self, identifier: str) -> None:
        self._act(identifier, "paused", lambda live: live.handle.pause())

    def resume(self, identifier: str) -> None:
        self._act(identifier, "resumed", lambda live: live.handle.resume())

    def cancel(self, identifier: str) -> None:
        def cancel(live: Live) -> None:
            live.handle.cancel()
            live.cancelling = True

        self._act(identifier, "cancelled", cancel)

    def losses(self) -> dict[str, float]:
        """Of the newest step of each job that the engine has, by the name of its model."""
        found = {live.handle.name: live.handle.losses for live in list(self._live.values())}
        return {name: losses[-1] for name, losses in found.items() if losses}

    def _act(self, identifier: str, done: str, action) -> None:
        """Have the engine do it and write it down. Raises ApiError if the job is not in a state for it."""
        if identifier in self._starting:
            self._starting[identifier].result()
        with self._lock:
            live = self._live.get(identifier)
            if live is None:
                status = self._book.row(identifier)["status"]
                raise ApiError(400, f"The job is {status}; it cannot be {done}.", code="invalid_job_status")
            try:
                action(live)
            except ValueError as error:
                raise ApiError(400, str(error), code="invalid_job_status") from error
            self._look(live)

    def _job(self, request: JobRequest, name: str) -> FinetuneJob:
        """The engine's job. Raises BodyError."""
        book, paths = self._book, {}
        for field in ("training_file", "validation_file"):
            identifier = getattr(request, field)
            paths[field] = None if identifier is None else str(book.folder.file(identifier))
        start = self._models.folder_of(request.model)
        if start is None and request.model not in self._base_names:
            raise BodyError(f"the model {request.model} is no longer there", "model")
        rows = (book.store.find("files", id=request.training_file) or {"rows": 1})["rows"]
        arguments = (paths["training_file"], paths["validation_file"], None if start is None else str(start))
        return request.job(name, *arguments, rows=rows)

    def _start(self, row: dict[str, Any]) -> None:
        identifier, request = row["id"], JobRequest(**row["request"])
        try:
            for file in filter(None, (request.training_file, request.validation_file)):
                self._require(file)
            self._submit(identifier, self._job(request, row["name"]), row["status"] == "paused")
        except EngineStopped:
            return  # the next process goes on
        except (ValueError, OSError) as error:
            self._insist(self._fail, identifier, str(error))
        except Exception:
            logger.exception("the job %s cannot be started", identifier)
            self._insist(self._book.fail, identifier, "the server made a mistake; its log says more")

    def _insist(self, write: Callable, *arguments) -> None:
        """Write down what must not be lost, once there is room on the disk."""
        while True:
            try:
                return write(*arguments)
            except (OSError, sqlite3.Error) as error:
                if not is_full(error):
                    raise
                logger.error("the disk is full; trying again")
                if self._closing.wait(FAULT_SECONDS):
                    raise EngineStopped("the service stopped before the disk had room") from error

    def _fail(self, identifier: str, error: str) -> None:
        """Where the server keeps things is its own, and others' names are theirs."""
        message = error.replace(f"{self._book.folder.root}/", "")
        self._book.fail(identifier, self._catalog.readable(self._book.row(identifier)["owner"], message))

    def _require(self, file: str) -> None:
        if self._book.store.find("files", id=file) is None or not self._book.folder.file(file).exists():
            raise ValueError(f"the file {file} is no longer there; upload it again and create a new job")

    def _submit(self, identifier: str, job: FinetuneJob, paused: bool) -> None:
        live = Live(identifier)
        shows = {"show_checkpoint": partial(self._show_checkpoint, live), "show_trained": live.take}
        resume = self._engine.config.checkpoint_dir is not None
        live.handle = self._engine.finetune(job, resume=resume, paused=paused, **shows)
        self._insist(self._book.accepted, identifier, live.handle.resumed_step)
        with self._lock:
            self._live[identifier] = live  # the follower writes down what comes of it

    def _show_checkpoint(self, live: Live, step: int, adapter: LoraAdapter, events: list[dict]) -> None:
        """On the engine's checkpoint thread. Raises OSError."""
        total_steps = step if live.handle is None else live.handle.total_steps
        self._book.keep_checkpoint(live.id, total_steps, step, adapter, events)

    def _follow(self) -> None:
        while not self._closing.wait(LOOK_SECONDS):
            with self._lock:
                written = [self._try_look(live) for live in list(self._live.values())]
            if not all(written):
                self._closing.wait(FAULT_SECONDS)

    def _try_look(self, live: Live) -> bool:
        """Whether what is new is written down. One job's trouble is not the others'."""
        try:
            self._look(live)
        except Exception:  # a full disk, mostly; requests are served meanwhile
            logger.exception("what the job %s does cannot be written down; trying again", live.id)
            return False
        return True

    def _look(self, live: Live) -> None:
        """Write down what is new."""
        status, events = live.handle.status, live.handle.events()
        if status in FINAL and not self._ended(live, status):
            del self._live[live.id]  # the next process goes on with it
            return
        shown = live.status or "queued" if status in FINAL else status
        if not live.ended and (len(events) > live.seen or shown != live.status):
            self._book.follow(live.id, events, live.seen, live.handle.total_steps, shown)
            live.seen, live.status = len(events), shown
            self._models.prune(live.id)
        if status in FINAL and self._written(live, status):
            self._end(live, status)
            del self._live[live.id]

    def _ended(self, live: Live, status: str) -> bool:
        """Whether the job came to its end, and not merely the engine."""
        if status == "cancelled":
            return live.cancelling
        if status == "failed":
            try:
                self._engine.loop.call(lambda: None)
            except EngineStopped:
                return False
        return True

    def _written(self, live: Live, status: str) -> bool:
        """Whether the checkpoints before the end are kept: who sees that a job has ended sees all of them."""
        if live.written is None:
            live.written = self._engine.checkpoints.written()
        return status == "cancelled" or live.written.done()

    def _end(self, live: Live, status: str) -> None:
        """Is called until it returns: what is done is not done again."""
        if not live.ended:
            self._write_end(live, status)
            live.ended = True
        if status == "succeeded":
            self._models.written(live.handle.name)
        self._models.prune(live.id)

    def _write_end(self, live: Live, status: str) -> None:
        if status == "succeeded":
            self._book.succeed(live.id, live.trained)
        elif status == "failed":
            self._fail(live.id, live.handle.error)
        else:
            self._book.cancel(live.id)
