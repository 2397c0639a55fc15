"""PrefixReuse: which cached pages a request begins with, and which of its own become cached. It knows no rows."""

from collections.abc import Mapping

from flexjax.layout import PAGE_TOKENS
from flexjax.scheduler.output import Iteration
from flexjax.scheduler.prefix_cache import Entry, PrefixCache, page_content
from flexjax.scheduler.sequence import Sequence


class PrefixReuse:
    """Between the cache, which knows pages and tokens, and requests."""

    def __init__(self, cache: PrefixCache):
        self._cache = cache

    def found(self, sequence: Sequence) -> list[Entry]:
        """The pages that a request without a row can begin with."""
        if not sequence.reuses_pages:
            return []
        request = sequence.request
        return self._cache.match(request.adapter_version, sequence.tokens, request.cache_salt)

    def publish(self, iteration: Iteration, sequences: Mapping[int, Sequence]) -> None:
        """Pages that an iteration has filled become cached; ``sequences``: those that have not ended, by request."""
        fills = [slot for slot in iteration.decode if slot.position % PAGE_TOKENS == PAGE_TOKENS - 1]
        ends = [(slot.request_id, slot.position + 1) for slot in fills]
        ends += [(segment.request_id, segment.start + segment.length) for segment in iteration.prompts]
        for request_id, end in ends:
            sequence = sequences.get(request_id)
            if sequence is not None and sequence.row is not None:
                self._publish_pages(sequence, end // PAGE_TOKENS)

    def _publish_pages(self, sequence: Sequence, count: int) -> None:
        """The first ``count`` pages, as far as they are not cached; after one that cannot be, none can."""
        request = sequence.request
        for page in range(len(sequence.entries), count):
            parent = sequence.entries[-1] if page else None
            content = page_content(sequence.tokens, page, request.cache_salt)
            entry = self._cache.publish(request.adapter_version, parent, content, sequence.pages[page])
            if entry is None:
                return
            sequence.entries.append(entry)
