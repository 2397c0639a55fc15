"""Limits: holds owners to what they may take up at a time, but for sequences, which `Admission` counts.

Where waiting helps, the refusal is status 429 and says how long to wait; else it is 403. Any thread may ask.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flexjax.finetuning.job import FinetuneJob
from flexjax.server.config import ServerConfig
from flexjax.server.errors import ApiError
from flexjax.server.job_events import FINAL
from flexjax.server.owner_limits import OwnerLimits
from flexjax.server.store import Store

JOB_SECONDS = 60
"""After which a client may try again to create a job that was one too many."""


class Limits:
    """The limits of every owner, and what counts against them."""

    def __init__(self, config: ServerConfig, store: Store):
        self._store = store
        self._usual = config.limits_of(None)
        self._own = {owner: config.limits_of(owner) for owner in config.owners}
        self._counting = threading.Lock()

    def of(self, owner: str) -> OwnerLimits:
        return self._own.get(owner, self._usual)

    def sequences(self, owner: str) -> int:
        """That an owner may have in hand; 0 is no limit."""
        return self.of(owner).max_sequences

    def priority(self, owner: str, asked: int | None) -> int:
        """Of a request. Raises ApiError (403) if it asks for a better one than its owner may have."""
        best = self.of(owner).best_priority
        if asked is None:
            return max(0, best or 0)
        if best is not None and asked < best:
            message = f"priority is {asked}; the smallest that you may ask for is {best}, your best_priority."
            raise ApiError(403, message, "priority", "priority_not_allowed")
        return asked

    def weight(self, owner: str, asked: float | None) -> float | None:
        """Of a job; None leaves it what it usually is. Raises ApiError (403) if it asks for too much."""
        most = self.of(owner).max_job_weight
        if asked is None:
            return most if 0 < most < FinetuneJob.weight else None
        if most and asked > most:
            message = f"weight is {asked}; the largest that you may ask for is {most}, your max_job_weight."
            raise ApiError(403, message, "hyperparameters", "weight_not_allowed")
        return asked

    @contextmanager
    def another_job(self, owner: str) -> Iterator[None]:
        """Inside, a job may be written down. Raises ApiError (429) if the owner has as many as it may."""
        most = self.of(owner).max_unfinished_jobs
        if not most:
            yield
            return
        with self._counting:
            counts = self._store.count("jobs", "status", owner=owner)
            unfinished = sum(count for status, count in counts.items() if status not in FINAL)
            if unfinished >= most:
                message = (
                    f"You have {unfinished} jobs that have not ended, and your max_unfinished_jobs is {most}; cancel "
                    "one or try again later."
                )
                raise ApiError(429, message, code="too_many_jobs", headers={"Retry-After": str(JOB_SECONDS)})
            yield

    @contextmanager
    def another_file(self, owner: str, nbytes: int) -> Iterator[None]:
        """Inside, a file may be written down. Raises ApiError (403) if the owner has no room for so many bytes."""
        if not self.of(owner).max_total_file_bytes:
            yield
            return
        with self._counting:
            self.require_file_room(owner, nbytes)
            yield

    def require_file_room(self, owner: str, nbytes: int) -> None:
        """Raises ApiError (403) if the owner has no room for so many bytes now."""
        most = self.of(owner).max_total_file_bytes
        if most and (total := self._store.total("files", "bytes", owner=owner)) + nbytes > most:
            message = (
                f"The file has {nbytes} bytes, and your files have {total}; your max_total_file_bytes is {most}: "
                "delete some."
            )
            raise ApiError(403, message, "file", "no_room_for_files")
