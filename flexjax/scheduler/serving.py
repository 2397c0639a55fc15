"""Serving: which requests get a row, pages and slots in the next iteration. It knows no finetuning and no objective."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.request import Request
from flexjax.scheduler.chunks import chunk_tiles, with_chunk
from flexjax.scheduler.compaction import movers
from flexjax.scheduler.demand import Pace
from flexjax.scheduler.draft import Draft
from flexjax.scheduler.ledger import PageLedger
from flexjax.scheduler.output import DecodeSlot, Iteration, NewToken, PromptSegment
from flexjax.scheduler.policy import Share
from flexjax.scheduler.prefix_cache import Entry
from flexjax.scheduler.prefix_reuse import PrefixReuse
from flexjax.scheduler.seats import Seats
from flexjax.scheduler.sequence import Sequence
from flexjax.scheduler.waiting import WaitingQueue

PAGES_SOON = 2
"""Pages a request is expected to ask for before a finetuning microbatch can be done."""


class Serving:
    """The requests: waiting by seniority, seated in rows, or parked.

    A preempted request is parked until the last iteration that computed it is complete: only then are all its tokens
    known, and nothing on the device writes its old pages.

    Pages for all tokens known at that time are taken when a request gets its row, later ones one at a time. When
    there is none, the order is: wait for pages that are on their way back; let finetuning give up a tape
    (``reclaim``); preempt the most junior request below the one that asks. The most senior can always go on.

    Args:
        reclaim: asked for a number of pages; gives back at least so many, now or after a fence, or none.

    Attributes:
        pages_short: the iteration planned last left somebody out for want of pages.
        decoding, prompting: seated sequences that had a token to decode, or a prompt to compute, at the last look.
    """

    def __init__(self, ledger: PageLedger, rows: int, caching: bool, reclaim: Callable[[int], bool]):
        self.sequences: dict[int, Sequence] = {}
        self.queue = WaitingQueue()
        self.seats = Seats(rows)
        self.parked: dict[int, Sequence] = {}
        self.arrivals = self.preemptions = 0
        self.pages_short = False
        self._ledger = ledger
        self._pace = Pace()
        self._reused = 0
        self.decoding: list[Sequence] = []
        self.prompting: list[Sequence] = []
        self._moving: list[Sequence] = []
        self._reuse = PrefixReuse(ledger.cache) if caching else None
        self._reclaim = reclaim

    @property
    def waiting(self) -> int:
        return len(self.queue) + len(self.parked)

    @property
    def pages_soon(self) -> int:
        """Pages that waiting and running requests will need before long."""
        return tiles_for(self.queue.tokens) + PAGES_SOON * len(self.sequences)

    def add(self, request: Request) -> None:
        assert request.id not in self.sequences, f"request {request.id} was added twice"
        self.arrivals += 1
        sequence = self.sequences[request.id] = Sequence(request)
        self.queue.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a request; iterations under way that compute it do so for nothing."""
        del self.sequences[sequence.request.id]
        if sequence.row is not None:
            self._leave(sequence)
        elif self.parked.pop(sequence.request.id, None) is None:
            self.queue.remove(sequence)

    def plan(self, draft: Draft, share: Share, now: float) -> None:
        """Adds every row that decodes, then prompt chunks while ``share`` lasts, but at least the cheapest chunk.
        ``now`` is seconds on the clock of arrivals."""
        self.pages_short = False
        self._reused = 0
        if self._move(draft):
            self.survey()
        self._plan_decode(draft)
        self.queue.give_up(share.late_before, self._pace.tiles_per_second)
        self._plan_prompts(draft, share)
        held_up = self.pages_short or self.seats.lowest_free is None  # by something else than prompts
        self._pace.note(now, draft.need.tiles + self._reused, len(self.queue) > 0 and not held_up)
        draft.floor = None

    def survey(self) -> None:
        """Looks who decodes and who still has a prompt to compute; to be called before ``plan``."""
        seated = self.seats.running
        self.prompting = [sequence for sequence in seated if sequence.computed < sequence.catch_up]
        self.decoding = [sequence for sequence in seated if sequence.decoding]

    def complete(self, iteration: Iteration, tokens: Mapping[int, int]) -> tuple[NewToken, ...]:
        """Takes in the sampled token of each row; those of requests that have ended meanwhile are dropped."""
        if self._reuse is not None:
            self._reuse.publish(iteration, self.sequences)
        news = []
        for row, request_id, _ in iteration.sampled_rows:
            sequence = self.sequences.get(request_id)
            if sequence is not None:
                reason = sequence.append(tokens[row])
                news.append(NewToken(request_id, tokens[row], reason))
                if reason is not None:
                    self.remove(sequence)
        for sequence in [parked for parked in self.parked.values() if parked.last_used <= iteration.index]:
            del self.parked[sequence.request.id]
            self.queue.push(sequence)
        return tuple(news)

    def held(self) -> list[int]:
        """Pages of all requests, as often as they are held."""
        return [page for sequence in self.seats.running for page in sequence.pages]

    def check(self) -> None:
        """Asserts that every request is in exactly one place and has pages for what it computed."""
        self.seats.check()
        for request_id, sequence in self.sequences.items():
            places = (sequence.row is not None, sequence in self.queue, request_id in self.parked)
            assert sum(places) == 1, f"request {request_id} is in {sum(places)} places"
            assert max(sequence.computed, len(sequence.tokens)) <= sequence.known, f"request {request_id} is ahead"
            assert tiles_for(sequence.computed) <= len(sequence.pages), f"request {request_id} lacks a page"
        assert len(self.seats.running) + self.waiting == len(self.sequences), "a seated request is unknown"

    def _move(self, draft: Draft) -> bool:
        """Seats anew those that were to move, now that the device is done with them, or chooses the next ones; whether
        somebody has moved."""
        there = [each for each in self._moving if each.decoding and not each.needs_page]
        settled = [each for each in there if each.last_used <= self._ledger.completed]
        for sequence in settled:
            self.seats.leave(sequence)
            sequence.move(self.seats.take(sequence))
            draft.admitted.append(sequence.request.id)
        self._moving = [each for each in there if each not in settled]
        if not self._moving and not settled:
            self._moving = movers(self.seats.running, len(self.queue), draft.row_sizes)
        return bool(settled)

    def _plan_decode(self, draft: Draft) -> None:
        rows = context = 0
        logprobs = adapters = False
        for sequence in self.decoding:
            if sequence.row is None or sequence in self._moving:
                continue
            if sequence.needs_page and not self._grow(sequence):
                continue
            position, request = sequence.computed, sequence.request
            draft.decode.append(DecodeSlot(sequence.row, request.id, position, sequence.pages))
            sequence.advance(1, draft.index)
            rows = max(rows, sequence.row + 1)
            context += position + 1
            logprobs = logprobs or request.sampling.logprobs is not None
            adapters = adapters or request.adapter_version != 0
        draft.decode.sort()
        draft.need = replace(draft.need, rows=rows, row_context=context, logprobs=logprobs, adapters=adapters)

    def _grow(self, sequence: Sequence) -> bool:
        """One more page; False: the row sits this iteration out."""
        while (page := self._ledger.allocate(1)) is None:
            if self._ledger.pending:
                break
            if self._reclaim(1):
                continue
            victim = self.seats.junior_to(sequence)
            if victim is None:
                break
            self._preempt(victim)
        self.pages_short |= page is None
        sequence.pages += page or ()
        return page is not None

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._leave(sequence)
        if sequence.last_used <= self._ledger.completed:
            self.queue.push(sequence)
        else:
            self.parked[sequence.request.id] = sequence

    def _leave(self, sequence: Sequence) -> None:
        self.seats.leave(sequence)
        self._ledger.release(sequence.unseat(), sequence.last_used)

    def _plan_prompts(self, draft: Draft, share: Share) -> None:
        seated = deque(sequence for sequence in self.prompting if sequence.row is not None)
        admitting = True
        while True:
            first = self.queue.peek(share.late_before, share.lost_before) if admitting else None
            if first is not None and (not seated or first.seniority < seated[0].seniority):
                admitting = self._admit(first, draft, share)
            elif not seated or not self._add_chunk(seated.popleft(), draft, share):
                return

    def _admit(self, sequence: Sequence, draft: Draft, share: Share) -> bool:
        """Gives a waiting request a row, its pages and its first chunk, or nothing."""
        row = self.seats.lowest_free
        if row is None:
            return False
        run = [] if self._reuse is None else self._reuse.found(sequence)
        if not chunk_tiles(sequence, row, len(run) * PAGE_TOKENS, len(sequence.tokens), draft, share):
            return False
        pages = self._obtain(run, tiles_for(len(sequence.tokens)) - len(run))
        if pages is None:
            self.pages_short = True
            return False
        self.queue.take(sequence, share.lost_before)
        self._reused += len(run)
        sequence.seat(self.seats.take(sequence), len(run), pages, run)
        self.prompting.append(sequence)
        draft.admitted.append(sequence.request.id)
        return self._add_chunk(sequence, draft, share)

    def _obtain(self, run: list[Entry], count: int) -> tuple[int, ...] | None:
        """Pages for a newcomer, who leaves one for each running request."""
        spare = len(self.seats.running)
        missing = self._ledger.missing(run, count, spare) - self._ledger.pending
        if missing > 0:
            self._reclaim(missing)
        return self._ledger.allocate_after(run, count, spare)

    def _add_chunk(self, sequence: Sequence, draft: Draft, share: Share) -> bool:
        start = sequence.computed
        tiles = chunk_tiles(sequence, sequence.row, start, sequence.catch_up, draft, share)
        if not tiles:
            return False
        length = min(tiles * PAGE_TOKENS, sequence.catch_up - start)
        slot = draft.need.tiles * PAGE_TOKENS
        samples = sequence.advance(length, draft.index)
        pages = sequence.pages_to(start + length)
        segment = PromptSegment(sequence.request.id, sequence.row, slot, start, length, pages, samples)
        draft.need = with_chunk(draft.need, sequence.request, sequence.row, start, length, samples)
        draft.prompts.append(segment)
        return True
