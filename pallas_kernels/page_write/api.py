"""``page_write`` and ``write_pages`` as callers use them: arguments checked, implementation named."""

import functools
from types import MappingProxyType

from pallas_kernels.implementations import choose
from pallas_kernels.mosaic import INTERPRETER
from pallas_kernels.page_write import kernel, reference

IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": reference.page_write,
        "mosaic_gpu": kernel.page_write,
        "mosaic_gpu_interpreted": functools.partial(kernel.page_write, interpret=INTERPRETER),
    }
)
PAGE_IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": reference.write_pages,
        "mosaic_gpu": kernel.write_pages,
        "mosaic_gpu_interpreted": functools.partial(kernel.write_pages, interpret=INTERPRETER),
    }
)


def page_write(pool, layer, rows, slots, *, implementation: str = "reference"):
    """Write rows into the pages of one layer.

    Happens in place where the pool is donated or is the carry of a loop.

    Args:
        pool: [layers, pages, page, width].
        layer: int32 scalar, may be traced.
        rows: [at least n, width] in the dtype of the pool; the first n are written.
        slots: [n] int32, page id * page + offset; negative or past the last page drops the row. No slot twice.

    Returns:
        The pool with the rows in place.

    Raises:
        ValueError: rows of another width or dtype than the pool's, more slots than rows, an unknown implementation,
            or one that cannot copy rows of this many bytes.
    """
    _check_values("page_write", pool, rows)
    if rows.shape[-1] != pool.shape[-1]:
        raise ValueError(f"page_write: rows of shape {rows.shape} do not fit pages of rows of {pool.shape[-1]} values")
    if slots.ndim != 1 or slots.shape[0] > rows.shape[0]:
        raise ValueError(f"page_write: slots of shape {slots.shape} for {rows.shape[0]} rows")
    return choose("page_write", IMPLEMENTATIONS, implementation)(pool, layer, rows, slots)


def write_pages(
    pool, layer, values, pages, *, first_row: int = 0, columns: int | None = None, implementation: str = "reference"
):
    """Write whole pages of one layer from a plain matrix, cut into tiles of as many rows as a page has.

    A tile whose rows are wider than a page's goes to several pages, one for every ``width`` columns:

        values, width = 4             pages = [[7, 2],     tile 0 to pages 7 and 2
        | 0 1 2 3 | 4 5 |                      [5, -1]]    tile 1 to page 5, its last columns nowhere

    The last page of a tile keeps what it held in the columns past those of the values. Happens in place where the pool
    is donated or is the carry of a loop.

    Args:
        pool: [layers, pages, page, width].
        layer: int32 scalar, may be traced.
        values: [at least first_row + tiles * page, at least n] in the dtype of the pool.
        pages: [tiles, ceil(n / width)] int32; negative or past the last page writes nothing. No page twice.
        first_row: row of the values where the first tile begins.
        columns: n, how many of the leading columns are written; None for all. A slice of them would be copied first.

    Returns:
        The pool with the pages in place.

    Raises:
        ValueError: values of another dtype than the pool's or with too few rows, pages of another shape, an unknown
            implementation, or one that cannot copy rows of this many bytes.
    """
    _check_values("write_pages", pool, values)
    columns = values.shape[1] if columns is None else columns
    if columns > values.shape[1]:
        raise ValueError(f"write_pages: {columns} columns of values of shape {values.shape}")
    needed = -(-columns // pool.shape[-1])
    if pages.ndim != 2 or pages.shape[1] != needed:
        raise ValueError(
            f"write_pages: pages of shape {pages.shape} for {columns} columns; rows of {pool.shape[-1]} values"
            f" need {needed} pages a tile"
        )
    needed = first_row + pages.shape[0] * pool.shape[2]
    if first_row < 0 or needed > values.shape[0]:
        raise ValueError(
            f"write_pages: {pages.shape[0]} tiles from row {first_row} reach to row {needed} of {values.shape[0]}"
        )
    write = choose("write_pages", PAGE_IMPLEMENTATIONS, implementation)
    return write(pool, layer, values, pages, first_row=first_row, columns=columns)


def _check_values(operation, pool, values):
    if values.ndim != 2:
        raise ValueError(f"{operation}: values of shape {values.shape} are no matrix")
    if values.dtype != pool.dtype:
        raise ValueError(f"{operation}: rows are {values.dtype}, the pool is {pool.dtype}; cast the rows")
