"""Jobs: which finetuning work runs next, and the pages of the tapes. It knows no requests."""

from dataclasses import dataclass, field
from itertools import batched

from flexjax.layout import PAGE_TOKENS
from flexjax.scheduler.cursor import Microbatch, MicrobatchCursor
from flexjax.scheduler.draft import Draft, with_pieces
from flexjax.scheduler.ledger import PageLedger
from flexjax.scheduler.output import MicrobatchPages, Unit, UnitKind
from flexjax.scheduler.policy import Share

BACKWARD_WORK = 2.0
"""Work of the backward pass per token, in forward passes: the input gradient and what is recomputed."""


@dataclass
class Tape:
    """A microbatch on its way, with its pages (None after it was dropped); ``last_used`` as in ``Sequence``."""

    microbatch: Microbatch
    cursor: MicrobatchCursor
    pages: tuple[int, ...] | None
    last_used: int = -1


@dataclass
class Job:
    """A job's claim to the room that requests leave; ``virtual`` is the work it got divided by its weight."""

    name: str
    weight: float = 1.0
    paused: bool = False
    virtual: float = 0.0
    last_used: int = -1
    tape: Tape | None = None


@dataclass
class Budget:
    """What is left of finetuning's share; None is without bound."""

    limit: float | None
    tiles: int | None
    units: int | None
    stuck: set[str] = field(default_factory=set)


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
        pages = None if job.paused or job.tape is not None else self._reserve(microbatch, spare)
        if pages is None:
            return False
        job.tape = self.tapes[microbatch.id] = Tape(microbatch, MicrobatchCursor(microbatch), pages)
        if job.last_used < self._ledger.completed:
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
        return MicrobatchPages(tuple(batched(tape.pages, tape.microbatch.pages_per_block)))

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

    def runnable(self, pages_short: bool = False) -> list[Job]:
        """Jobs with work that could run now.

        A paused job whose gradients already know its microbatch is one of them while requests lack pages: to finish
        the microbatch is the only way to give its pages back.
        """
        return [job for job in self.jobs.values() if can_run(job, pages_short)]

    def plan(self, draft: Draft, share: Share, pages_short: bool) -> None:
        """Fills what the requests left of ``share``; an empty draft gets something whatever its limit."""
        budget = Budget(share.limit, share.tiles, share.units)
        ready = self.runnable(pages_short)
        while ready:
            job = min(ready, key=lambda job: (job.virtual, job.tape.microbatch.id))
            forward = job.tape.cursor.tiles_left
            advanced = self._add_windows(job, draft, budget) if forward else self._add_unit(job, draft, budget)
            if not advanced or job.tape is None:
                ready.remove(job)

    def complete(self, index: int) -> tuple[int, ...]:
        """Gives back the pages of microbatches whose last unit was in iteration ``index``; their ids."""
        finished = [tape for tape in self.tapes.values() if tape.cursor.done and tape.pages and tape.last_used <= index]
        for tape in finished:
            self._ledger.release(tape.pages, tape.last_used)
            del self.tapes[tape.microbatch.id]
        return tuple(tape.microbatch.id for tape in finished)

    def held(self) -> list[int]:
        """Pages of all tapes."""
        return [page for tape in self.tapes.values() for page in tape.pages or ()]

    def check(self) -> None:
        """Asserts that every tape belongs to its job or is about to end."""
        for tape in self.tapes.values():
            assert tape.cursor.done or self.jobs[tape.microbatch.job].tape is tape, "a tape has no job"

    def _job(self, name: str) -> Job:
        return self.jobs.setdefault(name, Job(name, virtual=self._virtual))

    def _reserve(self, microbatch: Microbatch, spare: int) -> tuple[int, ...] | None:
        return self._ledger.allocate_after((), microbatch.pages, spare)

    def _add_windows(self, job: Job, draft: Draft, budget: Budget) -> int:
        cursor, microbatch = job.tape.cursor, job.tape.microbatch
        most = cursor.tiles_left if budget.tiles is None else min(budget.tiles, cursor.tiles_left)
        if most == 0:
            return 0

        def extended(tiles):
            return with_pieces(draft.need, cursor.peek_forward(tiles), microbatch.dropout)

        tiles = draft.largest(extended, most, budget.limit)
        if not tiles and draft.empty:
            tiles = draft.smallest(extended, most)
        if tiles:
            need = extended(tiles)
            draft.add_windows(job.name, microbatch.id, cursor.take_forward(tiles), need)
            self._charge(job, draft.index, tiles * PAGE_TOKENS)
            budget.tiles = None if budget.tiles is None else budget.tiles - tiles
        return tiles

    def _add_unit(self, job: Job, draft: Draft, budget: Budget) -> bool:
        cursor = job.tape.cursor
        (unit,) = cursor.peek_units()
        if budget.units == 0 or not (draft.empty or draft.allows_unit(unit, budget.limit)):
            return False
        draft.add_unit(*cursor.take_units())
        self._charge(job, draft.index, work_of(unit, job.tape.microbatch))
        budget.units = None if budget.units is None else budget.units - 1
        if cursor.done:
            job.tape = None
        return True

    def _charge(self, job: Job, index: int, tokens: float) -> None:
        self._virtual = max(self._virtual, job.virtual)
        job.virtual += tokens / job.weight
        job.last_used = job.tape.last_used = index


def can_run(job: Job, pages_short: bool) -> bool:
    if job.tape is None or job.tape.pages is None:
        return False
    return not job.paused or (pages_short and job.tape.cursor.begun)


def work_of(unit: Unit, microbatch: Microbatch) -> float:
    """Work of a unit in token forward passes; a loss window counts as much as one layer of the backward pass."""
    return 0.0 if unit.kind is UnitKind.UPDATE else BACKWARD_WORK * unit.slots / microbatch.layers
