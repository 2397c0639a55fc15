"""Draft: an iteration under construction, and what it would cost with a little more in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from flexjax.layout import PAGE_TOKENS, SlotLayout, tiles_for
from flexjax.scheduler.cursor import Piece
from flexjax.scheduler.latency import LatencyModel
from flexjax.scheduler.output import DecodeSlot, Iteration, PromptSegment, Unit, WindowSegment


@dataclass(frozen=True)
class Need:
    """What a layout must offer; ``row_context`` and ``tile_context`` are the positions its parts attend to."""

    rows: int = 0
    tiles: int = 0
    row_context: int = 0
    tile_context: int = 0
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
        work_seconds: predicted, of its units.
        admitted: requests that get their row with this iteration.
        floor: a layout that is accepted over any limit, because less would be nothing; None: there is none.
    """

    def __init__(self, index: int, layouts: Sequence[SlotLayout], latency: LatencyModel):
        self.index = index
        self.need = Need()
        self.work_seconds = 0.0
        self.decode: list[DecodeSlot] = []
        self.prompts: list[PromptSegment] = []
        self.windows: list[WindowSegment] = []
        self.units: list[Unit] = []
        self.admitted: list[int] = []
        self.floor: SlotLayout | None = None
        self._latency = latency
        self._unit_seconds: dict[tuple, float] = {}
        self._known: tuple[Need | None, tuple[float, SlotLayout | None]] = (None, (0.0, None))
        self._costs = [LayoutCost.of(layout, latency) for layout in layouts]

    @property
    def row_sizes(self) -> list[int]:
        """Rows that layouts have."""
        return sorted({cost.layout.rows for cost in self._costs})

    @property
    def empty(self) -> bool:
        return not (self.need.anything or self.units)

    @property
    def serves(self) -> bool:
        """Some request gets something."""
        return bool(self.decode or self.prompts)

    @property
    def free_tiles(self) -> int:
        """Tiles that the layout has anyway, and nobody uses."""
        layout = self.layout_for(self.need) if self.need.anything else None
        return 0 if layout is None else layout.tiles - self.need.tiles

    @property
    def seconds(self) -> float:
        """Predicted seconds as it stands; 0 if empty."""
        return 0.0 if self.empty else self._predict(self.need)

    def best_rate(self, row_share: float, limit: float) -> float:
        """Slots a second that requests could be served at most, in iterations of up to ``limit`` seconds.

        Args:
            row_share: of the slots, those that decode; their contexts are taken to be as long as in this draft.
        """
        context = self.need.row_context / max(len(self.decode), 1)
        best = 0.0
        for cost in self._costs:
            slots = min(
                cost.layout.rows / row_share if row_share else math.inf,
                cost.layout.chunk / (1 - row_share) if row_share < 1 else math.inf,
            )
            seconds = self._latency.overhead + cost.base + cost.row * context * row_share * slots
            if seconds <= limit:
                best = max(best, slots / seconds)
        return best

    def layout_for(self, need: Need) -> SlotLayout | None:
        """The cheapest layout for ``need``; among equals the one with fewest slots. None if no layout has it all."""
        return self._cheapest(need)[1]

    def allows(self, need: Need, limit: float | None) -> bool:
        """Whether some layout holds ``need`` and the iteration stays within ``limit`` seconds, or is ``floor``."""
        seconds, layout = self._cheapest(need)
        if layout is None:
            return False
        return limit is None or self._latency.overhead + seconds + self.work_seconds <= limit or layout == self.floor

    def allows_unit(self, unit: Unit, limit: float | None) -> bool:
        """Whether the iteration with one more unit stays within ``limit`` seconds."""
        return limit is None or self.seconds_with(unit) <= limit

    def seconds_with(self, unit: Unit) -> float:
        """Predicted seconds with one more unit."""
        return self._predict(self.need) + self._seconds_of(unit)

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
        self.work_seconds += self._seconds_of(unit)

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
            context_tokens=self.need.row_context + self.need.tile_context,
            admitted=tuple(self.admitted),
            tile_context=self.need.tile_context,
            unit_seconds=self.work_seconds,
        )

    def _predict(self, need: Need) -> float:
        forward = self._cheapest(need)[0] if need.anything else 0.0
        return self._latency.overhead + forward + self.work_seconds

    def _seconds_of(self, unit: Unit) -> float:
        key = (unit.kind, unit.slots, unit.context, unit.lean)
        if key not in self._unit_seconds:
            self._unit_seconds[key] = self._latency.work_seconds(unit.work)
        return self._unit_seconds[key]

    def _cheapest(self, need: Need) -> tuple[float, SlotLayout | None]:
        """Seconds of the cheapest layout for ``need``, and which it is. The last answer is kept: units are tried one by
        one while ``need`` stays the same."""
        if need is not self._known[0]:
            self._known = (need, self._search(need))
        return self._known[1]

    def _search(self, need: Need) -> tuple[float, SlotLayout | None]:
        best = (0.0, 0, None)
        for cost in self._costs:
            if cost.layout.rows < need.rows or cost.layout.chunk < need.tiles * PAGE_TOKENS:
                continue
            key = (cost.seconds(need), cost.layout.slots, cost.layout)
            if (best[2] is None or key < best) and need.met_by(cost.layout):
                best = key
        return best[0], best[2]


class LayoutCost(NamedTuple):
    """What a layout costs in the draft's iteration: without context, and for a position of its rows and tiles."""

    layout: SlotLayout
    base: float
    row: float
    tile: float

    @classmethod
    def of(cls, layout: SlotLayout, latency: LatencyModel) -> "LayoutCost":
        return cls(layout, *(latency.price((kind, layout)) for kind in ("forward", "rows", "tiles")))

    def seconds(self, need: Need) -> float:
        return self.base + self.row * need.row_context + self.tile * need.tile_context


def with_pieces(need: Need, pieces: Sequence[Piece], dropout: bool) -> Need:
    """``need`` and finetuning pieces beside it."""
    return replace(
        need,
        tiles=need.tiles + sum(tiles_for(piece.length) for piece in pieces),
        tile_context=need.tile_context + sum(context_of(piece.start, piece.length) for piece in pieces),
        tape=True,
        dropout=need.dropout or dropout,
    )


def context_of(start: int, length: int) -> int:
    """Context tokens of a segment: each of its tiles attends to every position up to the tile's own end."""
    tiles = tiles_for(length)
    return tiles * start + PAGE_TOKENS * tiles * (tiles + 1) // 2
