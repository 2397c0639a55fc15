"""Admission: how many sequences the service has taken on, and whether it takes more. Any thread may ask.

A request counts as one sequence while its body is read, since only the body says how many it wants.
"""

import threading

from flexjax.server.errors import ApiError, stopping

RETRY_SECONDS = 1


class Admission:
    """Args:
    rows: sequences that can run; max_queue: that may wait besides.

    Attributes:
        open: sequences that were let in and have not left.
        draining: the service is stopping; nothing is let in.
    """

    def __init__(self, rows: int, max_queue: int):
        self.open, self.draining = 0, False
        self._rows, self._max_queue = rows, max_queue
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Let one sequence in. Raises ApiError: 429 if there is no room for it now, 503 while stopping."""
        self.require_open()
        self._add(1)

    def widen(self, count: int) -> None:
        """Let ``count`` sequences in where one is in already, or no more.

        Raises:
            ApiError: 400 if so many are never let in, 429 if they are not now.
        """
        limit = self._rows + self._max_queue
        if count > limit:
            raise ApiError(400, f"The body asks for {count} sequences; max_queue allows {limit} at once.")
        self._add(count - 1)

    def _add(self, count: int) -> None:
        with self._lock:
            if self.open + count > self._rows + self._max_queue:
                raise self._overload()
            self.open += count

    def leave(self, count: int) -> None:
        with self._lock:
            self.open -= count

    def require_open(self) -> None:
        """Raises ApiError (503) while stopping."""
        if self.draining:
            raise stopping()

    def _overload(self) -> ApiError:
        message = f"The server has {self.open} sequences in hand, and max_queue is {self._max_queue}; try again later."
        return ApiError(429, message, code="overloaded", headers={"Retry-After": str(RETRY_SECONDS)})
