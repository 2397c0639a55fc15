"""What the scheduler decides and hears back: plain values between it and whoever owns the device."""

import enum
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from flexjax.layout import SlotLayout
from flexjax.request import FinishReason
from flexjax.scheduler.terms import span_of, unit_term


class DecodeSlot(NamedTuple):
    """One row that computes its newest token and samples the next.

    Attributes:
        position: of the token computed; its value was sampled by this row and may still be only on the device.
        pages: K/V pages of the sequence, covering positions 0 .. position.
    """

    row: int
    request_id: int
    position: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptSegment:
    """Consecutive tokens of one request, all known on the host, in the chunk part.

    Attributes:
        slot: first slot within the chunk part, a multiple of 64.
        start: first position in the sequence, a multiple of 64.
        length: tokens; a multiple of 64 unless the segment reaches the end of the known tokens.
        pages: K/V pages of the sequence, covering positions 0 .. start + length - 1.
        samples: the segment reaches the end of the known tokens, so its row samples the next one.
    """

    request_id: int
    row: int
    slot: int
    start: int
    length: int
    pages: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True)
class WindowSegment:
    """Consecutive tokens of one finetuning sequence in the chunk part.

    Attributes:
        sequence: index within the microbatch.
        slot: first slot within the chunk part, a multiple of 64.
        start: first position in the sequence, a multiple of 64.
        block: first block of 64 slots on the microbatch axis.
    """

    job: str
    microbatch: int
    sequence: int
    slot: int
    start: int
    length: int
    block: int


class UnitKind(enum.StrEnum):
    LOSS = "loss"
    BACKWARD = "backward"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Unit:
    """One call of a finetuning program after the forward step of the iteration.

    Attributes:
        layer: of a backward unit, else -1.
        window: index on the grid of the microbatch axis; -1 for an update.
        slots: length of the window, 0 for an update.
        context: key positions that the window's tiles attend to, of a backward unit.
        lean: its tape keeps less, so that it recomputes more.
    """

    kind: UnitKind
    job: str
    microbatch: int
    layer: int = -1
    window: int = -1
    slots: int = 0
    context: int = 0
    lean: bool = False

    @property
    def program(self) -> tuple:
        """Key of the compiled program in the latency model."""
        return unit_term(self.kind, self.slots, self.lean)

    @property
    def work(self) -> dict[tuple, int]:
        """Amount of each term of the latency model."""
        program = self.program
        return {program: 1} | ({span_of(program): self.context} if self.context else {})


@dataclass(frozen=True)
class Iteration:
    """Everything one turn of the engine runs: at most one forward step, then units in this order.

    Attributes:
        index: 0, 1, 2, ... without gaps; ``complete`` must be called in this order.
        layout: of the forward step; None if there is none.
        decode: in order of rows.
        predicted: seconds the whole iteration should take.
        limit: seconds it was allowed; None if nothing bounded it.
        context_tokens: key positions read: the sum over decode slots and tiles of what each attends to.
        tile_context: the tiles' part of it.
        unit_seconds: predicted, of the units; the rest of ``predicted`` is the forward step's.
        admitted: requests that got their row in this iteration, so that the row's state on the device starts anew.
    """

    index: int
    layout: SlotLayout | None
    decode: tuple[DecodeSlot, ...]
    prompts: tuple[PromptSegment, ...]
    windows: tuple[WindowSegment, ...]
    units: tuple[Unit, ...]
    predicted: float
    limit: float | None
    context_tokens: int
    admitted: tuple[int, ...] = ()
    tile_context: int = 0
    unit_seconds: float = 0.0

    @property
    def decode_slots(self) -> int:
        return len(self.decode)

    @property
    def prompt_slots(self) -> int:
        return sum(segment.length for segment in self.prompts)

    @property
    def finetuning_slots(self) -> int:
        return sum(segment.length for segment in self.windows)

    @property
    def sampled_rows(self) -> list[tuple[int, int, int]]:
        """(row, request id, position of the token that will be sampled), decode rows first."""
        decoding = [(slot.row, slot.request_id, slot.position + 1) for slot in self.decode]
        prompts = [(part.row, part.request_id, part.start + part.length) for part in self.prompts if part.samples]
        return decoding + prompts

    @property
    def work(self) -> Counter:
        """Amount of each finetuning term of the latency model."""
        total = Counter()
        for unit in self.units:
            total.update(unit.work)
        return total


@dataclass(frozen=True)
class MicrobatchPages:
    """Pages of one microbatch.

    Attributes:
        blocks: per block of 64 slots, column 0 K/V, the rest tape.
        finals: of final hidden states, each shared by ``finals_per_page`` blocks one after another.
    """

    blocks: tuple[tuple[int, ...], ...]
    finals: tuple[int, ...] = ()
    finals_per_page: int = 0

    @property
    def final_places(self) -> tuple[int, ...]:
        """Where each block's final hidden state lies: places are counted through all pages of the pool."""
        share = self.finals_per_page
        return tuple(self.finals[block // share] * share + block % share for block in range(len(self.blocks)))


class NewToken(NamedTuple):
    """A token that became known; ``finish_reason`` is None while its request goes on."""

    request_id: int
    token: int
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Completion:
    """What became known with the end of an iteration: tokens, and the microbatches whose last unit it ran."""

    tokens: tuple[NewToken, ...]
    microbatches: tuple[int, ...] = ()
