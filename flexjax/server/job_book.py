"""JobBook: what is written of fine-tuning jobs, so that it is there after a restart exactly once."""

import csv
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexjax.server.curves import Curves
from flexjax.server.data_folder import DataFolder
from flexjax.server.job_events import FINAL, event_row, rows_of
from flexjax.server.job_request import JobRequest
from flexjax.server.store import Store, new_id
from flexjax.weights.adapter import LoraAdapter

RESULT_COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "tokens")
RESULT_PURPOSE = "fine-tune-results"
"""Of files that jobs leave, beside "fine-tune" for those that clients upload."""

NAME_LETTERS = 8
"""Of a job's identifier, in the name of its model."""


class JobBook:
    """Any thread may call it."""

    def __init__(self, store: Store, folder: DataFolder):
        self.store, self.folder = store, folder
        self.curves = Curves(store)

    def create(self, request: JobRequest, owner: str, base: str, organization: str) -> dict[str, Any]:
        """A job that is to be validated; its row."""
        identifier, now = new_id("ftjob"), time.time()
        name = f"ft:{base}:{organization}:{request.suffix}:{identifier[-NAME_LETTERS:]}"
        with self.store.writing():
            row = {"id": identifier, "created": int(now), "name": name, "request": request.as_dict(), "owner": owner}
            added = self.store.add("jobs", **row, status="validating_files", trained_tokens=0)
            assert added, "an identifier was drawn twice"
            self._add(identifier, event_row("created", now, f"Created fine-tuning job: {identifier}"))
            files = filter(None, (request.training_file, request.validation_file))
            self._add(identifier, event_row("validating", now, f"Validating files: {', '.join(files)}"))
        return self.row(identifier)

    def row(self, identifier: str) -> dict[str, Any] | None:
        return self.store.find("jobs", id=identifier)

    def unfinished(self) -> list[dict[str, Any]]:
        return [row for row in self.store.rows("jobs", {}) if row["status"] not in FINAL]

    def accepted(self, identifier: str, step: int) -> None:
        """The engine has the job: for the first time, or after a restart, where it goes on after ``step``."""
        now = time.time()
        with self.store.writing():
            if not self._add(identifier, event_row("validated", now, "The files are valid; the job is queued")):
                message = f"The server was restarted; the job goes on after step {step}"
                self._add(identifier, event_row(f"restart {now}", now, message))

    def follow(self, identifier: str, events: Sequence[Mapping], start: int, total_steps: int, status: str) -> None:
        """Write the engine's events from index ``start`` on, and the status."""
        with self.store.writing():
            self._add_all(identifier, rows_of(events, start, total_steps))
            self.store.change("jobs", identifier, status=status)

    def keep_checkpoint(
        self, identifier: str, total_steps: int, step: int, adapter: LoraAdapter, events: list[dict]
    ) -> None:
        """A checkpoint becomes a model that can be asked for, before the job can resume from it. Raises OSError."""
        self.folder.write_adapter(self.folder.checkpoint(identifier, step), adapter)
        try:
            with self.store.writing():
                self._add_checkpoint(identifier, total_steps, step, events)
        except sqlite3.Error as error:
            raise OSError(f"the database cannot be written: {error}") from error

    def _add_checkpoint(self, identifier: str, total_steps: int, step: int, events: list[dict]) -> None:
        newest = self.store.rows("checkpoints", {"job": identifier}, limit=1, newest_first=True)
        since = newest[0]["step"] if newest else 0
        measured = [each for each in events if each["type"] != "status" and each["step"] > since]
        self._add_all(identifier, rows_of(measured, 0, total_steps))
        name, metrics = f"{self.row(identifier)['name']}:ckpt-step-{step}", self._metrics(identifier, step)
        now = time.time()
        row = {"id": new_id("ftckpt"), "created": int(now), "job": identifier, "name": name, "step": step}
        if self.store.add("checkpoints", **row, metrics=metrics):
            message = f"Checkpoint created at step {step}: {name}"
            self._add(identifier, event_row(f"checkpoint {step}", now, message))

    def _metrics(self, identifier: str, step: int) -> dict[str, float]:
        """What has been told of a step, as a checkpoint has it."""
        found = [self.store.find("events", job=identifier, key=f"{kind} {step}") for kind in ("step", "evaluation")]
        told = {name: value for event in filter(None, found) for name, value in event["data"].items()}
        metrics = {name: told[name] for name in ("train_loss",) if name in told}
        return {"step": step, **metrics, **(held_out(told["valid_loss"]) if "valid_loss" in told else {})}

    def _complete_checkpoint(self, identifier: str, step: int, loss: float) -> None:
        """What is held out may be measured only after the checkpoint was kept."""
        checkpoint = self.store.find("checkpoints", job=identifier, step=step)
        if checkpoint is not None:
            self.store.change("checkpoints", checkpoint["id"], metrics=checkpoint["metrics"] | held_out(loss))

    def succeed(self, identifier: str, adapter: LoraAdapter) -> None:
        """The adapter and the results are on the disk, and the job has ended; or nothing but the adapter is."""
        row = self.row(identifier)
        self.folder.write_adapter(self.folder.adapter(row["name"]), adapter)
        result, table = new_id("file"), self.results(identifier)
        self.folder.write_file(result, lambda path: write_csv(path, table))
        size = os.path.getsize(self.folder.file(result))
        file = {"id": result, "created": int(time.time()), "filename": f"{identifier}-results.csv", "bytes": size}
        try:
            with self.store.writing():
                self.store.add("files", **file, owner=row["owner"], purpose=RESULT_PURPOSE, rows=len(table))
                self._end(identifier, "succeeded", f"The job has ended; the new model is {row['name']}", result=result)
        except BaseException:
            self.folder.file(result).unlink()  # nobody knows its name
            raise

    def fail(self, identifier: str, error: str) -> None:
        with self.store.writing():
            self._end(identifier, "failed", error, level="error", error=error)

    def cancel(self, identifier: str) -> None:
        with self.store.writing():
            self._end(identifier, "cancelled", "Fine-tuning is cancelled", level="warn")

    def results(self, identifier: str) -> list[dict[str, Any]]:
        """One for each step, with RESULT_COLUMNS; what was not measured there is absent."""
        steps: dict[int, dict[str, Any]] = {}
        for event in self.store.rows("events", {"job": identifier, "type": "metrics"}):
            steps.setdefault(event["data"]["step"], {}).update(event["data"])
        return [{name: steps[step].get(name) for name in RESULT_COLUMNS} for step in sorted(steps)]

    def _end(
        self, identifier: str, status: str, message: str, level: str = "info", error: str | None = None, result=None
    ) -> None:
        now = time.time()
        self._add(identifier, event_row("end", now, message, level))
        values = {"status": status, "error": error, "finished": int(now), "result_file": result}
        self.store.change("jobs", identifier, **values)

    def _add_all(self, identifier: str, rows: list[dict[str, Any]]) -> None:
        added = [row["data"] for row in rows if self._add(identifier, row)]
        for data in filter(None, added):
            self.curves.take(identifier, data)
            if "valid_loss" in data:
                self._complete_checkpoint(identifier, data["step"], data["valid_loss"])
        tokens = sum(data.get("tokens", 0) for data in added)
        if tokens:
            total = self.row(identifier)["trained_tokens"] + tokens
            self.store.change("jobs", identifier, trained_tokens=total)

    def _add(self, identifier: str, row: dict[str, Any]) -> bool:
        return self.store.add("events", id=new_id("ftevent"), job=identifier, **row)


def held_out(loss: float) -> dict[str, float]:
    """Metrics of a checkpoint. OpenAI tells the loss of a part of the validation file from that of all of it; here it
    is always all."""
    return {"valid_loss": loss, "full_valid_loss": loss}


def write_csv(path: Path, table: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, RESULT_COLUMNS)
        writer.writeheader()
        writer.writerows(table)
