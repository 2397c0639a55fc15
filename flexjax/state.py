"""State: the few pytrees that live on the device between steps, cut by who writes them. Shapes first, arrays last.

Everything here follows from `Dimensions`; the memory plan, the compiled programs and the allocation all read the same
`jax.ShapeDtypeStruct` trees.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.layout import PAGE_TOKENS, RANK_UNIT
from flexjax.models.config import ModelConfig
from flexjax.models.lora import MODULES, PRODUCTS, ROW_PARALLEL, module_widths
from flexjax.models.matrices import row_shards, rows_behind

TAPE_NAMES = ("x", "q", "attention", "mid", "gate", "up")
"""Named inputs of the decoder's stages, in the order in which a layer makes them; "attention" with its log-sum-exp."""

LSE = "lse"
"""The log-sum-exp where it is a name of the tape. Its column would be almost empty, so that it is one only where the
page of the final hidden state, which uses few of its layers, has no room for the log-sum-exps of all layers."""

KV_COLUMNS = 1
"""Pages that 64 tokens of a finetuning sequence take before its tape: keys and values. Their final hidden state shares
a page with those of other blocks."""


@dataclass(frozen=True)
class TapeLayout:
    """Which named activations a tape keeps and where: each takes whole pages ("columns") per 64 tokens, in every layer.

    Attributes:
        names: a subset of TAPE_NAMES, in that order, with "x"; then LSE, if the tape keeps it.
        widths: values per token of each name (per shard).
        row: values in a row of the page pool (per shard).
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    row: int

    @property
    def columns(self) -> int:
        return sum(self.span(name) for name in self.names)

    def span(self, name: str) -> int:
        """Pages that one name takes per 64 tokens."""
        return -(-self.widths[self.names.index(name)] // self.row)

    def first_column(self, name: str) -> int:
        return sum(self.span(before) for before in self.names[: self.names.index(name)])


@dataclass(frozen=True)
class Dimensions:
    """Every number that decides an array shape.

    Attributes:
        max_rows: seats in the running batch.
        context: longest sequence in tokens, a multiple of 64.
        pages: pages in the pool.
        rank_capacity: length of the flat rank axis of resident adapters, a multiple of 8.
        adapters: adapter indices, 0 (none) included.
        microbatch: slots of the microbatch axis, a multiple of ``window``.
        window: slots of a backward window, a multiple of 64.
        tape: names a tape keeps.
        tp: shards.
        lean_tape: some of these names, which the tape of a microbatch keeps that finds no pages for more; None: such a
            microbatch waits.
    """

    model: ModelConfig
    dtype: Any
    max_rows: int
    context: int
    pages: int
    rank_capacity: int
    adapters: int
    microbatch: int
    window: int
    tape: tuple[str, ...]
    tp: int = 1
    lean_tape: tuple[str, ...] | None = None

    @cached_property
    def lean(self) -> "Dimensions":
        """The same with lean tapes only."""
        return replace(self, tape=self.lean_tape, lean_tape=None)

    @cached_property
    def lean_columns(self) -> tuple[int, ...]:
        """Where the columns of a lean tape stand among those of the other."""
        whole, lean = self.tape_layout, self.lean.tape_layout
        return tuple(whole.first_column(name) + i for name in lean.names for i in range(lean.span(name)))

    @property
    def context_pages(self) -> int:
        return self.context // PAGE_TOKENS

    @property
    def page_row(self) -> int:
        """Values in one row of the pool, whole model: keys and values of one token in one layer."""
        return 2 * self.model.num_kv_heads * self.model.head_dim

    @property
    def tape_layout(self) -> TapeLayout:
        model = self.model
        ff, hidden = model.intermediate_size // self.tp, model.hidden_size // self.tp
        heads = model.num_heads // self.tp * model.head_dim
        widths = dict(x=hidden, q=heads, attention=heads, mid=hidden, gate=ff, up=ff, lse=self.lse_width)
        names = self.tape if self.lse_follows_final or "attention" not in self.tape else (*self.tape, LSE)
        return TapeLayout(names, tuple(widths[n] for n in names), self.page_row // self.tp)

    @property
    def lse_width(self) -> int:
        """Values of a token's log-sum-exp, per layer and shard: float32, which two-byte dtypes keep as two halves."""
        return self.model.num_heads // self.tp * (4 // jnp.dtype(self.dtype).itemsize)

    @property
    def lse_follows_final(self) -> bool:
        """Whether the log-sum-exps of all layers lie behind the final hidden state, on its page."""
        model, layers = self.model, self.model.num_layers
        return model.hidden_size // self.tp + layers * self.lse_width <= layers * self.page_row // self.tp

    @property
    def final_rows(self) -> int:
        """Layers of a page, one row of each, that the final hidden state of a block and what may lie behind it take."""
        behind = self.model.num_layers * self.lse_width if self.lse_follows_final else 0
        return -(-(self.model.hidden_size // self.tp + behind) // (self.page_row // self.tp))

    @property
    def finals_per_page(self) -> int:
        """Blocks of a microbatch whose final hidden states lie on one page."""
        return max(1, self.model.num_layers // self.final_rows)

    @property
    def pages_per_block(self) -> int:
        """Pages that 64 tokens of a finetuning microbatch have for themselves: K/V and tape columns."""
        return KV_COLUMNS + self.tape_layout.columns

    def final_pages(self, blocks: int) -> int:
        """Pages that the final hidden states of so many blocks of a microbatch share."""
        return math.ceil(blocks / self.finals_per_page)

    def microbatch_pages(self, blocks: int) -> int:
        """Pages of a microbatch of so many blocks of 64 tokens."""
        return blocks * self.pages_per_block + self.final_pages(blocks)

    @property
    def page_bytes(self) -> int:
        row_bytes = self.page_row * jnp.dtype(self.dtype).itemsize
        return self.model.num_layers * PAGE_TOKENS * row_bytes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowState:
    """Per row of the running batch, written by `forward`.

    Attributes:
        last_token: [rows] int32, the row's newest token: its next input.
        history: [rows, context] int32, the row's tokens by position; read by the sampling penalties.
    """

    last_token: jax.Array
    history: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterStack:
    """All resident adapter versions, written by `update` and `publish`, in the model's dtype. The modules of a product
    lie side by side, so that one step of low-rank products serves them all.

    Attributes:
        a: product -> [layers, out + modules * R, in], the frozen matrices with A behind them, see
            `flexjax.models.matrices`: the very arrays that the weights hold.
        b: product -> [layers, R, out]. Columns that shards divide are grouped by shard, as the rows of the frozen
            matrices are: [q_0|k_0|v_0|q_1|...].
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gradients:
    """What a job's loss and backward units leave for the next unit and for the update.

    Attributes:
        a: module -> [layers, in, r] float32; b: module -> [layers, r, out] float32: sums since the last update. A
            factor that shards replicate has a leading axis over shards, summed by the update (`summed_over_shards`).
        hidden: [microbatch, d], cotangent of the output of the layer below the one just pulled back.
        d_k: [microbatch, Hkv, D] float32, what later windows left for the keys of the current layer, 0 for windows that
            have been pulled back; d_v the same.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    hidden: jax.Array
    d_k: jax.Array
    d_v: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Master:
    """The float32 adapter under training and its optimizer state, written by `update` only.

    Attributes:
        a: module -> [layers, in, r] float32; b: module -> [layers, r, out] float32.
        optimizer: optax state over {"a": a, "b": b}.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    optimizer: Any


def pool_shape(dims: Dimensions) -> jax.ShapeDtypeStruct:
    """The page pool, [layers, pages, 64, row]."""
    return jax.ShapeDtypeStruct((dims.model.num_layers, dims.pages, PAGE_TOKENS, dims.page_row), dims.dtype)


def row_shapes(dims: Dimensions) -> RowState:
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    return RowState(last_token=integers(dims.max_rows), history=integers(dims.max_rows, dims.context))


def adapter_shapes(dims: Dimensions, rank: int, modules=MODULES, dtype=None) -> dict[str, dict]:
    """{"a": module -> [layers, in, rank], "b": module -> [layers, rank, out]} in ``dtype`` (default: the model's)."""
    widths, layers, dtype = module_widths(dims.model), dims.model.num_layers, dtype or dims.dtype
    shape = lambda *s: jax.ShapeDtypeStruct((layers, *s), dtype)
    return {
        "a": {name: shape(widths[name][0], rank) for name in modules},
        "b": {name: shape(rank, widths[name][1]) for name in modules},
    }


def stack_shapes(dims: Dimensions) -> AdapterStack:
    widths, rank = module_widths(dims.model), dims.rank_capacity
    shape = lambda *s: jax.ShapeDtypeStruct((dims.model.num_layers, *s), dims.dtype)
    outputs = {name: sum(widths[module][1] for module in modules) for name, modules in PRODUCTS.items()}
    rows = {name: outputs[name] + row_shards(name, dims.tp) * rows_behind(name, rank) for name in PRODUCTS}
    return AdapterStack(
        a={name: shape(rows[name], widths[modules[0]][0]) for name, modules in PRODUCTS.items()},
        b={name: shape(rank, outputs[name]) for name in PRODUCTS},
    )


def resident_bytes(dims: Dimensions) -> int:
    """Bytes that the room for resident adapters takes on one device: rows behind the frozen matrices, and B."""
    layers, item = dims.model.num_layers, jnp.dtype(dims.dtype).itemsize
    total = 0
    for name, b in stack_shapes(dims).b.items():
        width = module_widths(dims.model)[PRODUCTS[name][0]][0]
        row_parallel = row_shards(name, dims.tp) < dims.tp
        a = layers * rows_behind(name, dims.rank_capacity) * (width // dims.tp if row_parallel else width)
        total += item * (a + (b.size if row_parallel else b.size // dims.tp))
    return total


def gradient_shapes(dims: Dimensions, rank: int, modules) -> Gradients:
    model = dims.model
    kv = jax.ShapeDtypeStruct((dims.microbatch, model.num_kv_heads, model.head_dim), jnp.float32)
    hidden = jax.ShapeDtypeStruct((dims.microbatch, model.hidden_size), dims.dtype)
    whole = adapter_shapes(dims, rank, modules, jnp.float32)
    split = {
        factor: {
            name: jax.ShapeDtypeStruct((dims.tp, *s.shape), s.dtype) if summed_over_shards(name, factor) else s
            for name, s in shapes.items()
        }
        for factor, shapes in whole.items()
    }
    return Gradients(**split, hidden=hidden, d_k=kv, d_v=kv)


def summed_over_shards(module: str, factor: str) -> bool:
    """Whether shards replicate this factor ("a" or "b"), so that each holds a part of its gradient's sum."""
    return (factor == "b") == (module in ROW_PARALLEL)


def padded_rank(rank: int) -> int:
    """The rank as adapters store it: whole units of the flat rank axis, the surplus zero."""
    return -(-rank // RANK_UNIT) * RANK_UNIT


def nbytes(tree) -> int:
    """Bytes of all arrays (or shapes) in a tree."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
