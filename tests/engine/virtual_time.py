"""A host thread and a device in virtual time, for the engine's real loop and scheduler: nothing here takes any time.

The host's time passes where the runner hands a step over and where the loop waits for commands; the device runs what it
was given one after another.
"""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from flexjax.engine.adapter_tier import AdapterTier
from flexjax.engine.adapters import BASE, AdapterTable
from flexjax.engine.batch import Serving
from flexjax.engine.loop import Loop
from flexjax.engine.outputs import Collector
from flexjax.engine.runner import InFlight, StepOutput
from flexjax.layout import SlotLayout
from flexjax.request import Request, SamplingParams
from flexjax.scheduler import LatencyModel, Scheduler, policy_from_name

LAYOUTS = (SlotLayout(8), SlotLayout(8, 64))


@dataclass
class Fence:
    """Done when the clock says ``end``; also the tokens of the step."""

    world: "World"
    end: float

    def is_ready(self) -> bool:
        return self.world.now >= self.end

    def block_until_ready(self) -> None:
        self.world.now = max(self.world.now, self.end)

    def __array__(self, *_, **__) -> np.ndarray:
        self.block_until_ready()
        return np.zeros(LAYOUTS[0].rows, np.int32)


@dataclass
class World:
    """Args:
        step: seconds of the device for each next iteration; host: seconds until its step is on the device's queue.
        commands: (seconds, command) that come in, in order of time; the loop stops after the last.

    Attributes:
        begun, started, ended: of every iteration, when the host began to hand it over, when the device began it, and
            when the device was done.
        obeyed: when each command ran.
    """

    step: Callable[[], float]
    host: Callable[[], float]
    commands: Sequence[tuple[float, Callable[["World"], None]]] = ()
    now: float = 0.0
    begun: list[float] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    obeyed: list[float] = field(default_factory=list)
    training: dict = field(default_factory=dict)  # as a trainer without jobs
    wants_turn: bool = False

    def run(self, predicted: float) -> Loop:
        """Run until the commands have ended; the latency model begins with ``predicted`` seconds a step."""
        latency = LatencyModel()
        for layout in LAYOUTS:
            latency.calibrate(("forward", layout), predicted)
        policy = policy_from_name("inference_only")
        scheduler = Scheduler(LAYOUTS, pages=800, max_rows=8, max_model_len=6400, latency=latency, policy=policy)
        tier = AdapterTier(AdapterTable(2, 8), ThreadPoolExecutor(1))
        self.loop = Loop(scheduler, self, self, tier, clock=lambda: self.now)
        self.loop._commands, self._left = self, [*self.commands, None]
        self.loop.start()
        self.loop.stop()
        assert self.loop._failure is None
        return self.loop

    def add_request(self, number: int, outputs: int, listener=None, prompt: int = 3) -> None:
        """A command: a request for so many tokens, with a prompt of so many, arrives now."""
        sampling, tokens = SamplingParams(temperature=0.0, ignore_eos=True), (number,) * prompt
        request = Request(number, tokens, sampling, max_new_tokens=outputs, arrival=self.now)
        collector = Collector(request, 0, None, listener or queue.SimpleQueue())
        self.loop.add_request(Serving(request, BASE, 0, list(tokens)), collector)

    @property
    def idle(self) -> list[float]:
        """Seconds that the device waited before each iteration but the first."""
        return [start - end for start, end in zip(self.started[1:], self.ended, strict=False)]

    # the runner

    def dispatch_forward(self, iteration, *_) -> InFlight:
        flight = InFlight(iteration, started=self.now)
        self.begun.append(self.now)
        self.now += self.host()
        self.started.append(max([self.now, *self.ended[-1:]]))
        self.ended.append(self.started[-1] + self.step())
        flight.fence = Fence(self, self.ended[-1])
        flight.output = StepOutput(flight.fence, None, None)
        return flight

    # the queue of commands

    def get(self, timeout: float | None) -> tuple[Callable, Future] | None:
        if self._left[:1] == [None]:
            return self._left.pop()
        if not self._left or (timeout is not None and self._left[0][0] > self.now + timeout):
            self.now += timeout
            raise queue.Empty
        at, command = self._left.pop(0)
        self.now = max(self.now, at)
        return lambda: (self.obeyed.append(self.now), command(self)), Future()

    def put(self, _) -> None:
        """The stop that follows the last command."""

    # a trainer without jobs

    def nothing(self, *_) -> dict:
        return {}

    offer = scheduled = failed = dispatched = completed = learning_rates = dispatch_units = abandon = nothing
