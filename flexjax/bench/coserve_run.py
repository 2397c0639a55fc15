"""TraceRun: one trace replayed against a running engine, perhaps beside a finetuning job, and what came of it.

It judges nothing and writes nothing.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from flexjax.bench.coserve_engine import Feed
from flexjax.bench.coserve_metrics import Felt, Useful, useful_tokens
from flexjax.bench.coserve_progress import Progress
from flexjax.bench.coserve_trace import Trace, TraceRow
from flexjax.bench.coserve_watch import PoolSample, PoolWatch
from flexjax.bench.measurement import clock_watch
from flexjax.bench.replay import Replay, ReplayedRequest
from flexjax.engine.engine import Engine
from flexjax.engine.handles import FinetuneHandle
from flexjax.engine.metrics import IterationRecord
from flexjax.fields import ConfigError
from flexjax.finetuning.job import FinetuneJob, JobStatus

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """Times in seconds since the trace began.

    Attributes:
        requests: one for each row of the trace, in its order.
        records: iterations since the job or the trace began, whichever was first; useful: as they ended.
        late: of each hand-over, how long after the request was due it began.
        mhz: mean SM clock while rates are counted, None without a GPU.
        refusal: why a request was refused, None if none was.
    """

    trace: Trace
    requests: tuple[Felt, ...]
    records: tuple[IterationRecord, ...]
    useful: tuple[Useful, ...]
    pool: tuple[PoolSample, ...]
    late: tuple[float, ...]
    preemptions: int
    mhz: float | None
    refusal: str | None


@dataclass(frozen=True)
class TraceRun:
    """Args:
    drain_seconds: most that the requests may take after the last arrival.
    hopeless: asked now and then with the requests sent so far; True ends the run early, the rest unfinished.
    stopped: when set, requests sent so far are not waited for; they are unfinished.
    """

    engine: Engine
    trace: Trace
    feed: Feed
    count_from: float
    drain_seconds: float
    show: Callable[[str], None]
    hopeless: Callable[[Sequence[ReplayedRequest]], bool] = lambda requests: False
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, jobs: Sequence[FinetuneJob]) -> Outcome:
        """Replay the trace until its last request has ended; the jobs, if there are any, go on that long.

        Raises:
            RuntimeError: the engine or a job failed.
            ConfigError: the run was stopped before its last request was sent.
        """
        loop, preempted = self.engine.loop, self.engine.scheduler.statistics.preemptions
        first = loop.records[-1].index + 1 if loop.records else 0
        times = [row.due for row in self.trace.rows]
        replay = Replay(self.feed.submit, self.engine.cancel, times, self.trace.rows, loop.clock)
        progress = Progress(replay, len(times), lambda: self._finetuned(first), self.show)
        handles = begin(self.engine, jobs)
        try:
            with PoolWatch(self.engine) as pool:
                mhz = self._replay(replay, handles, progress)
        finally:
            replay.abort()
            for handle in handles:
                with contextlib.suppress(ConfigError):  # it failed, which is told below or above
                    handle.cancel()
        preempted = self.engine.scheduler.statistics.preemptions - preempted
        return self._outcome(replay, first, pool.samples, preempted, mhz)

    def _replay(self, replay: Replay, handles: Sequence[FinetuneHandle], progress: Progress) -> float | None:
        """Mean SM clock from ``count_from`` to the last arrival."""
        total = len(self.trace.rows)

        def going(elapsed: float) -> bool:
            require_sound(replay.requests, handles)
            if self.stopped.is_set() and len(replay.requests) < total:
                raise ConfigError(
                    f"stopped after {elapsed:.0f} s, but the last of {total} requests arrives at "
                    f"{self.trace.seconds:.0f} s: rates cannot be counted; --seconds replays less of the trace"
                )
            progress.tell(elapsed)
            return not self.hopeless(replay.requests)

        replay.start()
        until = functools.partial(self._until, replay.began, going)
        hope = until(lambda elapsed: elapsed >= self.count_from)
        with clock_watch() as clock:
            hope = hope and until(lambda elapsed: len(replay.requests) == total)
        last = self.trace.seconds + self.drain_seconds
        if hope:
            until(lambda elapsed: elapsed > last or replay.done == total or self.stopped.is_set())
        return clock.mean_mhz

    def _until(self, began: float, going: Callable[[float], bool], reached: Callable[[float], bool]) -> bool:
        """Wait; False if it is not ``going`` any more. Both are asked with the seconds since ``began``."""
        while not reached(elapsed := self.engine.loop.clock() - began):
            if not going(elapsed):
                return False
            time.sleep(POLL_SECONDS)
        return going(elapsed)

    def _finetuned(self, first: int) -> int:
        """Tokens, since the iteration ``first``."""
        return sum(each.tokens for each in list(self.engine.trainer.settled) if each.iteration >= first)

    def _outcome(self, replay: Replay, first: int, samples: list[PoolSample], preemptions: int, mhz) -> Outcome:
        loop, sent = self.engine.loop, replay.requests
        earlier = loop.started - replay.began
        kept = [each for each in list(loop.records) if each.index >= first]
        records = tuple(each._replace(start=each.start + earlier) for each in kept)
        unsent = [None] * (len(self.trace.rows) - len(sent))
        return Outcome(
            trace=self.trace,
            requests=tuple(map(felt_by, self.trace.rows, [*sent, *unsent])),
            records=records,
            useful=tuple(useful_tokens(list(self.engine.trainer.settled), {each.index: each.end for each in records})),
            pool=tuple(replace(each, at=each.at - replay.began) for each in samples),
            late=tuple(each.sent - each.due for each in sent if each.sent is not None),
            preemptions=preemptions,
            mhz=mhz,
            refusal=next((each.error for each in sent if each.error is not None), None),
        )


def begin(engine: Engine, jobs: Sequence[FinetuneJob]) -> list[FinetuneHandle]:
    """Start jobs and wait until a microbatch of each has ended: until then their programs are timed and warmed up.

    Raises:
        RuntimeError: a job ended.
    """
    before, handles = len(engine.trainer.settled), [engine.finetune(job) for job in jobs]
    while {job.name for job in jobs} - {each.job for each in list(engine.trainer.settled)[before:]}:
        require_sound((), handles)
        time.sleep(POLL_SECONDS)
    return handles


def require_sound(requests: Sequence[ReplayedRequest], handles: Sequence[FinetuneHandle]) -> None:
    """Raises RuntimeError if the engine's thread died or a job ended."""
    failure = next((each.failure for each in list(requests) if each.failure is not None), None)
    if failure is not None:
        raise RuntimeError(f"the engine failed: {failure}")
    for handle in handles:
        if JobStatus(handle.status).final:
            raise RuntimeError(f"the job {handle.name!r} is {handle.status} before the run's end: {handle.error}")


def felt_by(row: TraceRow, request: ReplayedRequest | None) -> Felt:
    """What the request of a row got, None if it was not even sent."""
    if request is None:
        return Felt(row.due, row.output, (), ended=False)
    began = request.due - row.due
    return Felt(row.due, row.output, tuple(at - began for at in request.times), request.finish_reason == "length")


def finetune_alone(
    engine: Engine, jobs: Sequence[FinetuneJob], warmup: float, seconds: float
) -> tuple[list[Useful], float | None]:
    """Run jobs that have the engine to themselves; what ended in ``seconds`` after ``warmup``; mean SM clock."""
    loop, handles = engine.loop, begin(engine, jobs)
    wait(handles, warmup)
    start = loop.clock() - loop.started
    with clock_watch() as clock:
        wait(handles, seconds)
    ends = {each.index: each.end for each in list(loop.records)}
    useful = useful_tokens(list(engine.trainer.settled), ends)
    for handle in handles:
        handle.cancel()
    return [each for each in useful if each.at >= start], clock.mean_mhz


def wait(handles: Sequence[FinetuneHandle], seconds: float) -> None:
    """Raises RuntimeError if a job ends meanwhile."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        require_sound((), handles)
        time.sleep(POLL_SECONDS)
