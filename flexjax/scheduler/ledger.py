"""PageLedger: hands out pages and takes them back behind the device. It does not know what they are for."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from flexjax.scheduler.page_pool import PagePool
from flexjax.scheduler.prefix_cache import Entry, PrefixCache


class PageLedger:
    """One allocator over the pool and its prefix cache, with a fence for pages that the device still uses.

    A page released while an iteration that reads or writes it is under way stays *pending* until that iteration
    is complete.
    """

    def __init__(self, pages: int):
        self.pool = PagePool(pages)
        self.cache = PrefixCache(self.pool)
        self.completed = -1
        self._deferred: deque[tuple[int, tuple[int, ...]]] = deque()

    @property
    def available(self) -> int:
        """Pages that an allocation can have now: free, or cached and held by nobody."""
        return self.pool.free + self.cache.spare

    @property
    def pending(self) -> int:
        """Page references waiting for the end of an iteration; a shared page may count twice or not become free."""
        return sum(len(pages) for _, pages in self._deferred)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """``count`` pages, evicting cached ones if need be, or None and nothing taken."""
        if count > self.available:
            return None
        self.cache.evict(count - self.pool.free)
        return self.pool.allocate(count)

    def allocate_after(self, run: Sequence[Entry], count: int, spare: int) -> tuple[int, ...] | None:
        """References to the cached ``run`` and ``count`` new pages, if ``spare`` more would be left; or None."""
        if self.missing(run, count, spare):
            return None
        return self.cache.hold(run) + self.allocate(count)

    def missing(self, run: Sequence[Entry], count: int, spare: int) -> int:
        """How many pages are too few for ``allocate_after``."""
        return max(0, count + spare + self.cache.spare_among(run) - self.available)

    def release(self, pages: tuple[int, ...], last_used: int) -> None:
        """Gives back one reference to each page once iteration ``last_used`` is complete."""
        if last_used <= self.completed:
            self.cache.release(pages)
        elif pages:
            self._deferred.append((last_used, pages))

    def fence(self, index: int) -> None:
        """Iteration ``index`` is complete."""
        self.completed = index
        ready = [pages for last_used, pages in self._deferred if last_used <= index]
        self._deferred = deque(item for item in self._deferred if item[0] > index)
        for pages in ready:
            self.cache.release(pages)

    def check(self, held: Iterable[int]) -> None:
        """Asserts that the references are exactly those in ``held``, the pending ones and the cache's."""
        expected = Counter(held)
        for _, pages in self._deferred:
            expected.update(pages)
        in_use = len(expected)
        expected.update(self.cache.references())
        for page in range(self.pool.total):
            counted = self.pool.references(page)
            assert counted == expected[page], f"page {page} has {counted} references, its holders are {expected[page]}"
        assert self.pool.free + self.cache.spare + in_use == self.pool.total, "free, spare and held pages do not add up"
