"""Bridge: outputs on their way from the engine's thread to the event loop, many with one wake-up."""

import asyncio
import time
from collections import deque
from typing import Protocol

from flexjax.request import RequestOutput


class Sink(Protocol):
    """Takes outputs on the event loop."""

    def take(self, index: int, output: RequestOutput, now: float) -> None:
        """A sequence has grown to this.

        Args:
            index: of the sequence among those of one HTTP request.
            now: seconds on the clock of `time.perf_counter`, when the engine delivered it.
        """


class Bridge:
    """One writer, the engine's thread; one reader, the event loop. The engine pays for a wake-up only when nobody has
    been woken since the reader last looked, so that the tokens of one iteration share one."""

    def __init__(self):
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrivals: deque[tuple[Sink, int, RequestOutput, float]] = deque()
        self._woken = False

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def put(self, sink: Sink, index: int, output: RequestOutput) -> None:
        """On the engine's thread. What arrives after the event loop has closed is dropped: nobody can read it."""
        self._arrivals.append((sink, index, output, time.perf_counter()))
        if self._woken:
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            self._arrivals.clear()

    def _deliver(self) -> None:
        self._woken = False  # before looking: whoever puts something from now on wakes us again
        while self._arrivals:
            sink, index, output, now = self._arrivals.popleft()
            sink.take(index, output, now)
