"""RateLimits: how many requests and tokens a minute each owner has. Any thread may ask. It knows no requests.

A bucket holds a minute's worth and is filled evenly. Tokens are taken before they are generated, as many as the body
allows, and those that were not needed are given back; a body that names no number is charged at its end, so a
bucket may fall below nothing and then takes the longer to fill.
"""

import threading
import time
from collections.abc import Callable

from flexjax.server.errors import ApiError

KINDS = ("requests", "tokens")


SECOND = 10**9
MINUTE = 60 * SECOND


class Bucket:
    """Exact: every nanosecond fills in ``size`` of the MINUTE parts that one of what it holds has.

    Args:
        size: a minute's worth; now: nanoseconds.
    """

    def __init__(self, size: int, now: int):
        self.size, self._parts, self._at = size, size * MINUTE, now

    def level(self, now: int) -> int:
        """Whole ones; fewer than none of a debt."""
        self._fill(now, 0)
        return self._parts // MINUTE

    def add(self, amount: int, now: int) -> None:
        self._fill(now, amount)

    def until(self, amount: int, now: int) -> int:
        """Nanoseconds until it holds so much, which is at most its size."""
        self._fill(now, 0)
        return -(-max(0, amount * MINUTE - self._parts) // self.size)

    def _fill(self, now: int, amount: int) -> None:
        parts = self._parts + (now - self._at) * self.size + amount * MINUTE
        self._parts, self._at = min(self.size * MINUTE, parts), now


class RateLimits:
    """Args:
    requests, tokens: a minute; 0 is no limit. clock: gives nanoseconds.
    """

    def __init__(self, requests: int, tokens: int, clock: Callable[[], int] = time.monotonic_ns):
        self._sizes = {kind: size for kind, size in zip(KINDS, (requests, tokens), strict=True) if size}
        self._clock, self._lock = clock, threading.Lock()
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def take_request(self, owner: str) -> None:
        """Raises ApiError (429)."""
        self._take(owner, "requests", 1)

    def take_tokens(self, owner: str, count: int) -> None:
        """Of more than a minute's worth, what a full bucket holds is enough. Raises ApiError (429)."""
        self._take(owner, "tokens", count)

    def give_back(self, owner: str, count: int) -> None:
        """Tokens that were not needed after all; fewer than none, where there were more than was thought."""
        with self._lock:
            if "tokens" in self._sizes:
                self._bucket(owner, "tokens").add(count, self._clock())

    def headers(self, owner: str) -> dict[str, str]:
        """OpenAI's, of the limits that there are."""
        with self._lock:
            now, found = self._clock(), {}
            for kind, size in self._sizes.items():
                bucket = self._bucket(owner, kind)
                found[f"x-ratelimit-limit-{kind}"] = str(size)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, bucket.level(now)))
                found[f"x-ratelimit-reset-{kind}"] = f"{bucket.until(size, now) / SECOND:.3f}s"
            return found

    def _take(self, owner: str, kind: str, count: int) -> None:
        with self._lock:
            if kind not in self._sizes:
                return
            bucket, now = self._bucket(owner, kind), self._clock()
            wait = bucket.until(min(count, bucket.size), now)
            if not wait:
                bucket.add(-count, now)
                return
        seconds = -(-wait // SECOND)
        message = f"{kind}_per_minute is {self._sizes[kind]}, and this needs {count}; try again in {seconds} s."
        headers = self.headers(owner) | {"Retry-After": str(seconds)}
        raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)

    def _bucket(self, owner: str, kind: str) -> Bucket:
        if (owner, kind) not in self._buckets:
            self._buckets[owner, kind] = Bucket(self._sizes[kind], self._clock())
        return self._buckets[owner, kind]
