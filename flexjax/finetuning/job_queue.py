"""JobQueue: which finetuning jobs run and which wait. It knows no data, no device and not whose turn it is."""

from flexjax.fields import ConfigError
from flexjax.finetuning.job import JobStatus
from flexjax.finetuning.job_run import JobRun


class JobQueue:
    """Jobs in the order of their submission.

    Args:
        max_running: jobs that may hold master and optimizer state at once; a paused job keeps its seat.

    Attributes:
        runs: all that were submitted.
    """

    def __init__(self, max_running: int):
        self.runs: list[JobRun] = []
        self._unended: list[JobRun] = []
        self._max_running = max_running

    def submit(self, run: JobRun) -> None:
        """Appends a job.

        Raises:
            ConfigError: a job of that name has not ended yet.
        """
        for other in self._unended:
            if other.job.name == run.job.name and not other.status.final:
                raise ConfigError(f"a job named {run.job.name!r} is {other.status}; choose another name or cancel it")
        self.runs.append(run)
        self._unended.append(run)

    def admit(self) -> list[JobRun]:
        """Starts queued jobs while there are seats, and returns those it started."""
        self._unended = [run for run in self._unended if not run.status.final]
        waiting = [run for run in self._unended if run.status is JobStatus.QUEUED]
        started = waiting[: self._free_seats]
        for run in started:
            run.start()
        return started

    def running(self) -> list[JobRun]:
        """Jobs that may take part in the next iteration, in the order of their submission."""
        return [run for run in self._unended if run.status is JobStatus.RUNNING]

    @property
    def can_admit(self) -> bool:
        """``admit`` would start a job."""
        return self._free_seats > 0 and any(run.status is JobStatus.QUEUED for run in self._unended)

    @property
    def _free_seats(self) -> int:
        return max(0, self._max_running - sum(run.holds_seat for run in self._unended))
