"""CoServing: one measured run, a stream of chat requests beside a finetuning job. It judges nothing."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexjax.bench.live import LiveDisplay, Snapshot
from flexjax.bench.percentiles import percentiles
from flexjax.bench.replay import Replay, ReplayedRequest, poisson_times, shuffled_forever
from flexjax.bench.report import IterationRecord, iteration_summary, loss_summary, request_summary
from flexjax.engine.engine import Engine
from flexjax.engine.handles import FinetuneHandle
from flexjax.engine.submission import Submission
from flexjax.fields import ConfigError
from flexjax.finetuning.job import FinetuneJob, JobStatus
from flexjax.request import SamplingParams

UPDATE_SECONDS = 0.25
RECENT_SECONDS = 10.0
"""Of iterations, over which shares of the time are shown."""

DRAIN_SECONDS = 300.0
"""Most that the last requests may take once nothing new comes."""


@dataclass(frozen=True)
class Episode:
    """What a run left behind; times in seconds since the engine started.

    Attributes:
        objective: seconds per output token.
        status: of the job; error: why it failed.
        requests: see `ReplayedRequest.summary`; times per token are those beside the job, before it ended.
        validation: (optimizer step, loss).
        ended: when the job did.
    """

    objective: float
    status: str
    error: str | None
    records: tuple[IterationRecord, ...]
    requests: tuple[dict, ...]
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    ended: float

    @property
    def tokens_per_second(self) -> float:
        """Finetuning tokens through the forward step, from the first iteration that finetuned to the job's end, times
        at which it got nothing included."""
        return rate_until(self.records, self.ended)

    @property
    def summary(self) -> dict:
        """As in a report."""
        loss = {"loss": loss_summary(self.losses)}
        return {**iteration_summary(self.records), **request_summary(self.requests), **loss}


class CoServing:
    """A run under way. A context manager: leaving it early ends the stream and its requests.

    Args:
        job: starts when the run does.
        questions: asked one by one, in random order, of the base model.
        rate: requests per second, on average.
        answer_tokens: most tokens of an answer.

    Attributes:
        handle: the job's, once `run` has begun.
    """

    def __init__(
        self,
        engine: Engine,
        job: FinetuneJob,
        questions: Sequence[str],
        *,
        rate: float,
        answer_tokens: int,
        seed: int,
        display: LiveDisplay,
    ):
        self.engine, self.job, self.display = engine, job, display
        self._sampling = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=answer_tokens, seed=seed)
        prompts = ([{"role": "user", "content": each}] for each in shuffled_forever(questions, seed))
        self.replay = Replay(self._submit, engine.cancel, poisson_times(rate, seed), prompts, engine.loop.clock)
        self._first_record = len(engine.loop.records)
        self._began, self._ended = engine.loop.clock(), None
        self.handle: FinetuneHandle | None = None

    def __enter__(self) -> "CoServing":
        self.display.__enter__()
        self.replay.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self.display.__exit__()
        if kind is not None:
            self.replay.abort()

    def run(self, seconds: float) -> bool:
        """Stream and finetune until the job has ended, or for ``seconds``; then the job is cancelled. True if it
        ended by itself. No new requests come after that; the last ones may still be answered."""
        self.handle = self.engine.finetune(self.job)
        deadline = time.monotonic() + seconds
        while not (ended := JobStatus(self.handle.status).final) and time.monotonic() < deadline:
            self.display.update(self.snapshot("serving and finetuning"))
            time.sleep(UPDATE_SECONDS)
        if not ended:
            with contextlib.suppress(ConfigError):  # it ended just now
                self.handle.cancel()
        self._ended = self.engine.loop.clock()
        self.replay.stop()
        self.display.update(self.snapshot("finetuning has ended"), last=True)
        return ended

    def finish(self) -> Episode:
        """Wait for the last answers and gather what was measured."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self.replay.wait(UPDATE_SECONDS) and time.monotonic() < deadline:
            self.display.update(self.snapshot("answering the last requests"))
        self.replay.abort()
        self.display.update(self.snapshot("done"), last=True)
        handle, started = self.handle, self.engine.loop.started
        requests = [each.summary(self._ended) for each in self.replay.requests]
        evaluations = [event for event in handle.events() if event["type"] == "evaluation"]
        return Episode(
            objective=self.engine.scheduler.policy.objective,
            status=handle.status,
            error=handle.error,
            records=tuple(self._records()),
            requests=tuple(each | {"due": each["due"] - started} for each in requests),
            losses=tuple(handle.losses),
            validation=tuple((event["step"], event["loss"]) for event in evaluations),
            ended=self._ended - started,
        )

    def snapshot(self, phase: str) -> Snapshot:
        """How things stand."""
        felt = [each.summary() for each in list(self.replay.requests)]
        records, handle = self._records(), self.handle
        return Snapshot(
            elapsed=self.engine.loop.clock() - self._began,
            phase=phase,
            waiting=self.replay.waiting,
            running=self.replay.running,
            done=self.replay.done,
            ttft=percentiles(each["ttft"] for each in felt),
            tpot=percentiles(each["tpot"] for each in felt),
            objective=self.engine.scheduler.policy.objective,
            step=len(handle.losses),
            steps=handle.total_steps,
            losses=handle.losses,
            tokens_per_second=rate_until(records, (self._ended or self.engine.loop.clock()) - self.engine.loop.started),
            shares=shares(records),
        )

    def _submit(self, requests: Sequence[ReplayedRequest]) -> list[list[int]]:
        return self.engine.submit_all([self._submission(each) for each in requests])

    def _submission(self, request: ReplayedRequest) -> Submission:
        prompt = self.engine.tokenizer.apply_chat_template(request.prompt)
        sampling = replace(self._sampling, seed=self._sampling.seed + request.index)
        return Submission(prompt, sampling, None, request)

    def _records(self) -> list[IterationRecord]:
        """Iterations of this run; the engine's thread only ever appends to the end."""
        kept = self.engine.loop.records
        return [kept[place] for place in range(self._first_record, len(kept))]


def rate_until(records: Sequence[IterationRecord], end: float) -> float:
    """Finetuning tokens per second from the first iteration that finetuned to ``end``; 0 before."""
    first = next((each.start for each in records if each.finetunes), end)
    return sum(each.finetune_slots for each in records) / (end - first) if end > first else 0.0


def shares(records: Sequence[IterationRecord]) -> tuple[float, float, float]:
    """Parts of the last seconds that went into decoding, prompts and finetuning; all 0 without iterations."""
    recent = [each for each in records if each.end > records[-1].end - RECENT_SECONDS]
    decoding, prompts, finetuning = (sum(each.split[part] for each in recent) for part in range(3))
    total = (decoding + prompts + finetuning) or 1.0
    return decoding / total, prompts / total, finetuning / total
