"""Admission: how many sequences the service has taken on, and whether it takes more. Any thread may ask.

A request counts as one sequence while its body is read, since only the body says how many it wants.
"""

import threading
from collections import Counter
from collections.abc import Callable

from flexjax.server.errors import ApiError, stopping

RETRY_SECONDS = 1


class Admission:
    """Args:
    rows: sequences that can run; max_queue: that may wait besides.
    limit_of: sequences that an owner may have in hand, running or waiting; 0 is no limit.

    Attributes:
        open: sequences that were let in and have not left.
        draining: the service is stopping; nothing is let in.
    """

    def __init__(self, rows: int, max_queue: int, limit_of: Callable[[str], int]):
        self.open, self.draining = 0, False
        self._rows, self._max_queue, self._limit_of = rows, max_queue, limit_of
        self._owned: Counter[str] = Counter()
        self._lock = threading.Lock()

    def enter(self, owner: str) -> None:
        """Let one sequence in. Raises ApiError: 429 if there is no room for it now, 503 while stopping."""
        self.require_open()
        self._add(owner, 1)

    def widen(self, owner: str, count: int) -> None:
        """Let ``count`` sequences in where one is in already, or no more.

        Raises:
            ApiError: 400 if so many are never let in, 429 if they are not now.
        """
        own = self._limit_of(owner)
        if own and count > own:
            raise ApiError(400, f"The body asks for {count} sequences; your max_sequences allows {own} at once.")
        limit = self._rows + self._max_queue
        if count > limit:
            raise ApiError(400, f"The body asks for {count} sequences; max_queue allows {limit} at once.")
        self._add(owner, count - 1)

    def _add(self, owner: str, count: int) -> None:
        own = self._limit_of(owner)
        with self._lock:
            if own and self._owned[owner] + count > own:
                raise overload(f"You have {self._owned[owner]} sequences in hand, and your max_sequences is {own}")
            if self.open + count > self._rows + self._max_queue:
                raise overload(f"The server has {self.open} sequences in hand, and max_queue is {self._max_queue}")
            self.open += count
            self._owned[owner] += count

    def leave(self, owner: str, count: int) -> None:
        with self._lock:
            self.open -= count
            self._owned[owner] -= count

    def require_open(self) -> None:
        """Raises ApiError (503) while stopping."""
        if self.draining:
            raise stopping()


def overload(message: str) -> ApiError:
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(429, f"{message}; try again later.", code="overloaded", headers=headers)
