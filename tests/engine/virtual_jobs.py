"""Finetuning jobs and requests in virtual time: the engine's real loop, trainer, tier and scheduler on a device that
only lets time pass. The world ends when the engine sleeps and nothing can happen from outside any more."""

import queue
import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from flexjax.engine.adapter_tier import AdapterTier
from flexjax.engine.adapters import BASE, AdapterTable, AdapterVersion
from flexjax.engine.batch import Serving
from flexjax.engine.job import Job
from flexjax.engine.loop import Loop
from flexjax.engine.outputs import Collector
from flexjax.engine.runner import InFlight, StepOutput
from flexjax.engine.trainer import Trainer
from flexjax.finetuning.job import FinetuneJob, JobStatus
from flexjax.finetuning.job_run import JobRun
from flexjax.layout import SlotLayout
from flexjax.request import Request, SamplingParams
from flexjax.scheduler import LatencyModel, Scheduler, UnitKind, policy_from_name
from flexjax.weights.adapter import LoraAdapter
from flexjax.weights.checkpoint import CheckpointInfo
from tests.ladder import LLAMA

ROWS, MICROBATCH, WINDOW = 4, 256, 128
LAYOUTS = (SlotLayout(ROWS), SlotLayout(ROWS, 128, tape=True))
DIMS = SimpleNamespace(
    window=WINDOW, model=LLAMA, pages_per_block=2, finals_per_page=4, microbatch=MICROBATCH, lean_tape=None
)
POLICIES = {
    "flat_out": {"units": 3},
    "fixed_budget": {"finetune_tokens": 64, "backward_units": 1},
    "co_serve": {"objective": 0.02},
    "temporal_sharing": {"n": 2, "stretch": 0.01},
}
SPINS = 300
"""Looks for commands, one after another, with no iteration between: what the engine waits for does not come by
itself."""


class Killed(BaseException):
    """The process is gone."""


@dataclass
class Fence:
    """Done when the clock says ``end``; also what a step or a unit returns."""

    world: "World"
    end: float
    value: np.ndarray
    fault: Exception | None = None

    def is_ready(self) -> bool:
        return self.world.now >= self.end

    def block_until_ready(self) -> None:
        self.world.now = max(self.world.now, self.end)
        if self.fault is not None:
            raise self.fault

    def __array__(self, *_, **__) -> np.ndarray:
        self.block_until_ready()
        return self.value

    def __float__(self) -> float:
        return float(np.asarray(self))


class Disk:
    """What `Checkpoints` keeps; it outlives the worlds."""

    def __init__(self):
        self.states: dict[str, dict] = {}

    def save(self, run: JobRun, *_) -> None:
        self.states[run.job.name] = run.state_dict()

    def restore(self, _, like):
        return like

    def close(self) -> None:
        """Nothing is on its way."""


