"""Job: a finetuning job's claim to the room that requests leave, and its tapes. It plans and allocates nothing."""

from dataclasses import dataclass, field

from flexjax.scheduler.cursor import Microbatch, MicrobatchCursor
from flexjax.scheduler.output import Unit, UnitKind

BACKWARD_WORK = 2.0
"""Work of the backward pass per token, in forward passes: the input gradient and what is recomputed."""

TAPES = 2
"""Of a job at once: while one is in its backward pass, the forward windows of the next ride with the requests."""


@dataclass
class Tape:
    """A microbatch on its way, with its pages (None after it was dropped); ``last_used`` as in ``Sequence``."""

    microbatch: Microbatch
    cursor: MicrobatchCursor
    pages: tuple[int, ...] | None
    last_used: int = -1


@dataclass
class Job:
    """A job's claim to the room that requests leave.

    Attributes:
        virtual: the work it got divided by its weight.
        tapes: with something left to schedule, the oldest first. Only the first runs units, so that the gradients of
            the job are used by one backward pass at a time; forward windows are the first unfinished one's.
    """

    name: str
    weight: float = 1.0
    paused: bool = False
    virtual: float = 0.0
    last_used: int = -1
    tapes: list[Tape] = field(default_factory=list)

    @property
    def may_follow(self) -> bool:
        """Another microbatch could begin: none is on its way, or the only one needs nothing but its backward pass,
        and its update does not come in between, which no forward window may cross."""
        if not self.tapes:
            return True
        last = self.tapes[-1]
        return len(self.tapes) < TAPES and not (last.cursor.tiles_left or last.microbatch.closes_group)

    @property
    def forwarding(self) -> Tape | None:
        """The tape whose forward pass goes on."""
        return next((tape for tape in self.tapes if tape.pages is not None and tape.cursor.tiles_left), None)

    @property
    def pulling(self) -> Tape | None:
        """The tape whose units come next."""
        first = self.tapes[0] if self.tapes else None
        return None if first is None or first.pages is None or first.cursor.tiles_left else first


def can_run(job: Job, pages_short: bool) -> bool:
    if job.paused:
        return pages_short and job.pulling is not None and job.pulling.cursor.begun
    return job.pulling is not None or job.forwarding is not None


def unit_work(unit: Unit, microbatch: Microbatch) -> float:
    """Work of a unit in token forward passes; a loss window counts as much as one layer of the backward pass."""
    return 0.0 if unit.kind is UnitKind.UPDATE else BACKWARD_WORK * unit.slots / microbatch.layers


def work_left(tape: Tape) -> float:
    """Work of the units that a tape still needs, in token forward passes."""
    units = tape.cursor.units - tape.cursor.units_taken
    return BACKWARD_WORK * units * tape.microbatch.window / tape.microbatch.layers
