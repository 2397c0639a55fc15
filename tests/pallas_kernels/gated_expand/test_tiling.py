"""Tilings of the gated expansion fit into a multiprocessor and share the work out, whatever the rank axis."""

import pytest

from pallas_kernels.gated_expand.cases import LARGE
from pallas_kernels.gated_expand.tiling import Tiling, tiling_for
from pallas_kernels.lora_expand.tiling import MAX_RANK, PROCESSORS

LIMIT = 227 * 1024


def shared_bytes(tiling: Tiling, rank: int, low_bytes: int) -> int:
    """Every array of a thread block, counted by hand, with 1 KiB for barriers."""
    piece = 16 if rank <= 16 else 32
    high = -(-rank // piece) * piece
    b = tiling.b_places * (2 * high * 2 * tiling.columns + 4 * high)
    y = tiling.stages * (2 * 64 * 2 * tiling.columns + 64 * 8)
    return b + y + tiling.ring * 2 * 64 * piece * low_bytes + 2 * 64 * tiling.columns + 1024


@pytest.mark.parametrize("slots", [1, 64, 256, 1536, 2112])
@pytest.mark.parametrize("rank", [8, 16, 64, 128, 192, 256, 512, 768, MAX_RANK])
@pytest.mark.parametrize("low_bytes", [2, 4])
@pytest.mark.parametrize("width", [64, 1536, 7168, 14336, 18944])
def test_fits(slots, rank, low_bytes, width):
    tiling = tiling_for(slots, rank, width, low_bytes)
    assert shared_bytes(tiling, rank, low_bytes) <= LIMIT
    assert width % tiling.columns == 0 and tiling.columns % tiling.part == 0
    assert tiling.stages >= 2 and tiling.ring >= 2


def test_as_counted_for_llama():
    """Rank axis of 128, as in the prediction: wide items for a window, narrow ones for rows, B twice where it fits."""
    assert tiling_for(2112, 128, 14336, 2) == Tiling(columns=128, part=64, stages=3, ring=4, b_places=1)
    assert tiling_for(64, 128, 14336, 2) == Tiling(columns=64, part=32, stages=6, ring=4, b_places=2)


def test_every_processor_has_work_at_64_rows():
    tiling = tiling_for(64, 128, 14336, 2)
    assert 14336 // tiling.columns >= PROCESSORS


def test_the_timed_cases_cover_every_cut():
    cuts = set()
    for case in LARGE:
        tiling = tiling_for(sum(count for _, count in case.tiles), 8 * len(case.owner), case.width, 2)
        cuts.add((tiling.columns, tiling.part, tiling.b_places))
    assert cuts == {(128, 64, 1), (128, 64, 2), (64, 32, 2), (32, 32, 1)}
