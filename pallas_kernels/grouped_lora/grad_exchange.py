"""The cotangent of ``h = scale * x a`` of a tile, from the terms that its warpgroups found in their columns of d_y.

A block adds up what its warpgroups have, and leaves that in memory. Then either every block adds up what all have left,
or, where that is much to read, each does so for some rows, leaves those, and reads the rest from the others:

    4 blocks       rows 0 .. 31 | 32 .. 63 | 64 .. 95 | 96 .. 127     of the sums of blocks 0, 1, 2, 3, in this order
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_lora.grad_tiling import ROWS
from pallas_kernels.grouped_lora.grad_worker import Worker, turned
from pallas_kernels.mosaic import WGMMA


def exchange(worker: Worker, terms):
    """Fill ``d_h`` and ``low_turned`` with the sum of the terms [tokens, rank] of every module, scaled and rounded."""
    _leave(worker, terms)
    worker.meeting.of_tile(1)
    if worker.tiling.shares_rows:
        pl.when(worker.worker == 0)(lambda: _sum_own_rows(worker))
        worker.meeting.of_tile(2)
    worker.for_own_blocks(lambda block, own: _receive(worker, own))
    worker.meet()


def _leave(worker, terms):
    """Written by the threads, not by the copy engine: their own writes are what a semaphore makes others see."""
    refs, tiling = worker.refs, worker.tiling
    for block in range(tiling.tokens // ROWS):
        for module, term in enumerate(terms):
            refs.tiles[worker.worker, block, :, worker.low(module)] = term[block * ROWS : (block + 1) * ROWS]
    worker.meet()

    def send(block, own):
        of = lambda warpgroup: plgpu.load(refs.tiles.at[warpgroup, block], layout=WGMMA)
        refs.terms[worker.tile, worker.meeting.share, own] = sum(map(of, range(1, tiling.workers)), of(0))

    worker.for_own_blocks(send)


def _sum_own_rows(worker):
    """In memory again: the d_h of this block's share of the tile's rows."""
    refs = worker.refs
    count = worker.tiling.tokens // worker.tiling.shares
    rows = pl.ds(worker.meeting.share * count, count)
    refs.d_h_rows[worker.tile, rows] = _summed(worker, rows)


def _receive(worker, own):
    refs = worker.refs
    if worker.tiling.shares_rows:
        d_h = plgpu.load(refs.d_h_rows.at[worker.tile, own], layout=WGMMA, optimized=False)
    else:
        d_h = _summed(worker, own, layout=WGMMA)
    refs.d_h[own] = d_h
    refs.low_turned.at[:, own].T[...] = turned(d_h)


def _summed(worker, rows, **options):
    """Rows of d_h, from what all blocks of the tile have left."""
    refs = worker.refs
    of = lambda share: plgpu.load(refs.terms.at[worker.tile, share, rows], optimized=False, **options)
    total = sum(map(of, range(1, worker.tiling.shares)), of(0))
    return (total * refs.scale[0]).astype(refs.d_h.dtype)
