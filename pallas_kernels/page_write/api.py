"""``page_write`` as callers use it: arguments checked, implementation named."""

from types import MappingProxyType

from pallas_kernels.implementations import choose
from pallas_kernels.page_write import reference

IMPLEMENTATIONS = MappingProxyType({"reference": reference.page_write})


def page_write(pool, layer, rows, slots, *, implementation: str = "reference"):
    """Write rows into the pages of one layer.

    Happens in place where the pool is donated or is the carry of a loop.

    Args:
        pool: [layers, pages, page, width].
        layer: int32 scalar, may be traced.
        rows: [rows, width] in the dtype of the pool.
        slots: [rows] int32, page id * page + offset; negative or past the last page drops the row. No slot twice.

    Returns:
        The pool with the rows in place.

    Raises:
        ValueError: rows of another width or dtype than the pool's, slots that are not one per row, or an unknown
            implementation.
    """
    if rows.ndim != 2 or rows.shape[-1] != pool.shape[-1]:
        raise ValueError(f"page_write: rows of shape {rows.shape} do not fit pages of rows of {pool.shape[-1]} values")
    if rows.dtype != pool.dtype:
        raise ValueError(f"page_write: rows are {rows.dtype}, the pool is {pool.dtype}; cast the rows")
    if slots.shape != rows.shape[:1]:
        raise ValueError(f"page_write: slots of shape {slots.shape} for {rows.shape[0]} rows")
    return choose("page_write", IMPLEMENTATIONS, implementation)(pool, layer, rows, slots)
