"""Prompt chunks: how many tiles one can have in the iteration under construction. Nothing is taken here."""

from dataclasses import replace

from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.request import Request
from flexjax.scheduler.draft import Draft, Need, context_of
from flexjax.scheduler.policy import Share
from flexjax.scheduler.sequence import Sequence


def chunk_tiles(sequence: Sequence, row: int, start: int, end: int, draft: Draft, share: Share) -> int:
    """Tiles that the chunk of positions ``start`` .. at most ``end`` can have now; 0 if it has to wait."""
    most = tiles_for(end - start)
    if share.tiles is not None:
        most = min(most, share.tiles - draft.need.tiles)
    if most <= 0:
        return 0

    def extended(tiles):
        length = min(tiles * PAGE_TOKENS, end - start)
        return with_chunk(draft.need, sequence.request, row, start, length, start + length == end)

    tiles = draft.largest(extended, most, share.limit)
    return tiles if tiles or draft.prompts else draft.smallest(extended, most)


def with_chunk(need: Need, request: Request, row: int, start: int, length: int, samples: bool) -> Need:
    """``need`` and a prompt chunk beside it."""
    sampling = request.sampling
    return replace(
        need,
        rows=max(need.rows, row + 1),
        tiles=need.tiles + tiles_for(length),
        tile_context=need.tile_context + context_of(start, length),
        logprobs=need.logprobs or (samples and sampling.logprobs is not None),
        prompt_logprobs=need.prompt_logprobs or (start < len(request.prompt) and sampling.prompt_logprobs is not None),
        adapters=need.adapters or request.adapter_version != 0,
    )
