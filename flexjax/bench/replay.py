"""Replay: requests sent at set times whatever becomes of them (an open loop), and what each of them felt.

It knows no chat template, no finetuning and no display. A slow server does not slow the stream down: times to first
token count from the moment a request was due, not from when it could be handed over. What comes due while the server
is taking something else is handed over together, so that neither a burst nor a server busy for a while makes a queue.
"""

import itertools
import math
import queue
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from flexjax.engine.outputs import latency_summary
from flexjax.request import RequestOutput

SENDERS = 64
"""Hand-overs that can be under way at the same time; the engine takes each between two iterations."""

POLL_SECONDS = 0.05


def poisson_times(rate: float, seed: int) -> Iterator[float]:
    """Endless arrival times in seconds, ``rate`` a second on average, the first at 0; the same for the same seed."""
    if not rate > 0:
        raise ValueError(f"rate is {rate}; it must be more than 0 requests per second")
    gaps = random.Random(seed)
    at = 0.0
    while True:
        yield at
        at += gaps.expovariate(rate)


def shuffled_forever(items: Sequence, seed: int) -> Iterator:
    """All items in a random order, then all in another, without end; the same for the same seed."""
    order = random.Random(seed)
    while True:
        yield from order.sample(items, len(items))


@dataclass(eq=False)
class ReplayedRequest:
    """One request of the stream. The engine tells it about every token through ``put``.

    Attributes:
        index: place in the stream.
        prompt: as the stream gave it.
        due: seconds on the clock at which it should arrive; sent: at which its hand-over began, None before.
        ids: the engine's, None until it was handed over.
        times: seconds on the clock at which each token came. They are numbers in an array, and tokens are not kept: the
            interpreter would search the millions of them for garbage, and every row would wait.
        ending: the finish reason, None before; failure: why the engine gave it up, if it did.
        error: why it could not be handed over.
    """

    index: int
    prompt: object
    due: float
    clock: Callable[[], float]
    sent: float | None = None
    ids: list[int] | None = None
    times: array = field(default_factory=lambda: array("d"))
    ending: str | None = None
    failure: str | None = None
    error: str | None = None

    def put(self, output: RequestOutput) -> None:
        """On the engine's thread: one more token, or the end."""
        now = self.clock()
        self.times.extend([now] * (len(output.token_ids) - len(self.times)))
        self.ending, self.failure = output.finish_reason, output.error

    @property
    def finish_reason(self) -> str | None:
        return self.ending if self.error is None else "error"

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    def summary(self, until: float = math.inf) -> dict:
        """Plain values: due, ttft, tpot, largest_gap (all seconds), output_tokens, finish_reason.

        Args:
            until: seconds on the clock; later tokens count in neither tpot nor largest_gap.
        """
        times = list(self.times)
        felt = latency_summary(self.due, [at for at in times if at <= until])
        ttft = times[0] - self.due if times else None
        return {**felt, "due": self.due, "ttft": ttft, "output_tokens": len(times), "finish_reason": self.finish_reason}


class Replay:
    """A stream of requests, sent from threads of its own.

    Args:
        submit: hands over requests together and returns the ids made of each; may block. If it refuses, they are
            handed over one by one, so that only those which it refuses alone end in an error.
        cancel: ends requests by their ids.
        times: seconds after ``start`` at which requests are due, ascending, perhaps without end.
        prompts: one for each, at least as many; ``ReplayedRequest.prompt``.

    Attributes:
        requests: everything sent so far, in order.
        began: seconds on the clock, once it has started.
    """

    def __init__(
        self,
        submit: Callable[[list[ReplayedRequest]], list[list[int]]],
        cancel: Callable[[list[int]], None],
        times: Iterable[float],
        prompts: Iterable,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.requests: list[ReplayedRequest] = []
        self._submit, self._cancel, self._clock = submit, cancel, clock
        self._arrivals = zip(itertools.count(), times, prompts)  # noqa: B905  the shortest ends the stream
        self._stopping, self._due = threading.Event(), queue.SimpleQueue()
        self.began: float | None = None
        self._senders = ThreadPoolExecutor(SENDERS, thread_name_prefix="replay")
        self._thread = threading.Thread(target=self._send_all, name="replay", daemon=True)

    def start(self) -> None:
        self.began = self._clock()
        self._thread.start()

    def stop(self) -> None:
        """Send nothing more. What was sent goes on."""
        self._stopping.set()
        self._thread.join()
        self._senders.shutdown(wait=True)

    def wait(self, timeout: float) -> bool:
        """After ``stop``: block until every request has ended, or for ``timeout`` seconds; whether all have."""
        deadline = self._clock() + timeout
        while not (ended := all(each.ended for each in self.requests)) and self._clock() < deadline:
            time.sleep(POLL_SECONDS)
        return ended

    def abort(self) -> None:
        """Send nothing more and end what was sent."""
        self.stop()
        self._cancel([each for request in self.requests if not request.ended for each in request.ids or ()])

    @property
    def waiting(self) -> int:
        """Requests without a token."""
        return sum(not each.ended and not each.times for each in self.requests)

    @property
    def running(self) -> int:
        """Requests that have begun to answer."""
        return sum(not each.ended and bool(each.times) for each in self.requests)

    @property
    def done(self) -> int:
        return sum(each.ended for each in self.requests)

    def _send_all(self) -> None:
        for index, at, prompt in self._arrivals:
            due = self.began + at
            if self._stopping.wait(max(0.0, due - self._clock())):
                return
            request = ReplayedRequest(index, prompt, due, self._clock)
            self.requests.append(request)
            self._due.put(request)
            self._senders.submit(self._hand_over)

    def _hand_over(self) -> None:
        """Everything that is due by now; perhaps nothing, because another thread has taken it."""
        batch = taken(self._due)
        now = self._clock()
        for request in batch:
            request.sent = now
        if batch:
            self._offer(batch)

    def _offer(self, batch: list[ReplayedRequest]) -> None:
        try:
            ids = self._submit(batch)
        except Exception as error:  # the stream goes on; the report shows it
            if len(batch) > 1:
                for request in batch:
                    self._offer([request])
            else:
                batch[0].error = str(error) or type(error).__name__
            return
        for request, own in zip(batch, ids, strict=True):
            request.ids = own


def taken(due: queue.SimpleQueue) -> list[ReplayedRequest]:
    """All that is in the queue now."""
    batch = []
    while True:
        try:
            batch.append(due.get_nowait())
        except queue.Empty:
            return batch
