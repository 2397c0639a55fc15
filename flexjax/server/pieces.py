"""Pieces: what is new in the growing outputs of one request."""

from dataclasses import dataclass

from flexjax.request import RequestOutput


@dataclass(frozen=True)
class Piece:
    """Attributes:
    logprobs: one entry per token id; None if not asked for.
    first: nothing of this sequence came before.
    """

    token_ids: list[int]
    text: str
    logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    first: bool

    @property
    def empty(self) -> bool:
        """It holds nothing that a client would see."""
        return not (self.text or self.finish_reason or (self.logprobs and self.token_ids))


class Pieces:
    """Args:
    count: sequences.
    silent: tokens are generated but not wanted, only how the sequence ends.

    Attributes:
        tokens: taken so far, of all sequences.
    """

    def __init__(self, count: int, silent: bool = False):
        self._sent = [(0, 0)] * count
        self._begun = [False] * count
        self._silent = silent
        self.tokens = 0

    def take(self, index: int, output: RequestOutput) -> Piece:
        """The part of ``output`` beyond what was taken before."""
        first, self._begun[index] = not self._begun[index], True
        if self._silent:
            return Piece([], "", None if output.logprobs is None else [], output.finish_reason, first)
        tokens, characters = self._sent[index]
        self._sent[index] = len(output.token_ids), len(output.text)
        ids, logprobs = output.token_ids[tokens:], output.logprobs
        self.tokens += len(ids)
        if logprobs is not None:
            logprobs = logprobs[tokens : tokens + len(ids)]  # the list may have grown beyond the snapshot
        return Piece(ids, output.text[characters:], logprobs, output.finish_reason, first)
