"""Outputs: the sequences of one HTTP request, as far as they have grown. It knows no engine and no transport.

Of each sequence only the newest snapshot is kept, so a client that reads slowly costs no memory.
"""

import asyncio
from collections.abc import AsyncIterator

from flexjax.request import RequestOutput
from flexjax.server.timeline import Timeline


class Outputs:
    """A sink of the bridge; all of it happens on the event loop.

    Args:
        count: sequences.
        timeline: is told of every step.

    Attributes:
        newest: by index; None before anything came.
    """

    def __init__(self, count: int, timeline: Timeline):
        self.newest: list[RequestOutput | None] = [None] * count
        self._timeline = timeline
        self._growing = count
        self._fresh: set[int] = set()
        self._changed, self._ended = asyncio.Event(), asyncio.Event()

    @property
    def ended(self) -> bool:
        """Every sequence has its finish reason."""
        return not self._growing

    def take(self, index: int, output: RequestOutput, now: float) -> None:
        self._timeline.take(index, output, now)
        self.newest[index] = output
        self._fresh.add(index)
        self._changed.set()
        if output.finish_reason is not None:
            self._growing -= 1
        if self.ended:
            self._ended.set()

    async def until_ended(self) -> None:
        await self._ended.wait()

    async def changes(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """What has grown since the reader last came back, until all have ended."""
        while self._fresh or not self.ended:
            await self._changed.wait()
            self._changed.clear()
            fresh, self._fresh = sorted(self._fresh), set()
            for index in fresh:
                yield index, self.newest[index]
