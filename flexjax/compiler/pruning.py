"""PruningTable: which named values of a layer its adapters' gradients need, and what each costs to keep or recompute.

Derived from the layer's own jaxpr. The base weights are frozen, so nothing that only their gradients would read is
needed; in the lowest adapted layer the cotangent of the layer's input is not wanted either, and what only it would
read goes too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from math import ceil

import jax.numpy as jnp

from flexjax.compiler.layer_graph import NAMES, LayerGraph, layer_graph
from flexjax.fields import ConfigError
from flexjax.models.config import ModelConfig
from flexjax.models.lora import MODULES

STAGE_OUTPUTS = (("q",), ("attention",), ("mid",), ("gate", "up"))
"""What each recomputing stage makes, first stage first. The stage of q makes k and v too, but pages hold those."""


@dataclass(frozen=True)
class Recompute:
    """One run of a stage for some of its outputs.

    Attributes:
        inputs: names it reads, k and v in pages not counted.
        flops: per token, of the matrix products and attention.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    flops: int


@dataclass(frozen=True)
class NameCost:
    """What keeping one name costs, per token and layer, all shards together.

    Attributes:
        bytes: of the values themselves.
        columns: pages per 64 tokens that they take (a name takes whole pages).
    """

    name: str
    needed: bool
    bytes: int
    columns: int


@dataclass(frozen=True)
class PruningTable:
    """The analysis of one kind of layer; ``str()`` prints it.

    Attributes:
        modules: the adapted modules.
        lowest: nothing below needs the cotangent of the layer's input.
        costs: one entry per name, in the order of NAMES.
        recomputes: every stage for every set of its outputs.
        column_bytes: of one row of a page, per token and layer, all shards together.
        autodiff_bytes: what `jax.vjp` of the layer keeps per token, attention as one kernel.
    """

    modules: tuple[str, ...]
    lowest: bool
    costs: tuple[NameCost, ...]
    recomputes: tuple[Recompute, ...]
    column_bytes: int
    autodiff_bytes: int

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(cost.name for cost in self.costs if cost.needed)

    @property
    def pruned_bytes(self) -> int:
        """Bytes per token of the needed names, page granularity not counted."""
        return sum(cost.bytes for cost in self.costs if cost.needed)

    def columns(self, names: Iterable[str]) -> int:
        """Pages per 64 tokens that keeping these names takes."""
        kept = set(names)
        return sum(cost.columns for cost in self.costs if cost.name in kept)

    def recompute_flops(self, kept: Iterable[str]) -> int:
        """FLOPs per token to make every needed name that is not kept, each stage run at most once."""
        kept = set(kept)
        wanted, total = set(self.needed) - kept, 0
        for outputs in reversed(STAGE_OUTPUTS):
            missing = tuple(name for name in outputs if name in wanted)
            if missing:
                run = self.recompute(missing)
                wanted |= set(run.inputs) - kept
                total += run.flops
        assert "x" not in wanted, "a plan without the layer's input, from which the rest follows"
        return total

    def recompute(self, outputs: tuple[str, ...]) -> Recompute:
        return next(run for run in self.recomputes if run.outputs == outputs)

    def __str__(self) -> str:
        kind = "lowest adapted layer" if self.lowest else "layer above the lowest adapted one"
        title = f"{kind}, adapters on {', '.join(self.modules)}; per token and layer:"
        header = f"{'name':<10} {'needed':<7} {'bytes':>8} {'pages/64':>9} {'recompute MFLOP':>16}  from"
        return "\n".join([title, header, *map(self._row, self.costs), *self._totals()])

    def _row(self, cost: NameCost) -> str:
        keep = f"{cost.name:<10} {'yes' if cost.needed else 'no':<7} {cost.bytes:>8,} {cost.columns:>9}"
        if cost.name == "x":
            return f"{keep} {'-':>16}  always kept"
        run = self.recompute((cost.name,))
        return f"{keep} {run.flops / 1e6:>16,.2f}  {', '.join(run.inputs)}"

    def _totals(self) -> list[str]:
        in_pages = self.columns(self.needed) * self.column_bytes
        totals = {"plain autodiff": self.autodiff_bytes, "needed": self.pruned_bytes, "needed, whole pages": in_pages}
        share = lambda size: f"{100 * size / self.autodiff_bytes:>6.1f} %"
        lines = [f"{label:<20} {size:>10,} bytes {share(size)}" for label, size in totals.items()]
        return [*lines, "k and v, in pages of their own, and the weights are not counted as needed"]