@dataclass
class World:
    """Args:
        draw: of the seconds that programs take, and of loads.
        places: for adapters on the device.
        risk: that a unit fails on the device.

    Attributes:
        ends: of requests, by number: their finish reason; None before.
        faulty: jobs of which a unit has failed.
        asleep: what the jobs were when the engine slept for good; None: it was killed.
    """

    draw: random.Random
    policy: str
    pages: int
    max_running: int
    places: int
    risk: float
    disk: Disk
    now: float = 0.0
    jobs: dict[str, SimpleNamespace] = field(default_factory=dict)
    ends: dict[int, str | None] = field(default_factory=dict)
    asleep: dict[str, JobStatus] | None = None
    commands: list[tuple[float, Callable]] = field(default_factory=list)
    device_end: float = 0.0
    faulty: set[str] = field(default_factory=set)
    spins: int = 0

    def __post_init__(self):
        latency = LatencyModel()
        for layout in LAYOUTS:
            latency.calibrate(("forward", layout), 5e-3)
        latency.calibrate(("loss", WINDOW), 1e-3)
        latency.calibrate(("backward", WINDOW), 1e-3, WINDOW)
        policy = policy_from_name(self.policy, **POLICIES[self.policy])
        self.scheduler = Scheduler(
            LAYOUTS, pages=self.pages, max_rows=ROWS, max_model_len=MICROBATCH, latency=latency, policy=policy
        )
        self.programs = SimpleNamespace(dims=DIMS, place_factors=lambda factors, _: factors)
        self.table = AdapterTable(self.places + 1, 8 * self.places)
        self.tier = AdapterTier(self.table, SimpleNamespace(submit=self.load))
        announce = lambda version, _: self.table.announce(version)
        self.trainer = Trainer(self, self.scheduler, self.tier, self.max_running, self.disk, announce)
        self.loop = Loop(self.scheduler, self, self.trainer, self.tier, clock=self.clock)
        self.loop._commands = self
        post = lambda command, *arguments: self.at(0.0, lambda: command(*arguments))
        self.tier.open(post, stage=lambda _: None, publish=lambda *_: None)

    def clock(self) -> float:
        return self.now

    def at(self, delay: float, command: Callable[[], None]) -> None:
        """Something that happens so many seconds from now."""
        self.commands.append((self.now + delay, command))
        self.commands.sort(key=lambda each: each[0])

    def live(self) -> None:
        """Until nothing can happen any more, where jobs that are paused then are resumed; or until it is killed."""
        self.loop._run()
        if self.loop._failure is not None and not isinstance(self.loop._failure, Killed):
            raise self.loop._failure

    def kill(self) -> None:
        raise Killed

    # what happens from outside

    def submit(self, job: FinetuneJob, adapter: LoraAdapter, paused: bool = False) -> JobRun:
        """A job, which goes on from its newest checkpoint."""
        run = JobRun.prepare(job, None, vocab_size=256, max_model_len=MICROBATCH, microbatch_tokens=MICROBATCH)
        state, found = self.disk.states.get(job.name), None
        if state is not None:
            run.load_state_dict(state)
            found = CheckpointInfo(len(run.losses), Path(), state)
        if paused:
            run.pause()
        self.trainer.submit(Job(run, adapter, found))
        return run

    def add_request(self, number: int, prompt: int, outputs: int, adapter: AdapterVersion = BASE) -> None:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        request = Request(number, (1,) * prompt, sampling, outputs, arrival=self.now, adapter_version=adapter.version)
        self.ends[number] = None
        listener = SimpleNamespace(put=lambda output: self.ends.update({number: output.finish_reason}))
        collector = Collector(request, 0, None, listener)
        self.loop.add_request(Serving(request, adapter, 0, list(request.prompt)), collector)

    def load_adapter(self, name: str) -> AdapterVersion:
        version = self.table.new(name, 8, 1.0)
        self.table.announce(version)
        return version

    @property
    def runs(self) -> list[JobRun]:
        return self.trainer.queue.runs

    # the queue of commands

    def get(self, timeout: float | None) -> tuple[Callable, Future] | None:
        if self.asleep is not None or self.loop.failure is not None:
            raise queue.Empty
        if self.commands and (timeout is None or self.commands[0][0] <= self.now + timeout):
            at, command = self.commands.pop(0)
            self.now, self.spins = max(self.now, at), 0
            return command, Future()
        self.spins += 1
        if timeout is not None and self.spins < SPINS:
            self.now += max(timeout, 1e-3 if self.spins > 1 else 0.0)
            raise queue.Empty
        if self.commands:
            self.now = self.commands[0][0]
            return self.get(None)
        self.spins, paused = 0, [run for run in self.runs if run.status is JobStatus.PAUSED]
        if paused:
            return lambda: self.trainer.resume(paused[0].job.name), Future()
        self.asleep = {run.job.name: run.status for run in self.runs}
        self.scheduler.check()
        return None

    def put(self, item) -> None:
        raise AssertionError("nobody stops the engine")

    # the loader's thread

    def load(self, function: Callable, *arguments) -> None:
        self.at(self.draw.uniform(0, 0.02), lambda: function(*arguments))

    # the device

    def passes(self, seconds: float) -> float:
        """The device is given so much more to do; when it will have done it."""
        self.now += self.draw.uniform(0, 1e-3)
        self.device_end = max(self.now, self.device_end) + seconds * self.draw.uniform(0.7, 1.3)
        self.spins = 0
        return self.device_end

    def dispatch_forward(self, iteration, *_) -> InFlight:
        flight = InFlight(iteration, started=self.now)
        if iteration.layout is not None:
            flight.fence = Fence(self, self.passes(5e-3), np.zeros(ROWS, np.int32))
            flight.output = StepOutput(flight.fence, None, None)
        return flight

    def dispatch_units(self, flight: InFlight, training, rates) -> None:
        for unit in flight.iteration.units:
            if unit.job in self.jobs:
                fault = self.fault(unit.job)
                if fault is not None and self.draw.random() < 0.5:
                    flight.faults.append((unit, fault))
                    continue
                flight.fence = Fence(self, self.passes(1e-3), np.array(1.0, np.float32), fault)
                flight.fences[unit.job] = unit, flight.fence
                if unit.kind is UnitKind.LOSS:
                    assert unit.microbatch in training, "a loss window without its microbatch"
                    flight.losses.append((unit, flight.fence))
                elif unit.kind is UnitKind.UPDATE:
                    flight.norms[unit.job] = flight.fence

    def fault(self, name: str) -> Exception | None:
        """What the device will say of the unit; it says the same of those that read what it wrote."""
        if self.draw.random() < self.risk:
            self.faulty.add(name)
        return MemoryError("no room for that") if name in self.faulty else None

    def add_job(self, name: str, shape, optimizer, version, master, ratios) -> None:
        self.jobs[name] = SimpleNamespace(shape=shape, version=version, master=master)

    def drop_job(self, name: str) -> None:
        del self.jobs[name]
