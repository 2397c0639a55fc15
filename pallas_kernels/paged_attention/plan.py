"""Who computes what in a decode step: the blocks of all rows and K/V heads, cut into equal shares.

The units of work are (row, K/V head, block of keys), counted in this order. Every worker takes a contiguous range of
units, so it meets a few pieces: (row, head) pairs, whole but for the first and the last. A pair that several workers
share is a chain: begun by one worker, continued by the next ones. For 3 workers and 2 heads of rows of 3 and 2 blocks:

    row 0, head 0 | row 0, head 1 | row 1, head 0 | row 1, head 1
        0  0  0   |    0 . 1  1   |    1 . 2      |    2  2
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.tiling import KEYS


class Plan(NamedTuple):
    """int32 arrays; all of them the same for every layer of a step.

    Attributes:
        contexts: [rows] keys that a row attends to; 0 for an inactive row.
        active: [rows, 2] row and context, the active rows first, in order.
        work: [workers, 5] place in ``active``, K/V head and block of the first unit; units; pieces.
        chains: [workers, 5] row and K/V head of the first piece, then three places among the workers that have units:
            of the worker itself, of the one that begins the chain which ends with the first piece (the worker itself
            where none does), of the one that ends the chain of the last piece.
    """

    contexts: jax.Array
    active: jax.Array
    work: jax.Array
    chains: jax.Array


def plan_decode(positions, lengths, *, kv_heads: int, workers: int) -> Plan:
    """Plan for rows at these positions, [rows] int32, with 0 or 1 queries each, [rows] int32.

    The shares differ by at most one unit. Where there are fewer units than workers, those with a unit stand apart.
    """
    contexts = jnp.where(lengths > 0, positions + lengths, 0).astype(jnp.int32)
    blocks = lax.div(contexts + (KEYS - 1), KEYS)
    ends = jnp.cumsum(blocks * kv_heads)
    starts = ends - blocks * kv_heads
    rank = jnp.cumsum(blocks > 0) - 1
    share, rest = lax.div(ends[-1], workers), lax.rem(ends[-1], workers)
    worker = jnp.arange(workers + 1)
    bounds = worker * share + lax.div(worker * rest, workers)
    worker, first, last = worker[:-1], bounds[:-1], bounds[1:] - 1
    place_of = lambda unit: jnp.where(share > 0, jnp.sum(bounds[1:] <= unit[:, None], axis=1), unit)

    def locate(unit):
        """Of units [n]: row, head, block, and the first and last unit of their row and head."""
        row = jnp.minimum(jnp.sum(ends <= unit[:, None], axis=1), len(ends) - 1)
        width = jnp.maximum(blocks[row], 1)
        head, block = lax.div(unit - starts[row], width), lax.rem(unit - starts[row], width)
        return row, head, block, unit - block, unit - block + width - 1

    row, head, block, begin, end = locate(first)
    last_row, last_head, _, _, last_end = locate(jnp.maximum(last, 0))
    units = last - first + 1
    pieces = jnp.where(units > 0, (rank[last_row] - rank[row]) * kv_heads + last_head - head + 1, 0)
    place = place_of(first)
    begins = jnp.where((units > 0) & (end <= last), place_of(begin), place)
    completes = jnp.where(units > 0, place_of(last_end), place)
    order = jnp.nonzero(blocks, size=len(blocks), fill_value=0)[0]
    columns = lambda *arrays: jnp.stack(arrays, axis=1).astype(jnp.int32)
    return Plan(
        contexts=contexts,
        active=columns(order, contexts[order]),
        work=columns(rank[row], head, block, units, pieces),
        chains=columns(row, head, place, begins, completes),
    )


class Piece(NamedTuple):
    """What one worker computes of one row and K/V head: int32 scalars.

    Attributes:
        context: keys of the row.
        block, blocks: first block of keys and how many.
        begins, whole: bool; whether the piece has the first block, and whether it has all.
    """

    row: jax.Array
    head: jax.Array
    context: jax.Array
    block: jax.Array
    blocks: jax.Array
    begins: jax.Array
    whole: jax.Array


def for_each_piece(plan: Plan, worker, kv_heads: int, run, start):
    """Folds ``run(piece, carry)`` over the pieces of a worker; ``plan`` holds refs."""

    def turn(_, carry):
        place, head, block, left, folded = carry
        row, context = plan.active[place, 0], plan.active[place, 1]
        all_blocks = lax.div(context + (KEYS - 1), KEYS)
        blocks = lax.min(all_blocks - block, left)
        piece = Piece(row, head, context, block, blocks, block == 0, blocks == all_blocks)
        folded = run(piece, folded)
        next_head = lax.rem(head + 1, kv_heads)
        next_place = place + (next_head == 0).astype(jnp.int32)
        return next_place, next_head, jnp.int32(0), left - blocks, folded

    first = tuple(plan.work[worker, field] for field in range(4))
    return lax.fori_loop(0, plan.work[worker, 4], turn, (*first, start))[-1]
