"""SlotLayout: the static shape of one forward step. It knows nothing about devices, models or requests."""

from dataclasses import dataclass

PAGE_TOKENS = 64
"""Token positions in one page, and the alignment of segments on the token axis: a tile of 64 slots has one
sequence, one adapter and, because chunks also start at multiples of 64 positions, one page."""

RANK_UNIT = 8
"""The rank axis of resident adapters is handed out in units of this many columns."""


@dataclass(frozen=True, order=True)
class SlotLayout:
    """Token axis of a forward step: ``[decode: one slot per row | chunk: tiles of 64 slots]``.

    Attributes:
        rows: decode slots, one per row of the running batch; rows 0 .. rows-1 take part in the step.
        chunk: slots for prompt chunks and finetuning windows, a multiple of 64 (0: a decode-only step).
        tape: the chunk part may hold finetuning windows, whose activations are written to pages.
        dropout: LoRA dropout is applied to finetuning windows (only with ``tape``).
        logprobs: the step returns the largest log-probabilities of every sampled row.
        prompt_logprobs: the step returns log-probabilities of the prompt tokens in the chunk part.
        base_only: no slot may name an adapter, so that the step need not compute what adapters add.
    """

    rows: int
    chunk: int = 0
    tape: bool = False
    dropout: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    base_only: bool = False

    def __post_init__(self):
        if self.rows < 1:
            raise ValueError(f"layout has {self.rows} rows; at least 1 is needed")
        if self.chunk < 0 or self.chunk % PAGE_TOKENS:
            raise ValueError(f"layout has a chunk of {self.chunk} slots; it must be a multiple of {PAGE_TOKENS}")
        if (self.tape or self.prompt_logprobs) and not self.chunk:
            raise ValueError("a layout with a tape or prompt log-probabilities needs a chunk part")
        if self.dropout and not self.tape:
            raise ValueError("a layout with dropout needs a tape")
        if self.base_only and self.tape:
            raise ValueError("a layout with a tape is for windows of an adapter; it cannot be base_only")
        values = (self.rows, self.chunk, self.tape, self.dropout, self.logprobs, self.prompt_logprobs, self.base_only)
        object.__setattr__(self, "_hash", hash(values))

    def __hash__(self) -> int:
        """Made once: layouts are keys of tables that every iteration looks into hundreds of times."""
        return self._hash

    @property
    def slots(self) -> int:
        """Length of the token axis."""
        return self.rows + self.chunk

    @property
    def tiles(self) -> int:
        """Tiles of 64 slots in the chunk part."""
        return self.chunk // PAGE_TOKENS

    def holds(
        self, *, rows: int, chunk: int, tape=False, dropout=False, logprobs=False, prompt_logprobs=False, adapters=False
    ) -> bool:
        """Whether a step with these needs fits into this layout."""
        return (
            self.rows >= rows
            and self.chunk >= chunk
            and self.tape >= tape
            and self.dropout >= dropout
            and self.logprobs >= logprobs
            and self.prompt_logprobs >= prompt_logprobs
            and not (self.base_only and adapters)
        )


def tiles_for(tokens: int) -> int:
    """Tiles (equally: pages) that ``tokens`` consecutive tokens of one sequence occupy."""
    return -(-tokens // PAGE_TOKENS)
