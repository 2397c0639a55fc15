"""Compaction: which sequences move to lower rows, so that steps may have fewer of them. It moves nothing itself.

A step has a slot for each row up to the highest in use, so after a burst a few sequences in high rows make every step
as large as the burst was. A sequence moves by computing the tokens of its last page again, in a tile of its new row; it
misses one token's iteration meanwhile.
"""

from collections.abc import Sequence as Many

from flexjax.layout import PAGE_TOKENS
from flexjax.scheduler.sequence import Sequence

MOVES = 4
"""Sequences on the move at a time: each takes a tile of 64 slots."""

SPARE = 8
"""Of so many sequences one more may come before rows are worth giving up."""

LEAST_LEFT = 32
"""Tokens that a sequence must still be allowed to make; others leave their row by themselves soon enough."""


def movers(running: Many[Sequence], waiting: int, sizes: Many[int]) -> list[Sequence]:
    """Sequences that should leave their rows now.

    Only if what they free pays for their tiles: steps become smaller by at least 64 rows, and by more rows than
    there are sequences to move. One whose next token begins a page goes on for a step: it gets the page by decoding.

    Args:
        running: seated sequences; waiting: requests that want a row.
        sizes: rows that layouts have.
    """
    if not running:
        return []
    highest = max(sequence.row for sequence in running)
    wanted = len(running) + waiting + len(running) // SPARE
    size = min((size for size in sizes if size > highest), default=highest + 1)
    goal = min((size for size in sizes if size >= wanted), default=size)
    high = [sequence for sequence in running if sequence.row >= goal]
    if size - goal < max(PAGE_TOKENS, len(high)) or not all(sequence.reuses_pages for sequence in high):
        return []
    ready = [sequence for sequence in high if sequence.decoding and not sequence.needs_page]
    return [sequence for sequence in ready if sequence.left >= LEAST_LEFT][:MOVES]
