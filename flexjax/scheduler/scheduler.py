"""Scheduler: decides each iteration. It introduces requests, finetuning jobs, pages, the latency model and the policy
to each other, and knows no device: what it decides is an ``Iteration``, what it hears back are sampled tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexjax.layout import PAGE_TOKENS, SlotLayout
from flexjax.request import FinishReason, Request
from flexjax.scheduler.cursor import Microbatch
from flexjax.scheduler.demand import Demand
from flexjax.scheduler.draft import Draft
from flexjax.scheduler.jobs import Jobs
from flexjax.scheduler.latency import LatencyModel
from flexjax.scheduler.ledger import PageLedger
from flexjax.scheduler.output import Completion, Iteration, MicrobatchPages
from flexjax.scheduler.policy import Policy, Share, View
from flexjax.scheduler.serving import Serving


@dataclass(frozen=True)
class Statistics:
    """A snapshot for progress displays and metrics.

    Attributes:
        free_pages: held by nobody and not cached.
        cached_pages: kept for prefix reuse, whether or not somebody holds them.
        available_pages: an allocation can have them now: free, or cached and held by nobody.
        tape_pages: of finetuning microbatches on their way.
        prefix_hits: pages that were reused instead of computed, since the start.
        preemptions: since the start.
    """

    running: int
    waiting: int
    pages: int
    free_pages: int
    cached_pages: int
    available_pages: int
    tape_pages: int
    prefix_hits: int
    preemptions: int


class Scheduler:
    """Continuous batching of requests with finetuning in the room they leave.

    Each iteration holds, in this order: every row that decodes; prompt chunks within the policy's limit, the most
    senior request first (priority, then arrival, hence TTFT deadline) but for those that `WaitingQueue` lets go behind;
    finetuning windows in free tiles and units while the predicted time stays within the limit. Its layout is the
    cheapest predicted one that holds it.

    Iterations may overlap: ``schedule`` commits progress at once, and any number of iterations may be under way
    before ``complete`` is called for each in order. Not thread-safe.

    When no request gets anything in an iteration, finetuning gets at least one chunk or unit, so with jobs alone
    nothing starves. Under load, finetuning progresses only where the limit leaves room. Requests wait for no
    pages of finetuning but those of a microbatch that some unit has read, and that goes on whenever they cannot.

    Args:
        layouts: that the device can run; one must have a chunk part and at least ``max_rows`` rows.
        pages: of 64 tokens each, for requests and finetuning together.
        max_rows: requests running at the same time.
        max_model_len: most tokens of a request, prompt and outputs.
        prefix_caching: full pages are kept and reused by requests with the same adapter version and beginning.

    Raises:
        ValueError: no layout is large enough, or the policy's layout is not.
    """

    def __init__(
        self,
        layouts: Sequence[SlotLayout],
        pages: int,
        max_rows: int,
        max_model_len: int,
        latency: LatencyModel,
        policy: Policy,
        prefix_caching: bool = True,
    ):
        self.layouts = tuple(layouts) if policy.layout is None else (policy.layout,)
        require_layouts(self.layouts, max_rows)
        self.max_rows, self.max_model_len = max_rows, max_model_len
        self.latency, self.policy = latency, policy
        self._ledger = PageLedger(pages)
        self._jobs = Jobs(self._ledger)
        self._serving = Serving(self._ledger, max_rows, prefix_caching, self._jobs.reclaim)
        self._demand = Demand()
        self._next_index = 0
        self._carried = 0.0

    @property
    def dropped(self) -> tuple[int, ...]:
        """Microbatches that lost their pages in the last ``schedule``; they begin again when there is room."""
        return tuple(self._jobs.dropped)

    @property
    def in_flight(self) -> int:
        """Iterations scheduled and not complete."""
        return self._next_index - 1 - self._ledger.completed

    @property
    def idle(self) -> bool:
        """Nothing is under way and nothing could be scheduled before something is added. A tape that lost its pages
        gets them back in ``schedule``."""
        return not (self.in_flight or self._serving.sequences or self._jobs.runnable() or self._jobs.robbed)

    @property
    def statistics(self) -> Statistics:
        serving, ledger = self._serving, self._ledger
        return Statistics(
            running=len(serving.seats.running),
            waiting=serving.waiting,
            pages=ledger.pool.total,
            free_pages=ledger.pool.free,
            cached_pages=ledger.cache.pages,
            available_pages=ledger.available,
            tape_pages=self._jobs.pages,
            prefix_hits=ledger.cache.hits,
            preemptions=serving.preemptions,
        )

    @property
    def running(self) -> list[int]:
        """Requests that have a row, the most senior first."""
        return [sequence.request.id for sequence in self._serving.seats.running]

    def add_request(self, request: Request) -> None:
        """Queues a request. Raises ValueError as `require_possible` does."""
        self.require_possible(request)
        self._serving.add(request)

    def require_possible(self, request: Request) -> None:
        """Raises ValueError if a request could never run: it is too long, or asks for what no layout offers."""
        tokens = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError(f"request {request.id} has nothing to compute; it needs a prompt and max_new_tokens of 1")
        pool_tokens = self._ledger.pool.total * PAGE_TOKENS
        for limit, knob in ((self.max_model_len, "max_model_len"), (pool_tokens, "pages")):
            if tokens > limit:
                raise ValueError(
                    f"request {request.id} needs {tokens} tokens ({len(request.prompt)} prompt + "
                    f"{request.max_new_tokens} new), but {knob} allows {limit}; shorten it or raise {knob}"
                )
        self._require_offered(request)

    def cancel(self, request_id: int) -> bool:
        """Ends a request at once; False if it is unknown or has ended."""
        sequence = self._serving.sequences.get(request_id)
        if sequence is not None:
            self._serving.remove(sequence)
        return sequence is not None

    def finish(self, request_id: int, reason: FinishReason) -> bool:
        """Ends a request whose text was found to be complete (a stop string); False if it has ended already."""
        assert isinstance(reason, FinishReason), f"{reason!r} is no FinishReason"
        return self.cancel(request_id)

    def tokens_of(self, request_id: int) -> list[int]:
        """Prompt and outputs of a request, as far as read. Not to be changed by the caller.

        Raises:
            LookupError: the request is unknown or has ended.
        """
        return self._serving.sequences[request_id].tokens

    def set_job(self, job: str, weight: float = 1.0, paused: bool = False) -> None:
        """Creates a finetuning job or changes its weight; a paused one gets nothing and takes no new pages."""
        self._jobs.set_job(job, weight, paused)

    def wants_microbatch(self, job: str) -> bool:
        """The job could take another microbatch: it has nothing left to schedule, or only the backward pass of one
        that another of its group follows."""
        known = self._jobs.jobs.get(job)
        return known is None or (known.may_follow and not known.paused)

    def try_add_microbatch(self, microbatch: Microbatch) -> bool:
        """Reserves all pages of a microbatch, or takes nothing and returns False.

        It is refused while its job is paused or does not want one, and while the pages are needed by requests: for all
        that wait, and two for each request.

        Raises:
            ValueError: it could never run: it needs more pages than there are, or a layout that is not offered.
        """
        self._require_layout(f"microbatch {microbatch.id}", "tape", tape=True, dropout=microbatch.dropout)
        return self._jobs.try_add(microbatch, self._serving.pages_soon)

    def microbatch_pages(self, microbatch_id: int) -> MicrobatchPages:
        """Pages of a microbatch; they stay the same until it is complete or ``dropped``."""
        return self._jobs.pages_of(microbatch_id)

    def cancel_job(self, job: str) -> None:
        """Forgets a job, finished or not, and the microbatch it has on its way."""
        self._jobs.cancel(job)

    def forget_adapter(self, version: int) -> None:
        """No request will use this adapter version again: its cached pages become free."""
        self._ledger.cache.forget(version)

    def add_layouts(self, layouts: Sequence[SlotLayout]) -> None:
        """More layouts that the device can run from now on; a pinned policy does not take them."""
        if self.policy.layout is None:
            self.layouts = tuple(dict.fromkeys((*self.layouts, *layouts)))

    def schedule(self, now: float) -> Iteration | None:
        """The next iteration, or None if there is nothing to do before another is complete or something is added.

        Args:
            now: seconds on the clock of ``Request.arrival``.
        """
        self._jobs.dropped.clear()
        self._jobs.restore(self._serving.pages_soon)
        self._serving.survey()
        draft = Draft(self._next_index, self.layouts, self.latency)
        share = self.policy.serve(self._view(now))
        if share.allowed:
            self._serving.plan(draft, share, now)
        served = draft.seconds if draft.serves else 0.0
        self._demand.note(now, len(draft.decode), draft.need.tiles * PAGE_TOKENS)
        known = {"surge": self._surge(draft, share.limit), "pages_short": self._serving.pages_short}
        room = self.policy.finetune(replace(self._view(now), serving_seconds=served, **known))
        if room.allowed:
            self._jobs.plan(draft, room, self._serving.pages_short)
        self.policy.charge(draft.seconds - served)
        return self._commit(draft, share, room)

    def complete(self, iteration: Iteration, tokens: Mapping[int, int], seconds: float | None = None) -> Completion:
        """An iteration has ended on the device.

        Args:
            tokens: sampled token of each row in ``iteration.sampled_rows``.
            seconds: that the iteration took, or None if it was not measured or means nothing.
        """
        expected = self._ledger.completed + 1
        assert iteration.index == expected, f"iteration {iteration.index} was completed, {expected} is next"
        self._ledger.fence(iteration.index)
        news = self._serving.complete(iteration, tokens)
        finished = self._jobs.complete(iteration.index)
        if seconds is not None:
            self.latency.observe(iteration, seconds)
        return Completion(news, finished)

    def check(self) -> None:
        """Asserts the invariants: every page accounted for, every request in one place. O(pages)."""
        self._serving.check()
        self._jobs.check()
        self._ledger.check(self._serving.held() + self._jobs.held())

    def _surge(self, draft: Draft, limit: float | None) -> float:
        """See `View`. Without a limit there is no most that could be served."""
        if limit is None or not self._demand.rises or not self._jobs.runnable():
            return 0.0
        best = draft.best_rate(self._demand.row_share, limit)
        return self._demand.slots / best if best else 1.0

    def _commit(self, draft: Draft, share: Share, room: Share) -> Iteration | None:
        if draft.empty:
            return None
        self._next_index += 1
        self._carried = draft.work_seconds + (0.0 if draft.need.anything else self._carried)
        bounds = [part.limit for part in (room, share) if part.allowed and part.limit is not None]
        return draft.finish(bounds[0] if bounds else None)

    def _view(self, now: float) -> View:
        serving = self._serving
        prompting = [sequence for sequence in serving.prompting if sequence.prompting]
        first = serving.queue.peek()
        arrivals = [sequence.request.arrival for sequence in (prompting if first is None else [*prompting, first])]
        return View(
            now=now,
            decoding=len(serving.decoding),
            prompt_tokens=serving.queue.tokens + sum(part.catch_up - part.computed for part in prompting),
            waiting=serving.waiting,
            rows_full=serving.seats.lowest_free is None,
            oldest_arrival=min(arrivals, default=None),
            arrivals=serving.arrivals,
            finetuning=bool(self._jobs.runnable()),
            carried_seconds=self._carried,
        )

    def _require_offered(self, request: Request) -> None:
        sampling = request.sampling
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(sampling, name) is not None:
                self._require_layout(f"request {request.id}", name, **{name: True})
        if request.adapter_version:
            self._require_layout(f"request {request.id}", "an adapter", adapters=True)

    def _require_layout(self, who: str, what: str, **flags: bool) -> None:
        if not any(layout.holds(rows=1, chunk=PAGE_TOKENS, **flags) for layout in self.layouts):
            raise ValueError(f"{who} asks for {what}, but no layout has {flags}; add one to layouts")


def require_layouts(layouts: Sequence[SlotLayout], max_rows: int) -> None:
    """Raises a ValueError unless every mixture of requests that some layout serves finds one for all rows."""
    logprobs = any(layout.logprobs for layout in layouts)
    prompt_logprobs = any(layout.prompt_logprobs for layout in layouts)
    adapters = not all(layout.base_only for layout in layouts)
    flags = {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs, "adapters": adapters}
    if not any(layout.holds(rows=max_rows, chunk=PAGE_TOKENS, **flags) for layout in layouts):
        rows = max((layout.rows for layout in layouts), default=0)
        raise ValueError(
            f"max_rows is {max_rows}, but no layout with a chunk part and {flags} has so many rows (the largest has "
            f"{rows}); lower max_rows or add such a layout"
        )
