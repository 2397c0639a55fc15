"""FinetuneHandle: a finetuning job as its submitter sees it."""

import time

from flexjax.engine.loop import Loop
from flexjax.engine.trainer import Trainer
from flexjax.finetuning.job_run import JobRun

POLL_SECONDS = 0.02


class FinetuneHandle:
    """Attributes:
    name: of the job and of the adapter it trains.
    resumed_step: optimizer steps that a checkpoint had when the job went on from it; 0 for a fresh one.
    """

    def __init__(self, run: JobRun, loop: Loop, trainer: Trainer, resumed_step: int = 0):
        self._run, self._loop, self._trainer = run, loop, trainer
        self.name = run.job.name
        self.resumed_step = resumed_step

    @property
    def status(self) -> str:
        """"queued", "running", "paused", "succeeded", "failed" or "cancelled"."""
        return str(self._run.status)

    @property
    def error(self) -> str | None:
        """Why the job failed."""
        return self._run.error

    @property
    def losses(self) -> list[float]:
        """One per optimizer step: the mean over the trained tokens of its group."""
        return list(self._run.losses)

    @property
    def total_steps(self) -> int:
        return self._run.total_steps

    def events(self) -> list[dict]:
        """What happened so far: dicts with "type" (status, step, epoch, evaluation, checkpoint), "time" and more."""
        return list(self._run.events)

    def wait(self, timeout: float | None = None) -> str:
        """Block until the job has ended, or for ``timeout`` seconds; returns the status."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._run.status.final and (deadline is None or time.monotonic() < deadline):
            time.sleep(POLL_SECONDS)
        return self.status

    def pause(self) -> None:
        """No new unit is scheduled; the job keeps its memory. Raises ConfigError if it has ended."""
        self._loop.call(self._trainer.pause, self.name)

    def resume(self) -> None:
        self._loop.call(self._trainer.resume, self.name)

    def cancel(self) -> None:
        """End the job; its adapter is given up. Raises ConfigError if it has ended."""
        self._loop.call(self._trainer.cancel, self.name)
