"""PrefixCache: full pages of K/V that a later request may reuse. It knows pages and tokens, not requests or time."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from flexjax.layout import PAGE_TOKENS
from flexjax.scheduler.page_pool import PagePool


class Entry:
    """One cached page: 64 tokens after ``parent``, computed with one adapter version.

    ``alive`` turns False when the page is evicted or its version forgotten; a dead entry is never served again.
    """

    __slots__ = ("alive", "key", "page", "parent", "tokens", "version")

    def __init__(self, key: int, version: int, parent: "Entry | None", tokens: tuple[int, ...], page: int):
        self.key, self.version, self.parent, self.tokens, self.page = key, version, parent, tokens, page
        self.alive = True

    def stands_for(self, version: int, parent: "Entry | None", tokens: tuple[int, ...]) -> bool:
        """Compared by value all the way up (a parent is one object per content): equal hashes prove nothing."""
        return self.version == version and self.parent is parent and self.tokens == tokens


class PrefixCache:
    """Finds pages by the chained hash of (adapter version, parent, 64 tokens); keeps one reference to each.

    A page that only the cache references is *spare*: reusable, and evicted when the pool runs dry, the least
    recently used first. A sequence releases its last page first, so that a chain is evicted from its end.
    """

    def __init__(self, pool: PagePool, digest: Callable[[tuple], int] = hash):
        self.pool = pool
        self._digest = digest
        self._entries: dict[int, Entry] = {}
        self._by_page: dict[int, Entry] = {}
        self._spare: OrderedDict[int, Entry] = OrderedDict()
        self.hits = 0

    @property
    def pages(self) -> int:
        """Cached pages, spare or in use."""
        return len(self._by_page)

    @property
    def spare(self) -> int:
        return len(self._spare)

    def match(self, version: int, tokens: Sequence[int], salt: str = "") -> list[Entry]:
        """The longest run of cached pages that starts ``tokens`` but leaves at least its last token to compute."""
        run: list[Entry] = []
        parent = None
        for page in range((len(tokens) - 1) // PAGE_TOKENS):
            content = page_content(tokens, page, salt)
            entry = self._entries.get(self._key(version, parent, content))
            if entry is None or not entry.stands_for(version, parent, content):
                break
            run.append(entry)
            parent = entry
        return run

    def spare_among(self, run: Sequence[Entry]) -> int:
        """Pages of ``run`` that would stop being spare if somebody held them."""
        return sum(entry.page in self._spare for entry in run)

    def hold(self, run: Sequence[Entry]) -> tuple[int, ...]:
        """Takes a reference to every page of ``run``, which ``match`` has just returned."""
        for entry in run:
            self.pool.hold(entry.page)
            self._spare.pop(entry.page, None)
        self.hits += len(run)
        return tuple(entry.page for entry in run)

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference to each page; cached ones become spare when nobody else holds them."""
        for page in reversed(pages):
            self.pool.release(page)
            if page in self._by_page and self.pool.references(page) == 1:
                self._spare[page] = self._by_page[page]

    def publish(self, version: int, parent: Entry | None, tokens: tuple[int, ...], page: int) -> Entry | None:
        """Offers a full page, held by the caller, for reuse.

        Returns:
            The entry to be the parent of the next page: an equal one if there was one (the page then stays
            private), or None if ``parent`` is no longer cached, so that nothing could ever find the page.
        """
        if parent is not None and not parent.alive:
            return None
        key = self._key(version, parent, tokens)
        present = self._entries.get(key)
        if present is not None and present.stands_for(version, parent, tokens):
            return present
        if present is not None:
            self._drop(present)
        entry = Entry(key, version, parent, tokens, page)
        self.pool.hold(page)
        self._entries[key] = self._by_page[page] = entry
        return entry

    def evict(self, count: int) -> int:
        """Returns up to ``count`` spare pages to the pool; how many they were."""
        victims = [entry for entry, _ in zip(self._spare.values(), range(count), strict=False)]
        for entry in victims:
            self._drop(entry)
        return len(victims)

    def forget(self, version: int) -> None:
        """Drops every page of an adapter version."""
        for entry in [entry for entry in self._entries.values() if entry.version == version]:
            self._drop(entry)

    def references(self) -> list[int]:
        """Pages the cache references, once each."""
        return list(self._by_page)

    def _key(self, version: int, parent: Entry | None, tokens: tuple[int, ...]) -> int:
        return self._digest((version, parent.key if parent else None, tokens))

    def _drop(self, entry: Entry) -> None:
        entry.alive = False
        entry.parent = None
        del self._entries[entry.key]
        del self._by_page[entry.page]
        self._spare.pop(entry.page, None)
        self.pool.release(entry.page)


def page_content(tokens: Sequence[int], page: int, salt: str = "") -> tuple[int | str, ...]:
    """The 64 tokens of full page ``page`` of a sequence. A salt stands before the first of them, and so keeps the whole
    chain apart from those of other salts."""
    content = tuple(tokens[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS])
    return (salt, *content) if salt and page == 0 else content
