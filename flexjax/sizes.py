"""Sizes: how large steps, microbatches and windows are where a configuration leaves it open. They suit the device."""

from dataclasses import dataclass, replace

from flexjax.layout import PAGE_TOKENS


@dataclass(frozen=True)
class Sizes:
    """Fields of `EngineConfig` of the same names.

    Attributes:
        parts: row sizes are ``max_rows`` divided by these, in multiples of 8 from 8 on ...
        fewest_rows: ... but for what is below this number: fewer rows take hardly less time.
    """

    max_rows: int
    parts: tuple[int, ...]
    fewest_rows: int
    chunk_sizes: tuple[int, ...] | None
    step_sizes: tuple[int, ...] | None
    microbatch_tokens: int
    backward_window: int

    def row_sizes(self, max_rows: int) -> tuple[int, ...]:
        """Ascending, the last one ``max_rows``."""
        shares = (-(-max_rows // part) for part in self.parts if part <= max_rows)
        rounded = (rows if rows < 8 else -(-rows // 8) * 8 for rows in shares)
        return (*sorted({rows for rows in rounded if self.fewest_rows <= rows < max_rows}), max_rows)

    def rows_for(self, sequences: int) -> int:
        """The least of the usual numbers of rows that these decode in together; more of them take turns."""
        return next((rows for rows in self.row_sizes(self.max_rows) if rows >= sequences), self.max_rows)

    def window_of(self, microbatch_tokens: int | None) -> int:
        """Slots of a backward unit, of a microbatch of this size if one is given."""
        most = self.backward_window
        return most if microbatch_tokens is None else whole_part(microbatch_tokens, most)

    def without_requests(self, microbatch_tokens: int) -> "Sizes":
        """Where nobody decodes: few rows, and steps that take a microbatch of this size at once, or in equal parts."""
        chunk = whole_part(microbatch_tokens, self.microbatch_tokens)
        return replace(self, max_rows=8, parts=(), chunk_sizes=(chunk,), step_sizes=None)


def whole_part(tokens: int, most: int) -> int:
    """The largest multiple of 64 up to ``most`` that divides ``tokens``, a multiple of 64 itself."""
    largest = min(most, tokens) // PAGE_TOKENS * PAGE_TOKENS
    return next(size for size in range(largest, 0, -PAGE_TOKENS) if tokens % size == 0)


CPU = Sizes(
    max_rows=8,
    parts=(4,),
    fewest_rows=1,
    chunk_sizes=(64, 256),
    step_sizes=None,
    microbatch_tokens=512,
    backward_window=256,
)

ACCELERATOR = Sizes(
    max_rows=256,
    parts=(8, 4, 2),
    fewest_rows=32,
    chunk_sizes=None,
    step_sizes=(384, 640, 1024, 1280, 2048),
    microbatch_tokens=4096,
    backward_window=2048,
)
"""The largest steps are long enough for full speed; those between fill what an objective allows and waste few slots."""


def sizes_for(platform: str) -> Sizes:
    """Of the devices that jax calls so."""
    return CPU if platform == "cpu" else ACCELERATOR
