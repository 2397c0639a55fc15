"""Draft: an iteration under construction, and what it would cost with a little more in it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flexjax.layout import PAGE_TOKENS, SlotLayout, tiles_for
from flexjax.scheduler.cursor import Piece
from flexjax.scheduler.latency import LatencyModel
from flexjax.scheduler.output import DecodeSlot, Iteration, PromptSegment, Unit, WindowSegment


@dataclass(frozen=True)
class Need:
    """What a layout must offer; ``context`` is the iteration's context tokens."""

    rows: int = 0
    tiles: int = 0
    context: int = 0
    tape: bool = False
    dropout: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    adapters: bool = False

    @property
    def anything(self) -> bool:
        return bool(self.rows or self.tiles)

    def met_by(self, layout: SlotLayout) -> bool:
        return layout.holds(
            rows=self.rows,
            chunk=self.tiles * PAGE_TOKENS,
            tape=self.tape,
            dropout=self.dropout,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            adapters=self.adapters,
        )


class Draft:
    """Collects decode slots, segments and units; the layout is always the cheapest that holds them.

    Attributes:
        need: of everything in it.
        programs: calls of each finetuning program.
        admitted: requests that get their row with this iteration.
        floor: a layout that is accepted over any limit, because less would be nothing; None: there is none.
    """

    def __init__(self, index: int, layouts: Sequence[SlotLayout], latency: LatencyModel):
        self.index = index
        self.need = Need()
        self.programs: Counter = Counter()
        self.decode: list[DecodeSlot] = []
        self.prompts: list[PromptSegment] = []
        self.windows: list[WindowSegment] = []
        self.units: list[Unit] = []
        self.admitted: list[int] = []
        self.floor: SlotLayout | None = None
        self._layouts = layouts
        self._latency = latency

    @property
    def empty(self) -> bool:
        return not (self.need.anything or self.units)

    @property
    def serves(self) -> bool:
        """Some request gets something."""
        return bool(self.decode or self.prompts)

    @property
    def seconds(self) -> float:
        """Predicted seconds as it stands; 0 if empty."""
        return 0.0 if self.empty else self._predict(self.need)

    def layout_for(self, need: Need) -> SlotLayout | None:
        """The cheapest layout for ``need``; among equals the one with fewest slots. None if no layout has it all."""
        costs = (
            (self._latency.forward_seconds(layout, need.context), layout.slots, layout)
            for layout in self._layouts
            if need.met_by(layout)
        )
        return min(costs, default=(0.0, 0, None))[2]

    def allows(self, need: Need, limit: float | None) -> bool:
        """Whether some layout holds ``need`` and the iteration stays within ``limit`` seconds, or is ``floor``."""
        layout = self.layout_for(need)
        if layout is None:
            return False
        within = limit is None or self._latency.predict(layout, need.context, self.programs) <= limit
        return within or layout == self.floor

    def allows_unit(self, unit: Unit, limit: float | None) -> bool:
        """Whether the iteration with one more unit stays within ``limit`` seconds."""
        if limit is None:
            return True
        programs = self.programs + Counter((unit.program,))
        return self._predict(self.need, programs) <= limit

    def largest(self, extended: Callable[[int], Need], most: int, limit: float | None) -> int:
        """The largest number of tiles up to ``most`` whose ``extended(tiles)`` need is allowed; 0 if none is."""
        low, high = 0, most
        while low < high:
            middle = high if high == most else (low + high + 1) // 2
            if self.allows(extended(middle), limit):
                low = middle
            else:
                high = middle - 1
        return low

    def smallest(self, extended: Callable[[int], Need], most: int) -> int:
        """The tiles, up to ``most``, that fill the cheapest layout for one tile, which becomes the floor."""
        self.floor = self.layout_for(extended(1))
        return 0 if self.floor is None else min(most, self.floor.tiles - self.need.tiles)

    def add_unit(self, unit: Unit) -> None:
        self.units.append(unit)
        self.programs[unit.program] += 1

    def add_windows(self, job: str, microbatch: int, pieces: Sequence[Piece], need: Need) -> None:
        """Appends pieces in the next free tiles; ``need`` is the draft's need with them."""
        tile = self.need.tiles
        for piece in pieces:
            slot = tile * PAGE_TOKENS
            segment = WindowSegment(job, microbatch, piece.sequence, slot, piece.start, piece.length, piece.block)
            self.windows.append(segment)
            tile += tiles_for(piece.length)
        self.need = need

    def finish(self, limit: float | None) -> Iteration:
        """The iteration as a value."""
        return Iteration(
            index=self.index,
            layout=self.layout_for(self.need) if self.need.anything else None,
            decode=tuple(self.decode),
            prompts=tuple(self.prompts),
            windows=tuple(self.windows),
            units=tuple(self.units),
            predicted=self.seconds,
            limit=limit,
            context_tokens=self.need.context,
            admitted=tuple(self.admitted),
        )

    def _predict(self, need: Need, programs: Counter | None = None) -> float:
        layout = self.layout_for(need) if need.anything else None
        return self._latency.predict(layout, need.context, self.programs if programs is None else programs)


def with_pieces(need: Need, pieces: Sequence[Piece], dropout: bool) -> Need:
    """``need`` and finetuning pieces beside it."""
    return replace(
        need,
        tiles=need.tiles + sum(tiles_for(piece.length) for piece in pieces),
        context=need.context + sum(context_of(piece.start, piece.length) for piece in pieces),
        tape=True,
        dropout=need.dropout or dropout,
    )


def context_of(start: int, length: int) -> int:
    """Context tokens of a segment: each of its tiles attends to every position up to the tile's own end."""
    tiles = tiles_for(length)
    return tiles * start + PAGE_TOKENS * tiles * (tiles + 1) // 2
