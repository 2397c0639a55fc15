"""MicrobatchCursor: how far a microbatch has come on its fixed path. It knows no pages, no slots and no time."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, batched

from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.scheduler.output import Unit, UnitKind


@dataclass(frozen=True)
class Microbatch:
    """Packed finetuning sequences of one job that share a tape.

    The sequences stand one after another on the microbatch axis, each from the next multiple of 64 slots; a
    block is 64 slots of that axis. For lengths (100, 30) and window 128::

        block     0      1      2
        sequence  0      0      1
        window    0      0      1

    Attributes:
        lengths: tokens of each sequence.
        window: slots of a loss or backward window, a multiple of 64; the grid starts at slot 0.
        lowest_layer: the backward pass ends with this layer.
        closes_group: an optimizer step follows.
        finals_per_page: so many blocks share one more page, for their final hidden states; 0 for no such pages.
        evaluation: only the loss is wanted; nothing follows the loss windows.
        adapter_version: that makes the tape.
        dropout: LoRA dropout is applied, so the forward step needs a layout with it.
        lean: its tape keeps less, for want of pages.

    Raises:
        ValueError: a field is outside its range.
    """

    id: int
    job: str
    lengths: tuple[int, ...]
    window: int
    layers: int
    lowest_layer: int
    pages_per_block: int
    closes_group: bool
    finals_per_page: int = 0
    evaluation: bool = False
    adapter_version: int = 0
    dropout: bool = False
    lean: bool = False

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"microbatch {self.id} has lengths {self.lengths}; each sequence needs at least 1 token")
        if self.window < PAGE_TOKENS or self.window % PAGE_TOKENS:
            raise ValueError(f"window is {self.window}; it must be a positive multiple of {PAGE_TOKENS}")
        if not 0 <= self.lowest_layer < self.layers:
            raise ValueError(f"lowest_layer is {self.lowest_layer}; it must be in [0, {self.layers})")
        if self.pages_per_block < 1:
            raise ValueError(f"pages_per_block is {self.pages_per_block}; it must be at least 1")
        if self.finals_per_page < 0:
            raise ValueError(f"finals_per_page is {self.finals_per_page}; it must not be negative")

    @cached_property
    def first_blocks(self) -> tuple[int, ...]:
        """First block of each sequence, and at the end the number of blocks."""
        return tuple(accumulate((tiles_for(length) for length in self.lengths), initial=0))

    @property
    def blocks(self) -> int:
        return self.first_blocks[-1]

    @property
    def slots(self) -> int:
        return self.blocks * PAGE_TOKENS

    @property
    def windows(self) -> int:
        return -(-self.slots // self.window)

    @property
    def pages(self) -> int:
        """Pages needed: those of every block, and those that blocks share."""
        shared = -(-self.blocks // self.finals_per_page) if self.finals_per_page else 0
        return self.blocks * self.pages_per_block + shared

    @property
    def last_unit(self) -> Unit:
        """The unit after which nothing of this microbatch is left to run."""
        if self.closes_group and not self.evaluation:
            return Unit(UnitKind.UPDATE, self.job, self.id)
        if self.evaluation:
            return Unit(UnitKind.LOSS, self.job, self.id, window=self.windows - 1, slots=self.window)
        return self.backward_unit(self.lowest_layer, 0)

    def backward_unit(self, layer: int, window: int) -> Unit:
        """The unit of one layer and window."""
        context = self.window_context[window]
        return Unit(UnitKind.BACKWARD, self.job, self.id, layer, window, self.window, context, self.lean)

    @cached_property
    def window_context(self) -> tuple[int, ...]:
        """Key positions that the tiles of each window attend to, each tile up to its own end."""
        pairs = zip(self.first_blocks, self.first_blocks[1:], strict=False)
        reach = [PAGE_TOKENS * tile for first, end in pairs for tile in range(1, end - first + 1)]
        return tuple(sum(tiles) for tiles in batched(reach, self.window // PAGE_TOKENS))

    def block_of(self, sequence: int) -> int:
        """First block of a sequence."""
        return self.first_blocks[sequence]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one sequence, not yet given slots: positions start .. start + length - 1."""

    sequence: int
    start: int
    length: int
    block: int


class MicrobatchCursor:
    """Two counters on the path of a microbatch: blocks forwarded, then units run.

    The units are the loss windows, first to last; unless it is an evaluation, then the layers from last to
    lowest, in each the windows from last to first; then an update if the microbatch closes its group.
    """

    def __init__(self, microbatch: Microbatch):
        self.microbatch = microbatch
        self.blocks_taken = 0
        self.units_taken = 0

    @property
    def tiles_left(self) -> int:
        """Tiles of 64 slots that the forward pass still needs."""
        return self.microbatch.blocks - self.blocks_taken

    @property
    def units(self) -> int:
        batch = self.microbatch
        if batch.evaluation:
            return batch.windows
        return batch.windows * (1 + batch.layers - batch.lowest_layer) + batch.closes_group

    @property
    def begun(self) -> bool:
        """Some unit was taken, so the gradients of the job already know this microbatch."""
        return self.units_taken > 0

    @property
    def backward_begun(self) -> bool:
        return self.units_taken > self.microbatch.windows

    @property
    def done(self) -> bool:
        return not self.tiles_left and self.units_taken == self.units

    def peek_forward(self, max_tiles: int) -> tuple[Piece, ...]:
        """The next pieces of the forward pass, at most ``max_tiles`` tiles; a sequence is split at multiples of 64."""
        batch = self.microbatch
        block = self.blocks_taken
        end = min(batch.blocks, block + max_tiles)
        pieces = []
        while block < end:
            sequence = bisect_right(batch.first_blocks, block) - 1
            stop = min(end, batch.first_blocks[sequence + 1])
            first = batch.block_of(sequence)
            start = (block - first) * PAGE_TOKENS
            length = min(batch.lengths[sequence], (stop - first) * PAGE_TOKENS) - start
            pieces.append(Piece(sequence, start, length, block))
            block = stop
        return tuple(pieces)

    def take_forward(self, max_tiles: int) -> tuple[Piece, ...]:
        """As ``peek_forward``, and they count as done."""
        pieces = self.peek_forward(max_tiles)
        self.blocks_taken += sum(tiles_for(piece.length) for piece in pieces)
        return pieces

    def peek_units(self, count: int = 1) -> tuple[Unit, ...]:
        """The next units, at most ``count``; none before the forward pass is complete."""
        if self.tiles_left:
            return ()
        return tuple(self._unit(index) for index in range(self.units_taken, min(self.units, self.units_taken + count)))

    def take_units(self, count: int = 1) -> tuple[Unit, ...]:
        """As ``peek_units``, and they count as done."""
        units = self.peek_units(count)
        self.units_taken += len(units)
        return units

    def restart(self) -> None:
        """Back to the beginning, because the tape was lost."""
        if self.backward_begun:
            raise ValueError(f"microbatch {self.microbatch.id} has begun its backward pass; it cannot be restarted")
        self.blocks_taken = self.units_taken = 0

    def _unit(self, index: int) -> Unit:
        batch = self.microbatch
        turn, window = divmod(index, batch.windows)
        if turn == 0:
            return Unit(UnitKind.LOSS, batch.job, batch.id, window=window, slots=batch.window)
        layer = batch.layers - turn
        if layer < batch.lowest_layer:
            return Unit(UnitKind.UPDATE, batch.job, batch.id)
        window = batch.windows - 1 - window
        return batch.backward_unit(layer, window)
