"""Jobs: which finetuning work runs next, and the pages of the tapes. It knows no requests."""

from dataclasses import dataclass
from itertools import batched

from flexjax.layout import PAGE_TOKENS
from flexjax.scheduler.cursor import Microbatch, MicrobatchCursor
from flexjax.scheduler.draft import Draft, with_pieces
from flexjax.scheduler.job import Job, Tape, can_run, unit_work, work_left
from flexjax.scheduler.ledger import PageLedger
from flexjax.scheduler.output import MicrobatchPages
from flexjax.scheduler.policy import Share


@dataclass
class Budget:
    """What is left of finetuning's share; None is without bound."""

    limit: float | None
    tiles: int | None
    units: int | None
    forward: float | None
    work: float | None

    def for_windows(self, draft: Draft) -> float | None:
        """Predicted seconds that the iteration may take with more windows."""
        return lesser(self.limit, None if self.forward is None else self.forward + draft.work_seconds)

    def for_units(self, draft: Draft) -> float | None:
        """Predicted seconds that it may take with more units."""
        return lesser(self.limit, None if self.work is None else draft.seconds - draft.work_seconds + self.work)


class Jobs:
    """Weighted fairness by start-time fair queueing (Goyal, Vin and Cheng, 1996): the job with the least virtual
    time goes next, and one that comes back from idleness starts at the time of those who worked meanwhile. A job
    whose last work has only just completed was not idle: the rest of the iteration in which its microbatch ends
    goes to others, and it gets that back.

    Work is counted in tokens, not seconds, so that the order does not depend on the clock.
    """

    def __init__(self, ledger: PageLedger):
        self.jobs: dict[str, Job] = {}
        self.tapes: dict[int, Tape] = {}
        self.dropped: list[int] = []
        self._ledger = ledger
        self._virtual = 0.0

    def set_job(self, name: str, weight: float, paused: bool) -> None:
        """Creates a job or changes it.

        Raises:
            ValueError: the weight is not above 0.
        """
        if not weight > 0:
            raise ValueError(f"weight of job {name!r} is {weight}; it must be above 0")
        job = self._job(name)
        if job.paused and not paused:
            job.virtual = max(job.virtual, self._virtual)
        job.weight, job.paused = float(weight), paused

    def try_add(self, microbatch: Microbatch, spare: int) -> bool:
        """Reserves all pages of a microbatch if its job has none on its way and ``spare`` pages are left over.

        Raises:
            ValueError: the microbatch is larger than the whole pool.
        """
        if microbatch.pages > self._ledger.pool.total:
            raise ValueError(
                f"microbatch {microbatch.id} of job {microbatch.job!r} needs {microbatch.pages} pages for "
                f"{microbatch.slots} slots, but there are {self._ledger.pool.total}; lower batch_tokens or "
                "max_length of the job, or raise pages"
            )
        assert microbatch.id not in self.tapes, f"microbatch {microbatch.id} was added twice"
        job = self._job(microbatch.job)
        pages = None if job.paused or not job.may_follow else self._reserve(microbatch, spare)
        if pages is None:
            return False
        job.tapes.append(Tape(microbatch, MicrobatchCursor(microbatch), pages))
        self.tapes[microbatch.id] = job.tapes[-1]
        if len(job.tapes) == 1 and job.last_used < self._ledger.completed:
            job.virtual = max(job.virtual, self._virtual)
        return True

    def pages_of(self, microbatch_id: int) -> MicrobatchPages:
        """Pages of a microbatch on its way.

        Raises:
            LookupError: it is unknown, complete, or dropped for the moment.
        """
        tape = self.tapes.get(microbatch_id)
        if tape is None or tape.pages is None:
            raise LookupError(f"microbatch {microbatch_id} holds no pages")
        microbatch = tape.microbatch
        own = microbatch.blocks * microbatch.pages_per_block
        blocks = tuple(batched(tape.pages[:own], microbatch.pages_per_block))
        return MicrobatchPages(blocks, tuple(tape.pages[own:]), microbatch.finals_per_page)

    def cancel(self, name: str) -> None:
        """Forgets a job and what it has on its way; the pages return once the device is done with them."""
        self.jobs.pop(name, None)
        for tape in [tape for tape in self.tapes.values() if tape.microbatch.job == name]:
            self._ledger.release(tape.pages or (), tape.last_used)
            del self.tapes[tape.microbatch.id]

    def reclaim(self, count: int) -> bool:
        """Drops the youngest tapes no unit has read yet until ``count`` pages are given back; all of them or none."""
        victims = []
        for tape in reversed(self.tapes.values()):
            if count > 0 and tape.pages is not None and not tape.cursor.begun:
                victims.append(tape)
                count -= len(tape.pages)
        if count > 0:
            return False
        for tape in victims:
            self._ledger.release(tape.pages, tape.last_used)
            tape.pages = None
            tape.cursor.restart()
            self.dropped.append(tape.microbatch.id)
        return bool(victims)

    def restore(self, spare: int) -> None:
        """Gives dropped tapes their pages back, the oldest first, while ``spare`` pages are left over."""
        for tape in self.tapes.values():
            if tape.pages is None and not self.jobs[tape.microbatch.job].paused:
                tape.pages = self._reserve(tape.microbatch, spare)
                if tape.pages is None:
                    return

    @property
    def robbed(self) -> bool:
        """Some tape waits to get its pages back."""
        return any(tape.pages is None and not self.jobs[tape.microbatch.job].paused for tape in self.tapes.values())

    def runnable(self, pages_short: bool = False) -> list[Job]:
        """Jobs with work that could run now.

        A paused job whose gradients already know its microbatch is one of them while requests lack pages: to finish
        the microbatch is the only way to give its pages back.
        """
        return [job for job in self.jobs.values() if can_run(job, pages_short)]

    def plan(self, draft: Draft, share: Share, pages_short: bool) -> None:
        """Fills what the requests left of ``share``; an empty draft gets something whatever its limit."""
        budget = Budget(share.limit, share.tiles, share.units, share.forward, share.work)
        ready = self.runnable(pages_short)
        windowed: set[str] = set()
        while ready:
            job = min(ready, key=lambda job: (job.virtual, job.tapes[0].microbatch.id))
            if job.forwarding is not None and job.name not in windowed and not job.paused:
                windowed.add(job.name)
                advanced = self._add_windows(job, draft, budget) or job.pulling is not None
            else:
                advanced = job.pulling is not None and self._add_unit(job, draft, budget)
            if not advanced or not can_run(job, pages_short):
                ready.remove(job)

    def complete(self, index: int) -> tuple[int, ...]:
        """Gives back the pages of microbatches whose last unit was in iteration ``index``; their ids."""
        finished = [tape for tape in self.tapes.values() if tape.cursor.done and tape.pages and tape.last_used <= index]
        for tape in finished:
            self._ledger.release(tape.pages, tape.last_used)
            del self.tapes[tape.microbatch.id]
        return tuple(tape.microbatch.id for tape in finished)

    @property
    def pages(self) -> int:
        """How many pages all tapes hold."""
        return sum(len(tape.pages or ()) for tape in self.tapes.values())

    def held(self) -> list[int]:
        """Pages of all tapes."""
        return [page for tape in self.tapes.values() for page in tape.pages or ()]

    def check(self) -> None:
        """Asserts that every tape belongs to its job or is about to end."""
        for tape in self.tapes.values():
            assert tape.cursor.done or tape in self.jobs[tape.microbatch.job].tapes, "a tape has no job"
        for job in self.jobs.values():
            assert not any(tape.cursor.begun for tape in job.tapes[1:]), "two backward passes share gradients"
            assert not any(tape.microbatch.closes_group for tape in job.tapes[:-1]), "a window crosses an update"

    def _job(self, name: str) -> Job:
        return self.jobs.setdefault(name, Job(name, virtual=self._virtual))

    def _reserve(self, microbatch: Microbatch, spare: int) -> tuple[int, ...] | None:
        return self._ledger.allocate_after((), microbatch.pages, spare)

    def _add_windows(self, job: Job, draft: Draft, budget: Budget) -> int:
        tape = job.forwarding
        cursor, microbatch = tape.cursor, tape.microbatch
        most = cursor.tiles_left if budget.tiles is None else min(budget.tiles, cursor.tiles_left)
        if most == 0:
            return 0

        def extended(tiles):
            return with_pieces(draft.need, cursor.peek_forward(tiles), microbatch.dropout)

        limit = budget.for_windows(draft)
        tiles = draft.largest(extended, most, window_limit(job, draft, limit))
        if job.pulling is not None:
            tiles = max(tiles, draft.largest(extended, min(most, draft.free_tiles), limit))
        elif not tiles and draft.empty:
            tiles = draft.smallest(extended, most)
        if tiles:
            need = extended(tiles)
            draft.add_windows(job.name, microbatch.id, cursor.take_forward(tiles), need)
            self._charge(job, tape, draft.index, tiles * PAGE_TOKENS)
            budget.tiles = None if budget.tiles is None else budget.tiles - tiles
        return tiles

    def _add_unit(self, job: Job, draft: Draft, budget: Budget) -> bool:
        tape = job.pulling
        (unit,) = tape.cursor.peek_units()
        if budget.units == 0 or not (draft.empty or draft.allows_unit(unit, budget.for_units(draft))):
            return False
        draft.add_unit(*tape.cursor.take_units())
        self._charge(job, tape, draft.index, unit_work(unit, tape.microbatch))
        budget.units = None if budget.units is None else budget.units - 1
        if tape.cursor.done:
            job.tapes.remove(tape)
        return True

    def _charge(self, job: Job, tape: Tape, index: int, tokens: float) -> None:
        self._virtual = max(self._virtual, job.virtual)
        job.virtual += tokens / job.weight
        job.last_used = tape.last_used = index


def lesser(one: float | None, other: float | None) -> float | None:
    """The smaller of two bounds, None being none."""
    return min((bound for bound in (one, other) if bound is not None), default=None)


def window_limit(job: Job, draft: Draft, limit: float | None) -> float | None:
    """Seconds that the iteration may take with forward windows. Beside units of the tape before they get the part of
    the room that brings both tapes to their ends together."""
    if limit is None or job.pulling is None:
        return limit
    forward, backward = job.forwarding.cursor.tiles_left * PAGE_TOKENS, work_left(job.pulling)
    return draft.seconds + (limit - draft.seconds) * forward / (forward + backward)
