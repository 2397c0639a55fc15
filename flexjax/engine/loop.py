"""Loop: the engine's thread. Three verbs: schedule, run, update; one iteration in flight.

Everything that touches the scheduler, the trainer or the device happens on this thread; others send it commands.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from flexjax.engine.adapters import AdapterTable
from flexjax.engine.batch import Serving
from flexjax.engine.metrics import IterationRecord, record_of
from flexjax.engine.outputs import Collector, logprob_entry
from flexjax.engine.runner import InFlight, Runner
from flexjax.engine.trainer import Trainer
from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.request import FinishReason
from flexjax.scheduler import Iteration, Scheduler

logger = logging.getLogger(__name__)

KEPT_RECORDS = 100_000
HOST_LEAD = 0.003
"""Seconds before the predicted end of an iteration at which the next one is scheduled, besides what that takes."""

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
        self, scheduler: Scheduler, runner: Runner, trainer: Trainer, adapters: AdapterTable, clock=time.perf_counter
    ):
        self.scheduler, self.runner, self.trainer, self.adapters = scheduler, runner, trainer, adapters
        self.clock, self.started = clock, clock()
        self.serving: dict[int, Serving] = {}
        self.collectors: dict[int, Collector] = {}
        self.records: deque[IterationRecord] = deque(maxlen=KEPT_RECORDS)
        self._commands: queue.SimpleQueue[tuple[Callable, Future] | None] = queue.SimpleQueue()
        self._flight: InFlight | None = None
        self._end = self.started
        self._host_seconds = 0.0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="flexjax-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, command: Callable, *args):
        """Run ``command(*args)`` on the engine's thread between two iterations and return what it returns.

        Raises:
            EngineStopped: the thread has ended.
            Exception: what the command raised.
        """
        future: Future = Future()
        self._commands.put((lambda: command(*args), future))
        if not self._thread.is_alive():
            self._refuse_commands()
        return future.result()

    def stop(self) -> None:
        """End the thread after the iteration in flight. Requests that are not done end with reason "abort"."""
        self._commands.put(None)
        self._thread.join()
        self._refuse_commands()

    def _run(self) -> None:
        try:
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
        self.trainer.offer()
        began = self.clock()
        iteration = self.scheduler.schedule(began)
        flight = None if iteration is None else self._dispatch_forward(iteration)
        self._host_seconds += 0.2 * (self.clock() - began - self._host_seconds)
        if iteration is None and self._flight is None:
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
        return self.runner.dispatch_forward(iteration, self.serving, self.trainer.training, self.adapters)

    def _dispatch_units(self, flight: InFlight | None) -> None:
        """Behind the forward step, and after the results of the iteration before have been read: a device's queue
        may be short, and then enqueueing many units waits for it."""
        if flight is not None:
            rates = self.trainer.learning_rates(flight.iteration)
            self.runner.dispatch_units(flight, self.trainer.training, rates)
            self.trainer.dispatched(flight.iteration)

    def _complete_flight(self) -> None:
        """Read the results of the iteration that was in flight before the newest."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        self._read_tokens(flight)
        previous, self._end = self._end, flight.wait(self._end, self.clock)
        self.scheduler.latency.observe(flight.iteration, flight.seconds)
        self.trainer.completed(flight)
        start = max(flight.started, previous) - self.started
        self.records.append(record_of(flight.iteration, start, flight.seconds, self._serving_seconds(flight.iteration)))

    def _read_tokens(self, flight: InFlight) -> None:
        """Wait for the forward step and deliver what it sampled. Units behind it may still run: what the scheduler
        gives back now can only be written by later programs, and those run after them."""
        if flight.completion is None:
            tokens = flight.wait_forward()
            flight.completion = self.scheduler.complete(flight.iteration, tokens)
            self._deliver(flight)

    def _serving_seconds(self, iteration: Iteration) -> float:
        """Predicted seconds of the iteration's requests alone."""
        rows = [slot.row for slot in iteration.decode] + [part.row for part in iteration.prompts]
        if not rows:
            return 0.0
        chunk = sum(tiles_for(part.length) * PAGE_TOKENS for part in iteration.prompts)
        holding = [each for each in self.scheduler.layouts if each.holds(rows=max(rows) + 1, chunk=chunk)]
        return min(self.scheduler.latency.forward_seconds(layout, iteration.context_tokens) for layout in holding)

    def _deliver(self, flight: InFlight) -> None:
        now = self.clock()
        self._deliver_prompt_logprobs(flight)
        rows = {request_id: row for row, request_id, _ in flight.iteration.sampled_rows}
        for request_id, token, finish in flight.completion.tokens:
            collector = self.collectors[request_id]
            entry = self._logprobs(flight, rows[request_id], token, collector.request.sampling.logprobs)
            stopped = collector.push(token, finish, now, entry)
            if stopped and finish is None:
                self.scheduler.finish(request_id, FinishReason.STOP)
            if stopped or finish is not None:
                self._forget(request_id)

    def _logprobs(self, flight: InFlight, row: int, token: int, count: int | None) -> dict[int, float] | None:
        if count is None:
            return None
        own, ids, values = (np.asarray(array[row]) for array in flight.output.logprobs)
        return logprob_entry(own, token, ids, values, count)

    def _deliver_prompt_logprobs(self, flight: InFlight) -> None:
        for part in flight.iteration.prompts:
            collector = self.collectors.get(part.request_id)
            if collector is None or collector.request.sampling.prompt_logprobs is None:
                continue
            prompt, count = collector.request.prompt, collector.request.sampling.prompt_logprobs
            own, ids, values = (np.asarray(array) for array in flight.output.prompt_logprobs)
            known = len(collector.output.prompt_logprobs)
            positions = range(max(part.start + 1, known), min(part.start + part.length + 1, len(prompt)))
            slots = [part.slot + position - 1 - part.start for position in positions]
            pairs = zip(slots, positions, strict=True)
            entries = [logprob_entry(own[s], prompt[p], ids[s], values[s], count) for s, p in pairs]
            collector.push_prompt_logprobs(entries)

    def add_request(self, serving: Serving, collector: Collector) -> None:
        """On the engine's thread. Raises ValueError if the request can never run."""
        self.scheduler.add_request(serving.request)
        self.adapters.pin(serving.adapter)
        self.serving[serving.request.id] = serving
        self.collectors[serving.request.id] = collector

    def cancel_request(self, request_id: int) -> None:
        """On the engine's thread. Ends a request at once; nothing happens if it has ended."""
        if self.scheduler.cancel(request_id):
            self.collectors[request_id].finish(FinishReason.ABORT)
            self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        del self.collectors[request_id]
        self.adapters.unpin(self.serving.pop(request_id).adapter)

    def _obey(self) -> bool:
        """Run the commands that came; wait for one if there is nothing else to do. False: stop."""
        block = self._flight is None and not self._has_work()
        if self._flight is not None:
            if self._flight.iteration.units:
                self._read_tokens(self._flight)
            self._await_turn()
        while True:
            try:
                item = self._commands.get(block=block)
            except queue.Empty:
                return True
            if item is None:
                return False
            block = False
            command, future = item
            try:
                future.set_result(command())
            except Exception as error:  # belongs to whoever asked
                future.set_exception(error)

    def _has_work(self) -> bool:
        return not self.scheduler.idle or self.trainer.wants_turn

    def _await_turn(self) -> None:
        """Sleep until shortly before the iteration in flight should end, or until it has ended, so that an arrival
        waits for the rest of one iteration, not of two."""
        began = max(self._flight.started, self._end)
        until = began + self._flight.iteration.predicted - HOST_LEAD - self._host_seconds
        while (left := until - self.clock()) > 0 and not self._flight.fence.is_ready():
            time.sleep(min(left, LOOK_SECONDS))

    def _abandon_requests(self) -> None:
        reason = FinishReason.ABORT if self._failure is None else FinishReason.ERROR
        for collector in self.collectors.values():
            collector.finish(reason, error=None if self._failure is None else str(self._failure))
        self.collectors.clear()
        self.trainer.abandon(self._failure)

    def _refuse_commands(self) -> None:
        while True:
            try:
                item = self._commands.get(block=False)
            except queue.Empty:
                return
            if item is not None:
                stopped = EngineStopped("the engine has stopped")
                stopped.__cause__ = self._failure
                item[1].set_exception(stopped)
