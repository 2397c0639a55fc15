"""JobRun: how far a finetuning job has come, in microbatches, results and status, and what it reported on the way."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from flexjax.fields import ConfigError
from flexjax.finetuning.data_cursor import DataCursor, Position
from flexjax.finetuning.dataset import Dataset, RowTokenizer, read_dataset
from flexjax.finetuning.job import TRANSITIONS, FinetuneJob, JobStatus
from flexjax.finetuning.packing import PackedMicrobatch
from flexjax.finetuning.schedule import learning_rate

FREE_SETTINGS = ("name", "data", "validation", "init_adapter", "weight", "checkpoint_every")
"""Fields of a job that may change when it resumes; data and validation are compared by their tokens."""


class JobRun:
    """One job with its data read.

    The engine takes the microbatch that ``peek`` shows, and calls ``advance`` once all its work is dispatched (until
    then the microbatch can be redone). Results are recorded when they are read, which may be later, in the order of
    dispatch.

    Attributes:
        job: as it was asked for, but that rows which were given as such are not kept: in their place stands how
            messages name them.
        train, validation: its data; None once the job has ended and nothing of it is on its way.
        total_steps: optimizer steps from its beginning to its end.
        status: see `TRANSITIONS`.
        error: why it failed, for the user; None otherwise.
        losses: one per optimizer step: the mean over the group's trained tokens.
        events: dictionaries with a "type" (status, step, epoch, evaluation, checkpoint, checkpoint_failed), the
            "time" (Unix seconds) and, save for status, the "step": optimizer steps done.
    """

    def __init__(
        self,
        job: FinetuneJob,
        train: Dataset,
        validation: Dataset | None,
        microbatch_tokens: int,
        clock: Callable[[], float] = time.time,
    ):
        self.job, self.train, self.validation = job, train, validation
        self.status = JobStatus.QUEUED
        self.error: str | None = None
        self.losses: list[float] = []
        self.events: list[dict[str, Any]] = []
        self._clock = clock
        self._cursor = DataCursor(job, train, validation, microbatch_tokens)
        self._unread = 0
        self._began = False
        self.total_steps = self._cursor.order.total_steps
        self.learning_rate = learning_rate(job, self.total_steps)

    @classmethod
    def prepare(
        cls,
        job: FinetuneJob,
        tokenizer: RowTokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        microbatch_tokens: int,
        clock: Callable[[], float] = time.time,
    ) -> "JobRun":
        """Reads the job's data.

        Args:
            tokenizer: None takes rows of token ids only.
            vocab_size: of the model.

        Raises:
            ConfigError: rows that cannot be used (DatasetError), or lengths beyond the model's or the microbatch's.
        """
        if job.max_length is not None and job.max_length > max_model_len:
            raise ConfigError(f"max_length is {job.max_length}; max_model_len is {max_model_len} tokens")
        limits = {
            "vocab_size": vocab_size,
            "max_length": job.max_length or min(max_model_len, microbatch_tokens),
            "train_on": job.train_on,
        }
        train = read_dataset(job.data, tokenizer, **limits)
        validation = None if job.validation is None else read_dataset(job.validation, tokenizer, **limits)
        kept = dataclasses.replace(job, data=train.source, validation=None if validation is None else validation.source)
        return cls(kept, train, validation, microbatch_tokens, clock)

    @property
    def position(self) -> Position:
        return self._cursor.position

    @property
    def exhausted(self) -> bool:
        """Nothing is left to dispatch."""
        return self._cursor.exhausted

    @property
    def settled(self) -> bool:
        """Results of all groups that were dispatched are recorded."""
        return self._unread == 0

    def peek(self, ahead: int = 0) -> PackedMicrobatch | None:
        """The microbatch ``ahead`` places after the next one, None when the job is exhausted or its group ends before.
        It is the same object until ``advance`` has passed it."""
        return self._cursor.peek(ahead)

    def advance(self) -> None:
        """Moves past the microbatch that ``peek`` shows."""
        self._unread += self._cursor.peek().closes_group
        self._cursor.advance()

    def group_lines(self, step: int) -> tuple[int, ...]:
        """Lines of the data that optimizer step ``step`` (from 0) trains on, in order."""
        return tuple(sorted(example.line for example in self._cursor.examples_of(step)))

    def record_step(self, loss: float, grad_norm: float) -> None:
        """Results of the next optimizer step: its mean loss and the global gradient norm before clipping. The job
        fails, with the learning rate and the data rows of the step, if either is not a finite number: nothing useful
        can follow."""
        self._unread -= 1
        step = len(self.losses)
        if self.status.final:
            return
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            rate = float(self.learning_rate(step))
            said = f"loss is {loss}, gradient norm {grad_norm} and learning rate {rate:g}"
            self.fail(said, step=step + 1, lines=self.group_lines(step))
            return
        self.losses.append(float(loss))
        self._record(
            "step",
            step=step + 1,
            loss=float(loss),
            learning_rate=self.learning_rate(step),
            grad_norm=float(grad_norm),
            tokens=sum(example.computed_tokens for example in self._cursor.examples_of(step)),
        )
        if self._cursor.order.ends_epoch(step):
            self._record("epoch", step=step + 1, epoch=self._cursor.order.epoch_of(step) + 1)

    def record_evaluation(self, loss: float) -> None:
        """Mean loss over the trained tokens of the evaluation split."""
        self._unread -= 1
        if self.status.final:
            return
        if not math.isfinite(loss):
            self.fail(f"evaluation loss is {loss}", step=len(self.losses))
            return
        self._record("evaluation", step=len(self.losses), loss=float(loss))

    def record_checkpoint(self, path: str, step: int) -> None:
        self._record("checkpoint", step=step, path=path)

    def record_checkpoint_failure(self, error: str, step: int) -> None:
        self._record("checkpoint_failed", step=step, error=error)

    def _record(self, kind: str, **values: Any) -> None:
        self.events.append({"type": kind, **values, "time": self._clock()})

    def start(self) -> None:
        self._enter(JobStatus.RUNNING)
        self._began = True

    def pause(self) -> None:
        self._enter(JobStatus.PAUSED)

    def resume(self) -> None:
        self._enter(JobStatus.RUNNING if self._began else JobStatus.QUEUED)

    def cancel(self) -> None:
        self._enter(JobStatus.CANCELLED)

    def succeed(self) -> None:
        assert self.exhausted and self.settled, "the job has work or results left"
        self._enter(JobStatus.SUCCEEDED)

    def fail(self, error: str, step: int | None = None, lines: Iterable[int] = ()) -> None:
        """Ends the job with a message that names the optimizer step (from 1) and the data rows, where they matter."""
        lines = list(lines)
        where = f" at step {step}" if step is not None else ""
        rows = f"; its data rows are {', '.join(map(str, lines))} of {self.train.source}" if lines else ""
        self.error = f"job {self.job.name!r}: {error}{where}{rows}"
        self._enter(JobStatus.FAILED, error=self.error, step=step, lines=lines)

    def release_data(self) -> None:
        """The job has ended, and only what it reported is wanted any more."""
        assert self.status.final, f"job {self.job.name!r} is {self.status} and needs its data"
        self.train = self.validation = self._cursor = None

    @property
    def holds_seat(self) -> bool:
        """The job has begun and not ended, so its master and optimizer state are in memory."""
        return self._began and not self.status.final

    def _enter(self, status: JobStatus, **details: Any) -> None:
        if status not in TRANSITIONS[self.status]:
            raise ConfigError(f"job {self.job.name!r} is {self.status}; it cannot become {status}")
        self.status = status
        self._record("status", status=str(status), **details)

    def state_dict(self) -> dict[str, Any]:
        """Everything a new JobRun of the same job needs to go on from the last update, as JSON holds it: a group
        that was begun since is begun again, because its gradients are not kept."""
        assert self.settled, "results are still to be recorded"
        return {
            "position": dataclasses.asdict(dataclasses.replace(self.position, index=0)),
            "losses": list(self.losses),
            "events": list(self.events),
            "settings": self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the progress of a job.

        Raises:
            ConfigError: the job's settings or the tokens of its data are not those it began with.
        """
        saved, current = state["settings"], self._settings()
        changed = [
            f"{name} was {saved.get(name)} and is {value}"
            for name, value in current.items()
            if saved.get(name) != value
        ]
        if changed:
            raise ConfigError(f"job {self.job.name!r} cannot resume from its checkpoint: {'; '.join(changed)}")
        self._cursor.position = Position(**state["position"])
        self.losses = list(state["losses"])
        self.events = list(state["events"])

    def _settings(self) -> dict[str, Any]:
        fields = {each.name: getattr(self.job, each.name) for each in dataclasses.fields(self.job)}
        settings = {name: value for name, value in fields.items() if name not in FREE_SETTINGS}
        settings["target_modules"] = list(self.job.target_modules)
        settings["microbatch_tokens"] = self._cursor.capacity
        settings["data"] = self.train.fingerprint
        settings["validation"] = self.validation.fingerprint if self.validation else None
        return settings
