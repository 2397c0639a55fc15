"""VirtualEngine: a trace replayed through the real scheduler and packing on a virtual clock; no device, no threads.

It turns as `flexjax.engine.loop` does: the next iteration is scheduled when the same `Lead` says so, its forward step
stands behind the running one in the device's queue, tokens are read when the forward step has ended, and what takes the
host's time takes time here.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flexjax.bench.virtual_device import VirtualDevice
from flexjax.engine.lead import Lead
from flexjax.engine.metrics import IterationRecord, record_of
from flexjax.finetuning.dataset import Dataset, Example
from flexjax.finetuning.job import FinetuneJob, JobStatus
from flexjax.finetuning.job_run import JobRun
from flexjax.finetuning.packing import PackedMicrobatch
from flexjax.layout import PAGE_TOKENS
from flexjax.request import Request, SamplingParams
from flexjax.scheduler import Completion, Iteration, Microbatch, Scheduler, UnitKind
from flexjax.scheduler.terms import unit_term

IDLE_PAUSE = 0.001
MEMORY_SECONDS = 1.0
"""Between two looks at the memory."""


@dataclass(frozen=True)
class Host:
    """Seconds of the engine's thread: ``turn`` for an iteration, ``row`` more for each of its rows."""

    turn: float = 0.4e-3
    row: float = 4e-6

    def seconds(self, iteration: Iteration) -> float:
        return self.turn + self.row * len(iteration.decode)


@dataclass(frozen=True)
class TapeShape:
    """What every microbatch of a run has in common; fields as in `Microbatch`."""

    window: int = 512
    layers: int = 32
    lowest_layer: int = 0
    pages_per_block: int = 24
    finals_per_page: int = 10


