"""Sequence: one request's progress, computed tokens catching up with known tokens."""

from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.request import FinishReason, Request
from flexjax.scheduler.prefix_cache import Entry


class Sequence:
    """A request, its tokens, and what of them has K/V in pages.

    Attributes:
        tokens: prompt and outputs whose values were read.
        known: all tokens, counting those being sampled by iterations under way.
        computed: tokens whose K/V is, or is being, written.
        catch_up: tokens that must be computed from values on the host; after that the row feeds itself.
        row: seat in the running batch; None while waiting.
        pages: K/V pages, in order of position.
        entries: the cached pages that hold the same content, from the first page on.
        last_used: the newest iteration that computes some of it.
        seniority: sorts requests: priority, then arrival.
    """

    def __init__(self, request: Request):
        self.request = request
        self.tokens = list(request.prompt)
        self.known = len(self.tokens)
        self.computed = 0
        self.catch_up = 0
        self.row: int | None = None
        self.pages: tuple[int, ...] = ()
        self.entries: list[Entry] = []
        self.last_used = -1
        self.seniority = (request.priority, request.arrival, request.id)

    @property
    def ending(self) -> bool:
        """Its last token is known or being sampled: there is nothing left to schedule."""
        return self.left <= 0

    @property
    def left(self) -> int:
        """Tokens that may still be sampled."""
        return self.request.max_new_tokens - (self.known - len(self.request.prompt))

    def late(self, late_before: float) -> bool:
        """It arrived before that moment and has no output yet."""
        return self.request.arrival < late_before and len(self.tokens) == len(self.request.prompt)

    @property
    def decoding(self) -> bool:
        """Seated, with a newest token that its own row has sampled."""
        if self.row is None or self.computed < self.catch_up:
            return False
        return self.known - len(self.request.prompt) < self.request.max_new_tokens

    @property
    def prompting(self) -> bool:
        """Seated, with tokens from the host still to compute."""
        return self.row is not None and self.computed < self.catch_up

    @property
    def needs_page(self) -> bool:
        """The next position lies behind its last page."""
        return self.computed == len(self.pages) * PAGE_TOKENS

    @property
    def reuses_pages(self) -> bool:
        """False if every prompt token has to pass through the forward step."""
        sampling = self.request.sampling
        return not sampling.penalised and sampling.prompt_logprobs is None

    def seat(self, row: int, reused: int, pages: tuple[int, ...], entries: list[Entry]) -> None:
        """Takes a row and pages for all tokens, of which the first ``reused`` pages are already computed."""
        self.row, self.pages, self.entries = row, pages, entries
        self.computed = reused * PAGE_TOKENS
        self.catch_up = len(self.tokens)

    def move(self, row: int) -> None:
        """Takes another row with the same pages. All its tokens are known and its last page is computed again there,
        since the newest token's value is only in the old row."""
        self.seat(row, (len(self.tokens) - 1) // PAGE_TOKENS, self.pages, self.entries)

    def unseat(self) -> tuple[int, ...]:
        """Loses row and pages, which are returned; everything will be computed again."""
        pages, self.row, self.pages, self.entries = self.pages, None, (), []
        self.computed = 0
        return pages

    def advance(self, length: int, index: int) -> bool:
        """Iteration ``index`` computes the next ``length`` tokens; whether it then samples one."""
        self.computed += length
        self.last_used = index
        samples = self.computed == self.known
        self.known += samples
        return samples

    def pages_to(self, position: int) -> tuple[int, ...]:
        """The pages that cover positions 0 .. position - 1."""
        count = tiles_for(position)
        return self.pages if count == len(self.pages) else self.pages[:count]

    def append(self, token: int) -> FinishReason | None:
        """A sampled token became known; why the request is finished, or None.

        As in vLLM, a stop id ends the request only once there are ``min_tokens`` outputs.
        """
        self.tokens.append(token)
        outputs = len(self.tokens) - len(self.request.prompt)
        if token in self.request.stop_token_ids and outputs >= self.request.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if outputs >= self.request.max_new_tokens else None
