"""What one warpgroup of the gradient kernel does with its pieces of d_y and of x."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_lora.grad_meeting import CLEARING
from pallas_kernels.grouped_lora.grad_tiling import COLUMNS, ROWS
from pallas_kernels.mosaic import WGMMA, products

ADD = {"reduction_op": "add"}
turned = functools.partial(plgpu.layout_cast, new_layout=plgpu.Layout.WGMMA_TRANSPOSED)


def zeros(*shape: int):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


class Worker:
    """Warpgroup ``worker`` of one of the blocks that have the tokens ``rows``.

    Its pieces are numbered through, those of d_y module by module, then those of x; number i lies in slot i % slots.
    Of every matrix the tile's warpgroups take pieces in turn, each tile beginning at another of its own:

        4 warpgroups, 10 pieces      0 1 2 3 | 0 1 2 3 | 0 1
    """

    def __init__(self, refs, meeting, widths, tiling, *, adding, adds_to_base, interpreted):
        self.refs, self.meeting, self.widths, self.tiling = refs, meeting, widths, tiling
        self.adding, self.interpreted = adding, interpreted
        self.adds, self.adds_to_base = (ADD if adding else {}), (ADD if adds_to_base else {})
        self.tile, self.worker = meeting.tile, lax.axis_index("worker")
        self.target = 0 if adding else self.tile
        self.rank = refs.b.shape[0]
        self.rows = pl.ds(self.tile * tiling.tokens, tiling.tokens)
        self.stride = tiling.shares * tiling.workers
        self.first = meeting.share * tiling.workers + self.worker
        self.starts, self.turns = [jnp.int32(0)], []
        for width in (*widths, refs.x.shape[1]):
            pieces = lax.div(width // COLUMNS - self.first + (self.stride - 1), self.stride)
            self.starts.append(self.starts[-1] + pieces)
            self.turns.append(lax.rem(self.tile, lax.max(pieces, 1)) if tiling.rotates else 0)

    def columns(self, source: int, i):
        """Columns of piece i, which is one of source 0, 1, ... of d_y, or one of x."""
        first = sum(self.widths[:source]) if source < len(self.widths) else 0
        start, end = self.starts[source : source + 2]
        turn = i - start + self.turns[source]
        turn = lax.select(turn < end - start, turn, turn - (end - start))
        return pl.ds(pl.multiple_of(first + (self.first + turn * self.stride) * COLUMNS, COLUMNS), COLUMNS)

    def low(self, module: int):
        """The module's ranks among those of all."""
        return pl.ds(module * self.rank, self.rank)

    def slot(self, i):
        return self.worker, lax.rem(i, self.tiling.slots)

    def load(self, i, earliest: int = 0):
        """Ask for piece i, which is of no source before the earliest, and for its factors, if there is such a piece."""
        refs, at = self.refs, self.slot(i)
        loaded = refs.loaded.at[at[0] * self.tiling.slots + at[1]]
        for source in range(earliest, len(self.widths) + 1):

            @pl.when((i >= self.starts[source]) & (i < self.starts[source + 1]))
            def _copy(source=source):
                columns = self.columns(source, i)
                if source < len(self.widths):
                    plgpu.copy_gmem_to_smem(refs.d_y.at[self.rows, columns], refs.pieces.at[at], loaded)
                    plgpu.copy_gmem_to_smem(refs.b.at[:, columns], self.b_piece(at), loaded)
                else:
                    plgpu.copy_gmem_to_smem(refs.x.at[self.rows, columns], refs.pieces.at[at], loaded)
                    plgpu.copy_gmem_to_smem(refs.a.at[columns], refs.a_pieces.at[at], loaded)

    def b_piece(self, at):
        return self.refs.b_pieces.at[*at, pl.ds(0, self.rank)]

    def arrived(self, i):
        """Wait for piece i: (the piece, its slot)."""
        worker, slot = self.slot(i)
        plgpu.barrier_wait(self.refs.loaded.at[worker * self.tiling.slots + slot])
        return self.refs.pieces.at[worker, slot], (worker, slot)

    def clear(self):
        """In the first blocks: begin to write zeros where all will add."""
        if not self.adding:
            return

        @pl.when(self.meeting.block < CLEARING)
        def _clear():
            refs, warpgroups = self.refs, self.meeting.warpgroups[1]
            first = self.meeting.block * self.tiling.workers + self.worker
            d_a, d_b = refs.tiles.at[self.worker, 0], refs.d_b_tiles.at[self.worker, 0]
            d_a[...], d_b.T[...] = zeros(*d_a.shape), turned(zeros(COLUMNS, self.rank))
            plgpu.commit_smem()
            for tile, whole, axis in ((d_a, refs.d_a_sum.at[0], 0), (d_b, refs.d_b_sum.at[0], 1)):

                def write(i, carry, tile=tile, whole=whole, axis=axis):
                    columns = pl.ds(pl.multiple_of((first + i * warpgroups) * COLUMNS, COLUMNS), COLUMNS)
                    plgpu.copy_smem_to_gmem(tile, whole.at[(slice(None),) * axis + (columns,)])
                    return carry

                pieces = lax.div(whole.shape[axis] // COLUMNS - first + (warpgroups - 1), warpgroups)
                lax.fori_loop(0, pieces, write, None)

    def tell_cleared(self):
        """In the first blocks: wait until the zeros are written, and tell the others."""
        if not self.adding:
            return

        @pl.when(self.meeting.block < CLEARING)
        def _tell():
            plgpu.wait_smem_to_gmem(0)
            self.meeting.tell_cleared()

    def turn_h(self):
        """Fetch the tile's h and lay it out with tokens along its rows."""
        refs = self.refs

        def fetch(block, own):
            rows = pl.ds(self.tile * self.tiling.tokens + block * ROWS, ROWS)
            h = plgpu.load(refs.h.at[rows], layout=WGMMA, optimized=False)
            refs.low_turned.at[:, own].T[...] = turned(h)

        self.for_own_blocks(fetch)
        self.meet()

    def from_d_y(self, module: int):
        """All own pieces of one module's d_y: the tile's share of d_b, and a term of its d_h (unscaled)."""
        refs, staged = self.refs, self.tiling.staged
        h_turned = refs.low_turned.at[self.low(module)]

        def step(i, term):
            piece, at = self.arrived(i)
            sums = refs.d_b_tiles.at[self.worker, lax.rem(i, staged)]
            both = (term, piece, self.b_piece(at).T), (None, piece.T, h_turned.T)
            term, d_b = products(both, interpreted=self.interpreted)
            self.load(i + self.tiling.slots, module)
            plgpu.wait_smem_to_gmem(staged - 1, wait_read_only=True)
            sums.T[...] = turned(d_b)
            plgpu.commit_smem()
            if self.adding:
                pl.when(i == 0)(self.meeting.await_cleared)
            plgpu.copy_smem_to_gmem(sums, refs.d_b_sum.at[self.target, :, self.columns(module, i)], **self.adds)
            return term

        nothing = zeros(self.tiling.tokens, self.rank)
        return lax.fori_loop(self.starts[module], self.starts[module + 1], step, nothing)

    def from_x(self):
        """All own pieces of x: the tile's share of d_a, and d_x in the place of x."""
        refs, staged = self.refs, self.tiling.staged
        start, end = self.starts[-2:]

        def step(i, carry):
            piece, at = self.arrived(i)
            sums, columns = refs.tiles.at[self.worker, lax.rem(i - start, staged)], self.columns(len(self.widths), i)
            both = (None, piece.T, refs.low_turned.T), (None, refs.d_h, refs.a_pieces.at[at].T)
            d_a, d_x = products(both, interpreted=self.interpreted)
            self._wait_and_refill(i, start)
            sums[...] = d_a
            piece[...] = d_x.astype(refs.pieces.dtype)
            plgpu.commit_smem()
            if self.adding:
                pl.when(i == 0)(self.meeting.await_cleared)
            plgpu.copy_smem_to_gmem(sums, refs.d_a_sum.at[self.target, columns], **self.adds)
            plgpu.copy_smem_to_gmem(piece, refs.d_x.at[self.rows, columns], **self.adds_to_base)
            return carry

        lax.fori_loop(start, end, step, None)

    def _wait_and_refill(self, i, start):
        """Wait until the two copies of step i - staged have left shared memory, and use the slot of its piece."""
        staged = self.tiling.staged
        plgpu.wait_smem_to_gmem(2 * (staged - 1), wait_read_only=True)

        @pl.when(i - start >= staged)
        def _refill():
            self.load(i - staged + self.tiling.slots, len(self.widths))

    def for_own_blocks(self, act):
        """Call ``act(block, rows)`` for the blocks of 64 rows of the tile that are this warpgroup's."""
        for block in range(self.tiling.tokens // ROWS):

            @pl.when(self.worker == block % self.tiling.workers)
            def _act(block=block):
                act(block, pl.ds(block * ROWS, ROWS))

    def meet(self):
        """Until all warpgroups of the block are here, and see what each wrote into shared memory."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.refs.met)
        plgpu.barrier_wait(self.refs.met)