@dataclass
class Asked:
    """A request of the trace and when its tokens came, seconds."""

    due: float
    output_tokens: int
    times: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.times) == self.output_tokens

    @property
    def ttft(self) -> float:
        return self.times[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else None


@dataclass
class Trained:
    """A finetuning job here: its run, microbatches with units to dispatch, those not settled, and when others ended."""

    run: JobRun
    current: list[Microbatch] = field(default_factory=list)
    packed: dict[int, PackedMicrobatch] = field(default_factory=dict)
    finished: list[tuple[float, int]] = field(default_factory=list)


@dataclass
class Flight:
    """An iteration on the device: seconds at which it began, its forward step ended, and all of it ended."""

    iteration: Iteration
    began: float
    forward_end: float
    end: float
    completion: Completion | None = None


def job_of_lengths(name: str, lengths: Sequence[int], microbatch_tokens: int, **settings) -> JobRun:
    """A job of sequences without content, every token trained; it never ends by itself."""
    examples = tuple(
        Example(np.zeros(length + 1, np.int32), np.arange(length + 1) > 0, line)
        for line, length in enumerate(lengths, 1)
    )
    job = FinetuneJob(name, data=[], max_steps=10**6, **settings)
    run = JobRun(job, Dataset("lengths", examples, 0), None, microbatch_tokens)
    run.start()
    return run


class VirtualEngine:
    """One run of a trace.

    Args:
        trace: rows {"t": seconds, "p": prompt tokens, "o": output tokens}, in order of ``t``.
        jobs: that finetune throughout.

    Attributes:
        asked: the requests, in order of the trace; jobs: by name.
        memory: (seconds, pages of tapes, of requests, free) about once a second.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        device: VirtualDevice,
        trace: Sequence[Mapping],
        jobs: Sequence[JobRun] = (),
        shape: TapeShape | None = None,
        host: Host | None = None,
    ):
        self.scheduler, self.device = scheduler, device
        self.asked = [Asked(float(row["t"]), row["o"]) for row in trace]
        self.jobs = {run.job.name: Trained(run) for run in jobs}
        self.records: list[IterationRecord] = []
        self.memory: list[tuple[float, int, int, int]] = []
        self.now = 0.0
        self._host, self._lead, self._shape = host or Host(), Lead(), shape or TapeShape()
        self._trace, self._next = trace, 0
        self._flight: Flight | None = None
        self._end = 0.0
        self._microbatches: dict[int, Microbatch] = {}
        for run in jobs:
            scheduler.set_job(run.job.name, run.job.weight)

    def run(self, until: float | None = None) -> None:
        """Turn until every request has ended, or the clock says ``until``."""
        while until is None or self.now < until:
            if self._next == len(self._trace) and all(each.done for each in self.asked) and until is None:
                return
            self._await_turn()
            self._arrive()
            self._turn()

    def _await_turn(self) -> None:
        flight = self._flight
        if flight is None:
            return
        if flight.iteration.units:
            self._read_tokens(flight)
        until = self._lead.begin_at(flight.began, flight.iteration.predicted)
        self.now = max(self.now, min(until, flight.end))

    def _arrive(self) -> None:
        if self._flight is None and self.scheduler.idle and not self.jobs and self._next < len(self._trace):
            self.now = max(self.now, self._trace[self._next]["t"])
        while self._next < len(self._trace) and self._trace[self._next]["t"] <= self.now:
            row, index = self._trace[self._next], self._next
            self._next += 1
            params = SamplingParams(max_tokens=row["o"], ignore_eos=True)
            self.scheduler.add_request(Request(index, tuple([index] * row["p"]), params, row["o"], arrival=row["t"]))

    def _turn(self) -> None:
        self._offer()
        iteration = self.scheduler.schedule(self.now)
        if iteration is None:
            if self._flight is None:
                self.now += IDLE_PAUSE
            self._complete()
            return
        taken = self._host.seconds(iteration)
        self._lead.began(taken)
        self.now += taken
        began = max(self.now, self._end if self._flight is None else self._flight.end)
        forward_end = began + self.device.forward_seconds(iteration)
        if iteration.layout is not None:
            self._complete()
        units = sum(self.device.unit_seconds(unit, self._microbatches[unit.microbatch]) for unit in iteration.units)
        end = (max(forward_end, self.now) if iteration.units else forward_end) + units
        if iteration.layout is None:
            self._complete()
        self._dispatched(iteration)
        self._flight = Flight(iteration, began, forward_end, end)

    def _complete(self) -> None:
        flight, self._flight = self._flight, None
        if flight is None:
            return
        self._read_tokens(flight)
        self.now = max(self.now, flight.end)
        began, self._end = max(flight.began, self._end), flight.end
        self.scheduler.latency.observe(flight.iteration, flight.end - began)
        self._lead.ended(flight.end - began, flight.iteration.predicted)
        for identifier in flight.completion.microbatches:
            self._settle(identifier)
        self.records.append(record_of(flight.iteration, began, flight.end - began, 0.0))
        if not self.memory or flight.end - self.memory[-1][0] >= MEMORY_SECONDS:
            counts = self.scheduler.statistics
            held = counts.pages - counts.free_pages - counts.tape_pages
            self.memory.append((flight.end, counts.tape_pages, held, counts.free_pages))

    def _read_tokens(self, flight: Flight) -> None:
        if flight.completion is not None:
            return
        self.now = max(self.now, flight.forward_end)
        tokens = {row: 0 for row, _, _ in flight.iteration.sampled_rows}
        flight.completion = self.scheduler.complete(flight.iteration, tokens)
        for token in flight.completion.tokens:
            self.asked[token.request_id].times.append(self.now)

    def _offer(self) -> None:
        for job in self.jobs.values():
            if job.run.status is JobStatus.RUNNING and self.scheduler.wants_microbatch(job.run.job.name):
                self._offer_microbatch(job, job.run.peek(len(job.current)))

    def _offer_microbatch(self, job: Trained, packed: PackedMicrobatch) -> None:
        microbatch = Microbatch(
            id=len(self._microbatches),
            job=job.run.job.name,
            lengths=packed.lengths,
            window=self._shape.window,
            layers=self._shape.layers,
            lowest_layer=self._shape.lowest_layer,
            pages_per_block=self._shape.pages_per_block,
            closes_group=packed.closes_group,
            finals_per_page=self._shape.finals_per_page,
        )
        if self.scheduler.try_add_microbatch(microbatch):
            self._microbatches[microbatch.id] = microbatch
            job.current.append(microbatch)
            job.packed[microbatch.id] = packed

    def _dispatched(self, iteration: Iteration) -> None:
        for unit in iteration.units:
            job = self.jobs[unit.job]
            if unit == job.current[0].last_unit:
                job.current.pop(0)
                job.run.advance()

    def _settle(self, identifier: int) -> None:
        job = self.jobs[self._microbatches[identifier].job]
        packed = job.packed.pop(identifier)
        job.finished.append((self._end, packed.tokens))
        if packed.closes_group:
            job.run.record_step(0.0, 0.0)


def calibrate(scheduler: Scheduler, device: VirtualDevice, window: int, context: int, skew: Sequence[float]) -> None:
    """Fill the latency table as start-up does: every layout with little and with much context, every unit on an idle
    window. The measurements are wrong by factors taken from ``skew`` in turn."""
    latency, roofline, factors = scheduler.latency, device.roofline, itertools.cycle(skew)
    for layout in scheduler.layouts:
        factor = next(factors)
        for rows, tiles in ((64, 64), (context, 64), (64, context)):
            rows, tiles = layout.rows * rows, layout.tiles * tiles
            seconds = factor * roofline.forward(layout, rows, tiles)
            latency.calibrate(("forward", layout), seconds, rows + tiles, tiles)
    latency.calibrate(unit_term(UnitKind.LOSS, window), next(factors) * roofline.loss(window))
    factor = next(factors)
    for each in (64, context):
        seen = window // PAGE_TOKENS * each
        latency.calibrate(unit_term(UnitKind.BACKWARD, window), factor * roofline.backward(window, seen), seen)
