"""``write_parts``, and ``page_write`` and ``write_pages`` of one part: arguments checked, implementation named."""

import functools
from collections.abc import Sequence
from types import MappingProxyType

from pallas_kernels.implementations import choose
from pallas_kernels.mosaic import INTERPRETER
from pallas_kernels.page_write import kernel, reference
from pallas_kernels.page_write.parts import Pages, Rows, tiles_of

IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": reference.write_parts,
        "mosaic_gpu": kernel.write_parts,
        "mosaic_gpu_interpreted": functools.partial(kernel.write_parts, interpret=INTERPRETER),
    }
)


def write_parts(pool, layer, parts: Sequence[Rows | Pages], *, implementation: str = "reference"):
    """Write rows and pages of one layer, all in one launch of the kernel.

    Happens in place where the pool is donated or is the carry of a loop.

    Args:
        pool: [layers, pages, page, width].
        layer: int32 scalar, may be traced.
        parts: what goes where. No slot twice, within a part or across parts: they are written in any order.

    Returns:
        The pool with the parts in place.

    Raises:
        ValueError: values of another dtype than the pool's, rows of another width, too few rows, pages of another
            shape than the values need, an unknown implementation, or one that cannot copy rows of this many bytes.
    """
    write = choose("page_write", IMPLEMENTATIONS, implementation)
    tiles = [tiles_of(part, pool) for part in parts]
    written = [each for each in tiles if each.places.size and each.values.size]
    return write(pool, layer, written) if written else pool


def page_write(pool, layer, rows, slots, *, implementation: str = "reference"):
    """``write_parts`` of ``Rows(rows, slots)`` alone."""
    return write_parts(pool, layer, [Rows(rows, slots)], implementation=implementation)


def write_pages(
    pool, layer, values, pages, *, first_row: int = 0, columns: int | None = None, implementation: str = "reference"
):
    """``write_parts`` of ``Pages(values, pages, first_row, columns)`` alone."""
    return write_parts(pool, layer, [Pages(values, pages, first_row, columns)], implementation=implementation)
