"""Loop: the engine's thread. Three verbs: schedule, run, update; one iteration in flight.

Everything that touches the scheduler, the trainer or the device happens on this thread; others send it commands.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from flexjax.engine.adapter_tier import AdapterTier, User
from flexjax.engine.batch import Serving
from flexjax.engine.delivery import Delivery
from flexjax.engine.interpreter import prompt_interpreter
from flexjax.engine.lead import Lead
from flexjax.engine.metrics import History, IterationRecord, record_of
from flexjax.engine.outputs import Collector
from flexjax.engine.runner import InFlight, Runner
from flexjax.engine.trainer import Trainer
from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.request import FinishReason
from flexjax.scheduler import Iteration, Scheduler
from flexjax.scheduler.draft import context_of

logger = logging.getLogger(__name__)

KEPT_RECORDS = 100_000
LOOK_SECONDS = 0.001
"""Between two looks whether the iteration in flight has ended before its time."""

IDLE_PAUSE = 0.001
"""Seconds between two looks when work is waiting for something else, such as pages."""


class EngineStopped(RuntimeError):
    """The engine was closed, or its thread died; the cause is chained."""


class Loop:
    """Owns the thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, trainer: Trainer, tier: AdapterTier, clock=time.perf_counter
    ):
        self.scheduler, self.runner, self.trainer, self.tier = scheduler, runner, trainer, tier
        self.clock, self.started = clock, clock()
        self.serving: dict[int, Serving] = {}
        self.delivery, self.lead = Delivery(), Lead()
        self.records = History(IterationRecord, KEPT_RECORDS)
        self._commands: queue.SimpleQueue[tuple[Callable, Future] | None] = queue.SimpleQueue()
        self._flight: InFlight | None = None
        self._end = self.started
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="flexjax-engine", daemon=True)

    @property
    def failure(self) -> BaseException | None:
        """Why the thread died; None while it lives, and after `stop`."""
        return self._failure

    def start(self) -> None:
        self._thread.start()

    def call(self, command: Callable, *args):
        """Run ``command(*args)`` on the engine's thread between two iterations and return what it returns.

        Raises:
            EngineStopped: the thread has ended.
            Exception: what the command raised.
        """
        return self.post(command, *args).result()

    def post(self, command: Callable, *args) -> Future:
        """As `call`, without waiting: what the command returns or raises is in the future, which must not be
        cancelled."""
        future: Future = Future()
        self._commands.put((lambda: command(*args), future))
        if not self._thread.is_alive():
            self._refuse_commands()
        return future

    def stop(self) -> None:
        """End the thread after the iteration in flight. Requests that are not done end with reason "abort"."""
        self._commands.put(None)
        self._thread.join()
        self._refuse_commands()

    def _run(self) -> None:
        try:
            with prompt_interpreter():
                while self._obey():
                    self._turn()
                self._complete_flight()
        except BaseException as error:  # the thread must not die silently: whoever waits is told
            logger.exception("the engine's thread died")
            self._failure = error
        self._abandon_requests()
        self._refuse_commands()

    def _turn(self) -> None:
        """Schedule, run, update."""
        began = self.clock()
        self.trainer.offer()
        self.tier.advance()
        iteration = self.scheduler.schedule(self.clock())
        flight = None if iteration is None else self._dispatch_forward(iteration)
        if flight is not None:
            self.lead.began(self.clock() - began)
        elif self._flight is None:
            time.sleep(IDLE_PAUSE)
        if flight is not None and flight.output is None:
            self._dispatch_units(flight)  # nothing else keeps the device busy meanwhile
            self._complete_flight()
        else:
            self._complete_flight()
            self._dispatch_units(flight)
        self._flight = flight

    def _dispatch_forward(self, iteration: Iteration) -> InFlight:
        self.trainer.scheduled(iteration)
        for part in iteration.prompts:
            self.serving[part.request_id].tokens = self.scheduler.tokens_of(part.request_id)
        before, last = self.clock(), self._flight
        flight = self.runner.dispatch_forward(iteration, self.serving, self.trainer.training, self.tier.table)
        if last is not None:
            last.look((before + self.clock()) / 2)  # if it has ended meanwhile, nobody knows when
        return flight

    def _dispatch_units(self, flight: InFlight | None) -> None:
        """Behind the forward step, and after the results of the iteration before have been read: a device's queue
        may be short, and then enqueueing many units waits for it."""
        if flight is not None:
            rates = self.trainer.learning_rates(flight.iteration)
            self.runner.dispatch_units(flight, self.trainer.training, rates)
            self.trainer.failed(flight)
            self.trainer.dispatched(flight.iteration)

    def _complete_flight(self) -> None:
        """Read the results of the iteration that was in flight before the newest."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        self._read_tokens(flight)
        previous, self._end = self._end, flight.wait(self._end, self.clock)
        self.scheduler.latency.observe(flight.iteration, flight.seconds)
        self.lead.ended(flight.seconds, flight.iteration.predicted)
        self.trainer.completed(flight)
        start = max(flight.started, previous) - self.started
        self.records.append(record_of(flight.iteration, start, flight.seconds, self._serving_seconds(flight.iteration)))

    def _read_tokens(self, flight: InFlight) -> None:
        """Wait for the forward step and deliver what it sampled. Units behind it may still run: what the scheduler
        gives back now can only be written by later programs, and those run after them."""
        if flight.completion is None:
            tokens = flight.wait_forward()
            flight.completion = self.scheduler.complete(flight.iteration, tokens)
            for request_id, known in self.delivery.deliver(flight):
                if not known:
                    self.scheduler.finish(request_id, FinishReason.STOP)
                self._forget(request_id)

    def _serving_seconds(self, iteration: Iteration) -> float:
        """Predicted seconds of the iteration's requests alone; all of it without finetuning."""
        if not (iteration.windows or iteration.units):
            return iteration.predicted
        rows = [slot.row for slot in iteration.decode] + [part.row for part in iteration.prompts]
        if not rows:
            return 0.0
        chunk = sum(tiles_for(part.length) * PAGE_TOKENS for part in iteration.prompts)
        holding = [each for each in self.scheduler.layouts if each.holds(rows=max(rows) + 1, chunk=chunk)]
        tiles = sum(context_of(part.start, part.length) for part in iteration.prompts)
        context = iteration.context_tokens - iteration.tile_context + tiles
        return min(self.scheduler.latency.forward_seconds(layout, context, tiles) for layout in holding)

    def add_request(self, serving: Serving, collector: Collector) -> None:
        """On the engine's thread: a request that can run, as scheduler and tier have said. The scheduler hears of it
        once its adapter is on the device."""
        request = serving.request
        self.serving[request.id] = serving
        self.delivery.collectors[request.id] = collector
        seniority = (request.priority, request.arrival, request.id)
        start, refuse = partial(self.scheduler.add_request, request), partial(self._refuse_request, request.id)
        self.tier.want(serving.adapter, request.id, User(seniority, start, refuse))

    def cancel_request(self, request_id: int) -> None:
        """On the engine's thread. Ends a request at once; nothing happens if it has ended."""
        serving = self.serving.get(request_id)
        if serving is None:
            return
        waits = self.tier.give_up(serving.adapter, request_id)
        if waits or self.scheduler.cancel(request_id):
            self.delivery.collectors[request_id].finish(FinishReason.ABORT)
            self._forget(request_id, held=not waits)

    def _refuse_request(self, request_id: int, error: Exception) -> None:
        """Its adapter cannot be had."""
        self.delivery.collectors[request_id].finish(FinishReason.ERROR, error=str(error))
        self._forget(request_id, held=False)

    def _forget(self, request_id: int, held: bool = True) -> None:
        """``held``: its adapter's place was its own."""
        del self.delivery.collectors[request_id]
        adapter = self.serving.pop(request_id).adapter
        if held:
            self.tier.release(adapter)

    def _obey(self) -> bool:
        """Run commands as they come, until it is time for the next iteration. False: stop."""
        if self._flight is not None and self._flight.iteration.units:
            self._read_tokens(self._flight)
        while True:
            patience = self._patience()
            try:
                item = self._commands.get(timeout=patience)
            except queue.Empty:
                if patience:
                    continue
                return True
            if item is None:
                return False
            command, future = item
            try:
                future.set_result(command())
            except Exception as error:  # belongs to whoever asked
                future.set_exception(error)
            except BaseException as error:  # nothing can go on
                future.set_exception(stopped(error))
                raise
            self.tier.advance()

    def _patience(self) -> float | None:
        """Seconds to wait for commands now; None: until one comes, for there is nothing else to do. The next iteration
        begins shortly before the one in flight should end, so that an arrival waits for the rest of one, not of two."""
        if self._flight is None:
            return 0.0 if self._has_work() else None
        now = self.clock()
        if self._flight.look(now):
            return 0.0
        began = max(self._flight.started, self._end)
        left = self.lead.begin_at(began, self._flight.iteration.predicted) - now
        return min(max(left, 0.0), LOOK_SECONDS)

    def _has_work(self) -> bool:
        return not self.scheduler.idle or self.trainer.wants_turn or self.tier.wants_turn

    def _abandon_requests(self) -> None:
        reason = FinishReason.ABORT if self._failure is None else FinishReason.ERROR
        for collector in self.delivery.collectors.values():
            collector.finish(reason, error=None if self._failure is None else str(self._failure))
        self.delivery.collectors.clear()
        self.trainer.abandon(self._failure)

    def _refuse_commands(self) -> None:
        while True:
            try:
                item = self._commands.get(timeout=0)
            except queue.Empty:
                return
            if item is not None:
                item[1].set_exception(stopped(self._failure))


def stopped(cause: BaseException | None) -> EngineStopped:
    error = EngineStopped("the engine has stopped")
    error.__cause__ = cause
    return error
