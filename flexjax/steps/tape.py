"""The tape: saved activations of a finetuning microbatch, kept as rows of the page pool, written by 64-token tiles."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from flexjax.layout import PAGE_TOKENS
from flexjax.models.sharding import gathered_columns, own_columns
from flexjax.state import TapeLayout
from pallas_kernels import Pages

GATE_UP = "gate_up"
"""Gate and up where both fill whole pages, side by side as their product leaves them; gate alone if up is not kept."""

COPIED = 8
"""Values are written in multiples of this many columns: a GPU's copy engine moves 16 bytes at least."""


def from_rows(rows: jax.Array, width: int) -> jax.Array:
    """Pages of tiles, [tiles, columns, 64, row] -> [tiles * 64, width]."""
    tiles, columns, tokens, row = rows.shape
    return rows.swapaxes(1, 2).reshape(tiles * tokens, columns * row)[:, :width]


def read(pool, layer, pages, width: int) -> jax.Array:
    """pages [tiles, columns] -> [tiles * 64, width]; zeros where a page is negative, so that no old number gets in."""
    rows = pool[layer, jnp.maximum(pages, 0)]
    return from_rows(jnp.where(pages[..., None, None] < 0, 0, rows), width)


def write_tables(tape: TapeLayout, pages: jax.Array, width: int, row: int) -> dict[str, jax.Array]:
    """Pages of everything that a tape keeps, [tiles, its columns]. They are the same in every layer: taken apart inside
    the loop over layers, each would be a kernel of its own there.

    Args:
        pages: [tiles, columns]; width: of gate and of up; row: values in a row of a page.
    """
    tables = {name: columns_of(tape, pages, name, tape.span(name)) for name in tape.names}
    if width % row == 0 and not {"gate", "up"}.isdisjoint(tables):
        names = ("gate", "up") if "up" in tables else ("gate",)
        spans = [columns_of(tape, pages, name, width // row) for name in names]
        tables[GATE_UP] = jnp.concatenate(spans, axis=1)
    return tables


def parts(
    tables: Mapping[str, jax.Array], values: Mapping[str, jax.Array], *, first_row: int, row: int, tp: int
) -> list[Pages]:
    """What the tape keeps of the values, each [first_row + tiles * 64, its width], for `write_parts`.

    Args:
        tables: of `write_tables`; row: values in a row of a page.
    """
    kept = {name: padded(local_part(value, name, tp), row) for name, value in values.items() if name in tables}
    return [Pages(value, tables[name], first_row) for name, value in kept.items()]


def gate_up_parts(tables: Mapping[str, jax.Array], gate_up: jax.Array, width: int, **options) -> list[Pages]:
    """What it keeps of gate and of up; ``options`` as for `parts`.

    Args:
        gate_up: [first_row + tiles * 64, at least 2 * width], gate and up side by side and whatever lies behind them.
            Where both fill whole pages they are written as they lie, so that no slice is made of them.
    """
    if GATE_UP in tables:
        columns = tables[GATE_UP].shape[1] * options["row"]
        return [Pages(gate_up, tables[GATE_UP], options["first_row"], columns)]
    return parts(tables, dict(gate=gate_up[:, :width], up=gate_up[:, width : 2 * width]), **options)


def gated_tiles(tape: TapeLayout, pages: jax.Array, rows: int) -> jax.Array | None:
    """Whether the tape keeps gate and whether it keeps up: [tiles, 2] int32, 1 if it does, of every 64 slots of a step,
    counted from its last one. None if it keeps neither of any.

    Args:
        pages: [tiles of the chunk part, columns]; rows: slots before those.
    """
    names = "gate", "up"
    if set(names).isdisjoint(tape.names):
        return None
    kept = jnp.concatenate([columns_of(tape, pages, name, 1) >= 0 for name in names], axis=1)
    return jnp.pad(kept.astype(jnp.int32), ((-(-rows // PAGE_TOKENS), 0), (0, 0)))


def padded(value: jax.Array, row: int) -> jax.Array:
    return jnp.pad(value, ((0, 0), (0, -value.shape[1] % math.gcd(COPIED, row))))


def columns_of(tape: TapeLayout, pages: jax.Array, name: str, columns: int) -> jax.Array:
    """Pages of one name, [tiles, its columns]; -1, where nothing is written, if the tape does not keep it."""
    if name not in tape.names:
        return jnp.full((len(pages), columns), -1, jnp.int32)
    first = tape.first_column(name)
    return pages[:, first : first + columns]


def read_named(pool, layer, tape: TapeLayout, pages, *, tp: int) -> dict[str, jax.Array]:
    """Every value that the tape keeps, flat: name -> [tiles * 64, width]."""
    values = {}
    for name, width in zip(tape.names, tape.widths, strict=True):
        local = read(pool, layer, columns_of(tape, pages, name, tape.span(name)), width)
        values[name] = whole(local, name, tp)
    return values


REPLICATED = frozenset({"x", "mid"})
"""Names that every shard computes whole; each shard keeps its share of the columns."""


def local_part(value: jax.Array, name: str, tp: int) -> jax.Array:
    return own_columns(value, tp) if tp > 1 and name in REPLICATED else value


def whole(value: jax.Array, name: str, tp: int) -> jax.Array:
    return gathered_columns(value) if tp > 1 and name in REPLICATED else value


def pack_lse(lse: jax.Array, dtype) -> jax.Array:
    """lse [layers, T, H] float32 -> [T, layers * n], layer by layer. In two-byte dtypes a log-sum-exp is kept as a sum
    of two halves (an error of 2^-17 of its value), never as raw bits, which could read as NaN."""
    high = lse.astype(dtype)
    low = (lse - high.astype(jnp.float32)).astype(dtype)
    halves = [high] if high.dtype.itemsize == 4 else [high, low]
    return jnp.concatenate(halves, axis=-1).swapaxes(0, 1).reshape(lse.shape[1], -1)


def unpack_lse(value: jax.Array, heads: int) -> jax.Array:
    """One layer's part of what `pack_lse` made: [T, n] -> [T, H] float32."""
    return sum(half.astype(jnp.float32) for half in jnp.split(value, value.shape[-1] // heads, axis=-1))