def pruning_table(
    config: ModelConfig,
    modules: Sequence[str],
    dtype,
    *,
    lowest: bool,
    tp: int = 1,
    rank: int = 16,
    mean_context: int = 2048,
) -> PruningTable:
    """The table of one kind of layer.

    Args:
        modules: adapted modules, in any order.
        lowest: the layer is the lowest adapted one.
        tp: shards; decides how values divide into pages.
        rank: columns of each adapter.
        mean_context: keys that a query attends to, on average; prices the recomputation of attention.

    Raises:
        ConfigError: no module, an unknown one, or sizes that do not divide over the shards.
    """
    modules = checked_modules(modules)
    graph = layer_graph(config, modules, dtype, rank, mean_context)
    outputs = frozenset({"d_params"} if lowest else {"d_params", "d_x"})
    needed = set(graph.pull_back().reduced(outputs).inputs)
    item, widths = jnp.dtype(dtype).itemsize, name_widths(config, tp)
    row = config.num_kv_heads * 2 * config.head_dim // tp
    columns = {name: ceil(width / row) for name, width in widths.items()}
    columns["attention"] += not lse_finds_room(config, item, row, tp)
    return PruningTable(
        modules=modules,
        lowest=lowest,
        costs=tuple(NameCost(n, n in needed, widths[n] * tp * item, columns[n]) for n in NAMES),
        recomputes=tuple(chain.from_iterable(stage_runs(graph, outputs) for outputs in STAGE_OUTPUTS)),
        column_bytes=row * tp * item,
        autodiff_bytes=graph.autodiff_bytes_per_token(),
    )


def checked_modules(modules: Sequence[str]) -> tuple[str, ...]:
    """In the order of MODULES. Raises ConfigError for an empty list and for unknown names."""
    unknown = sorted(set(modules) - set(MODULES))
    if unknown or not modules:
        fault = f"has {', '.join(unknown)}" if unknown else "is empty"
        raise ConfigError(f"target_modules {fault}; it needs one or more of {', '.join(MODULES)}")
    return tuple(name for name in MODULES if name in modules)


def name_widths(config: ModelConfig, tp: int) -> dict[str, int]:
    """Values per token and shard of every name; the log-sum-exp is not counted."""
    divided = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_size": config.hidden_size,
    }
    for size, value in divided.items():
        if value % tp:
            raise ConfigError(f"{size} is {value}, which tp = {tp} does not divide; lower tp")
    d, ff, q = config.hidden_size // tp, config.intermediate_size // tp, config.num_heads // tp * config.head_dim
    return {"x": d, "q": q, "attention": q, "mid": d, "gate": ff, "up": ff}


def lse_finds_room(config: ModelConfig, item: int, row: int, tp: int) -> bool:
    """Whether the float32 log-sum-exps of all layers fit on the page that the final hidden state takes anyway.
    Otherwise they have a column of their own."""
    used = config.hidden_size // tp + config.num_layers * config.num_heads // tp * (4 // item)
    return used <= config.num_layers * row


def stage_runs(layer: LayerGraph, outputs: tuple[str, ...]) -> list[Recompute]:
    """A stage's cost for every set of its outputs."""
    sets = chain.from_iterable(combinations(outputs, size) for size in range(1, len(outputs) + 1))
    reduced = {names: layer.stage(names) for names in sets}
    read = lambda graph: tuple(name for name in NAMES if name in graph.inputs)
    return [Recompute(names, read(graph), graph.flops_per_token) for names, graph in reduced.items()]
