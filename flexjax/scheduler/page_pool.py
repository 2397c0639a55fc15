"""PagePool: which of the pages are free, and how many hold each of the others. It knows nothing of what is in them."""


class PagePool:
    """Reference counts of pages 0 .. pages-1. Everything is O(1) per page, and nothing is taken in part."""

    def __init__(self, pages: int):
        if pages < 1:
            raise ValueError(f"pages is {pages}; at least 1 is needed")
        self._counts = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def total(self) -> int:
        return len(self._counts)

    @property
    def free(self) -> int:
        return len(self._free)

    def references(self, page: int) -> int:
        return self._counts[page]

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """``count`` pages with one reference each, or None (and nothing taken) if fewer are free."""
        if count > len(self._free):
            return None
        pages = tuple(self._free.pop() for _ in range(count))
        for page in pages:
            self._counts[page] = 1
        return pages

    def hold(self, page: int) -> None:
        """Adds a reference to a page that somebody already holds."""
        if not self._counts[page]:
            raise ValueError(f"page {page} is free; only a page in use can be shared")
        self._counts[page] += 1

    def release(self, page: int) -> None:
        """Drops one reference; the page is free when none is left."""
        if not self._counts[page]:
            raise ValueError(f"page {page} is already free; it was released twice")
        self._counts[page] -= 1
        if not self._counts[page]:
            self._free.append(page)
