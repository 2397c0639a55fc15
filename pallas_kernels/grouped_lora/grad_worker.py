"""What one warpgroup of the gradient kernel does: its pieces of d_y, the exchange with the others, its pieces of x."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_lora.grad_tiling import COLUMNS, ROWS
from pallas_kernels.mosaic import WGMMA, fence, product

ADD = {"reduction_op": "add"}
turned = functools.partial(plgpu.layout_cast, new_layout=plgpu.Layout.WGMMA_TRANSPOSED)


class Worker:
    """Warpgroup ``worker`` of block ``share`` of the cluster that has the tokens ``rows``.

    Its pieces are numbered through, those of d_y module by module, then those of x; number i lies in slot i % slots.
    Of every matrix the cluster's warpgroups take pieces in turn:

        4 warpgroups, 10 pieces      0 1 2 3 | 0 1 2 3 | 0 1
    """

    def __init__(self, refs, widths, tiling, *, adding, adds_to_base, interpreted):
        self.refs, self.widths, self.tiling, self.interpreted = refs, widths, tiling, interpreted
        self.adds, self.adds_to_base = (ADD if adding else {}), (ADD if adds_to_base else {})
        self.tile, self.share, self.worker = (lax.axis_index(name) for name in ("tile", "share", "worker"))
        self.target = 0 if adding else self.tile
        self.rows = pl.ds(self.tile * tiling.tokens, tiling.tokens)
        self.stride = tiling.shares * tiling.workers
        self.first = self.share * tiling.workers + self.worker
        self.starts = [jnp.int32(0)]
        for width in (*widths, refs.x.shape[1]):
            pieces = lax.div(width // COLUMNS - self.first + (self.stride - 1), self.stride)
            self.starts.append(self.starts[-1] + pieces)

    def columns(self, source: int, i):
        """Columns of piece i, which is one of source 0, 1, ... of d_y, or one of x."""
        first = sum(self.widths[:source]) if source < len(self.widths) else 0
        return pl.ds(first + (self.first + (i - self.starts[source]) * self.stride) * COLUMNS, COLUMNS)

    def slot(self, i):
        return self.worker, lax.rem(i, self.tiling.slots)

    def load(self, i):
        """Ask for piece i and the factors that belong to it, if there is such a piece."""
        refs, at = self.refs, self.slot(i)
        loaded = refs.loaded.at[at[0] * self.tiling.slots + at[1]]
        for source in range(len(self.widths) + 1):

            @pl.when((i >= self.starts[source]) & (i < self.starts[source + 1]))
            def _copy(source=source):
                columns = self.columns(source, i)
                if source < len(self.widths):
                    plgpu.copy_gmem_to_smem(refs.d_y.at[self.rows, columns], refs.pieces.at[at], loaded)
                    plgpu.copy_gmem_to_smem(refs.b.at[:, columns], refs.b_pieces.at[at], loaded)
                else:
                    plgpu.copy_gmem_to_smem(refs.x.at[self.rows, columns], refs.pieces.at[at], loaded)
                    plgpu.copy_gmem_to_smem(refs.a.at[:, columns], refs.a_pieces.at[at], loaded)

    def arrived(self, i):
        """Wait for piece i: (the piece, its slot)."""
        worker, slot = self.slot(i)
        plgpu.barrier_wait(self.refs.loaded.at[worker * self.tiling.slots + slot])
        return self.refs.pieces.at[worker, slot], (worker, slot)

    def turn_h(self):
        """Fetch the tile's h and lay it out with tokens along its rows."""
        refs = self.refs

        def fetch(block, own):
            rows = pl.ds(self.tile * self.tiling.tokens + block * ROWS, ROWS)
            for module in range(len(self.widths)):
                h = plgpu.load(refs.h.at[rows, module], layout=WGMMA, optimized=False)
                refs.h_turned.at[module, :, own].T[...] = turned(h)

        self.for_own_blocks(fetch)
        self.meet()

    def from_d_y(self, module: int):
        """All own pieces of one module's d_y: the tile's share of d_b, and a term of its d_h (unscaled)."""
        refs, staged = self.refs, self.tiling.staged

        def step(i, term):
            piece, at = self.arrived(i)
            sums = refs.d_b_tiles.at[self.worker, lax.rem(i, staged)]
            term = product(term, piece, refs.b_pieces.at[at].T, interpreted=self.interpreted)
            d_b = product(None, piece.T, refs.h_turned.at[module].T, interpreted=self.interpreted)
            self.load(i + self.tiling.slots)
            plgpu.wait_smem_to_gmem(staged - 1, wait_read_only=True)
            sums.T[...] = turned(d_b)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums, refs.d_b_sum.at[self.target, :, self.columns(module, i)], **self.adds)
            return term

        zeros = jnp.zeros((self.tiling.tokens, refs.b.shape[0]), jnp.float32)
        return lax.fori_loop(self.starts[module], self.starts[module + 1], step, plgpu.layout_cast(zeros, WGMMA))

    def exchange(self, terms):
        """Add up the terms of d_h [tokens, rank] of every module over the cluster; scale, round and keep the sum."""
        refs, modules = self.refs, range(len(self.widths))
        for block in range(self.tiling.tokens // ROWS):
            for module in modules:
                refs.tiles[self.worker, block, module] = terms[module][block * ROWS : (block + 1) * ROWS]
        self.meet()
        self.for_own_blocks(self._send)
        self._fence()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # so that no thread signals before all have written
        plgpu.barrier_arrive(refs.exchanged)
        plgpu.barrier_wait(refs.exchanged)
        self._fence()
        self.for_own_blocks(self._receive)
        self.meet()

    def _send(self, block, own):
        """The block's sum over its warpgroups, for all blocks of the cluster to read. Written by the threads, not by
        the copy engine: of their own writes a fence makes sure that the others see them."""
        refs = self.refs
        for module in range(len(self.widths)):
            of = lambda worker, module=module: plgpu.load(refs.tiles.at[worker, block, module], layout=WGMMA)
            refs.terms[self.tile, self.share, module, own] = sum(map(of, range(1, self.tiling.workers)), of(0))

    def _fence(self):
        if not self.interpreted:
            fence()

    def _receive(self, block, own):
        refs = self.refs
        for module in range(len(self.widths)):
            of = lambda share, module=module: plgpu.load(
                refs.terms.at[self.tile, share, module, own], layout=WGMMA, optimized=False
            )
            total = sum(map(of, range(1, self.tiling.shares)), of(0))
            d_h = (total * refs.scale[0]).astype(refs.d_h.dtype)
            refs.d_h[module, own] = d_h
            refs.d_h_turned.at[module, :, own].T[...] = turned(d_h)

    def from_x(self):
        """All own pieces of x: the tile's share of d_a, and d_x in the place of x."""
        refs, staged, modules = self.refs, self.tiling.staged, range(len(self.widths))
        start, end = self.starts[-2:]

        def step(i, carry):
            piece, at = self.arrived(i)
            sums, columns = refs.tiles.at[self.worker, lax.rem(i - start, staged)], self.columns(len(self.widths), i)
            d_a = [
                product(None, piece.T, refs.d_h_turned.at[module].T, interpreted=self.interpreted) for module in modules
            ]
            d_x = sum_of_products(
                [(refs.d_h.at[module], refs.a_pieces.at[*at, module].T) for module in modules],
                interpreted=self.interpreted,
            )
            self._wait_and_refill(i, start)
            for module in modules:
                sums[module] = d_a[module]
            piece[...] = d_x.astype(refs.pieces.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums, refs.d_a_sum.at[self.target, :, columns], **self.adds)
            plgpu.copy_smem_to_gmem(piece, refs.d_x.at[self.rows, columns], **self.adds_to_base)
            return carry

        lax.fori_loop(start, end, step, None)

    def _wait_and_refill(self, i, start):
        """Wait until the two copies of step i - staged have left shared memory, and use the slot of its piece."""
        staged = self.tiling.staged
        plgpu.wait_smem_to_gmem(2 * (staged - 1), wait_read_only=True)

        @pl.when(i - start >= staged)
        def _refill():
            self.load(i - staged + self.tiling.slots)

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


def sum_of_products(pairs, *, interpreted):
    """The sum over pairs of shared-memory matrices (a [m, k], b [k, n]) of a b, in float32."""
    if interpreted:
        return sum(product(None, a, b, interpreted=True) for a, b in pairs)

    def one_after_another(sums):
        for a, b in pairs:
            plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(one_after_another, plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32))
