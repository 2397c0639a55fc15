"""What a page write writes: rows one by one, or whole pages. The writes themselves know one kind, tiles of rows."""

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Rows that go to slots of the pool.

    Attributes:
        rows: [at least n, width] in the dtype of the pool; the first n are written.
        slots: [n] int32, page id * page + offset; negative or past the last page drops the row.
    """

    rows: jax.Array
    slots: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """A plain matrix, cut into tiles of as many rows as a page has, that goes to whole pages.

    A tile whose rows are wider than a page's goes to several pages, one for every ``width`` columns:

        values, width = 4             pages = [[7, 2],     tile 0 to pages 7 and 2
        | 0 1 2 3 | 4 5 |                      [5, -1]]    tile 1 to page 5, its last columns nowhere

    The last page of a tile keeps what it held in the columns past those of the values.

    Attributes:
        values: [at least first_row + tiles * page, at least n] in the dtype of the pool.
        pages: [tiles, ceil(n / width)] int32; negative or past the last page writes nothing.
        first_row: row of the values where the first tile begins.
        columns: n, how many of the leading columns are written; None for all. A slice of them would be copied first.
    """

    values: jax.Array
    pages: jax.Array
    first_row: int = field(default=0, metadata=dict(static=True))
    columns: int | None = field(default=None, metadata=dict(static=True))


@dataclass(frozen=True)
class Tiles:
    """Either of them, checked: tiles of ``rows`` rows of the leading ``columns`` of the values.

    Attributes:
        places: [tiles, ceil(columns / width)] int32, page id * (page / rows) + which such tile of the page.
    """

    values: jax.Array
    places: jax.Array
    rows: int
    first_row: int
    columns: int


def tiles_of(part: Rows | Pages, pool) -> Tiles:
    """The part for a pool [layers, pages, page, width].

    Raises:
        ValueError: it does not fit, see ``api.write_parts``.
    """
    values = part.rows if isinstance(part, Rows) else part.values
    if values.ndim != 2:
        raise ValueError(f"page_write: values of shape {values.shape} are no matrix")
    if values.dtype != pool.dtype:
        raise ValueError(f"page_write: rows are {values.dtype}, the pool is {pool.dtype}; cast the rows")
    return _of_rows(part, pool) if isinstance(part, Rows) else _of_pages(part, pool)


def _of_rows(part: Rows, pool) -> Tiles:
    rows, slots, width = part.rows, part.slots, pool.shape[-1]
    if rows.shape[1] != width:
        raise ValueError(f"page_write: rows of shape {rows.shape} do not fit pages of rows of {width} values")
    if slots.ndim != 1 or slots.shape[0] > rows.shape[0]:
        raise ValueError(f"page_write: slots of shape {slots.shape} for {rows.shape[0]} rows")
    return Tiles(rows, slots[:, None], rows=1, first_row=0, columns=width)


def _of_pages(part: Pages, pool) -> Tiles:
    (rows, most), pages, (*_, page, width) = part.values.shape, part.pages, pool.shape
    columns = most if part.columns is None else part.columns
    if not 0 <= columns <= most:
        raise ValueError(f"page_write: {columns} columns of values of shape {part.values.shape}")
    needed = -(-columns // width)
    if pages.ndim != 2 or pages.shape[1] != needed:
        raise ValueError(
            f"page_write: pages of shape {pages.shape} for {columns} columns; rows of {width} values need {needed}"
            " pages a tile"
        )
    end = part.first_row + pages.shape[0] * page
    if part.first_row < 0 or end > rows:
        raise ValueError(f"page_write: {len(pages)} tiles from row {part.first_row} reach to row {end} of {rows}")
    return Tiles(part.values, pages, rows=page, first_row=part.first_row, columns=columns)
