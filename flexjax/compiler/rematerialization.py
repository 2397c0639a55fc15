"""TapePlan: which names the tape keeps, so that recomputing the rest takes least under a byte budget.

One page spans all layers, so every layer has the same number of tape columns and one set of names serves them all:
keeping a name in one layer alone would free nothing. Layers below the lowest adapted one have no backward unit; their
part of the tape's pages is unused.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

from flexjax.compiler.layer_graph import NAMES
from flexjax.compiler.pruning import PruningTable, pruning_table
from flexjax.fields import ConfigError
from flexjax.models.config import ModelConfig


@dataclass(frozen=True)
class BackwardWork:
    """What a microbatch's backward pass consists of, for choosing a plan.

    Attributes:
        interior: table of the layers above the lowest adapted one; lowest: of that one.
        num_layers: of the model.
        lowest_layer: index of the lowest adapted layer.
        lowest_program: the lowest adapted layer has a backward program of its own, without the input's cotangent.
            Otherwise one program serves every layer and the lowest costs what the others do.
    """

    interior: PruningTable
    lowest: PruningTable
    num_layers: int
    lowest_layer: int = 0
    lowest_program: bool = False

    def __post_init__(self):
        if not 0 <= self.lowest_layer < self.num_layers:
            raise ValueError(f"the lowest adapted layer is {self.lowest_layer}; the model has {self.num_layers} layers")

    def recompute_flops(self, kept: Iterable[str]) -> int:
        """FLOPs per finetuning token, over all layers."""
        kept, above = set(kept), self.num_layers - self.lowest_layer - 1
        last = self.lowest if self.lowest_program else self.interior
        return above * self.interior.recompute_flops(kept) + last.recompute_flops(kept)


@dataclass(frozen=True)
class TapePlan:
    """A choice of names for the tape.

    Attributes:
        names: what the tape keeps in every layer, in the order in which a layer makes them; always with "x".
        columns: pages per 64 tokens.
        bytes_per_token: of those pages, all layers and shards together.
        recompute_flops_per_token: to make the other names again, over all layers.
        lowest_layer: index of the lowest adapted layer; no unit goes below it.
    """

    names: tuple[str, ...]
    columns: int
    bytes_per_token: int
    recompute_flops_per_token: int
    lowest_layer: int

    def __str__(self) -> str:
        cost = f"{self.bytes_per_token:>12,} {self.recompute_flops_per_token / 1e9:>17,.3f}"
        return f"{self.columns:>8} {cost}  {', '.join(self.names)}"


PLAN_HEADER = f"{'pages/64':>8} {'bytes/token':>12} {'recompute GFLOP':>17}  names kept"


def backward_work(
    config: ModelConfig,
    modules: Sequence[str],
    dtype,
    *,
    tp: int = 1,
    rank: int = 16,
    mean_context: int = 2048,
    lowest_layer: int = 0,
    lowest_program: bool = False,
) -> BackwardWork:
    """Both tables of a model; arguments as in `pruning_table` and `BackwardWork`."""
    options = {"tp": tp, "rank": rank, "mean_context": mean_context}
    tables = [pruning_table(config, modules, dtype, lowest=lowest, **options) for lowest in (False, True)]
    return BackwardWork(*tables, config.num_layers, lowest_layer, lowest_program)


def plan_of(work: BackwardWork, names: Iterable[str]) -> TapePlan:
    """The plan that keeps exactly these names."""
    kept = tuple(name for name in NAMES if name in set(names))
    columns = work.interior.columns(kept)
    size = columns * work.interior.column_bytes * work.num_layers
    return TapePlan(kept, columns, size, work.recompute_flops(kept), work.lowest_layer)


def all_plans(work: BackwardWork) -> tuple[TapePlan, ...]:
    """The plans worth having, leanest to richest: every other set of names takes as many pages and recomputes no less.
    Between equals the one that writes fewer names."""
    optional = [name for name in NAMES if name != "x"]
    subsets = chain.from_iterable(combinations(optional, size) for size in range(len(optional) + 1))
    candidates = [plan_of(work, ("x", *names)) for names in subsets]
    front: list[TapePlan] = []
    for plan in sorted(candidates, key=lambda p: (p.columns, p.recompute_flops_per_token, len(p.names))):
        if not front or plan.recompute_flops_per_token < front[-1].recompute_flops_per_token:
            front.append(plan)
    return tuple(front)


def plan_for_budget(
    work: BackwardWork, *, columns: int | None = None, bytes_per_token: int | None = None
) -> TapePlan:
    """The plan with least recomputation within a budget; without one, the plan that recomputes nothing.

    Args:
        columns: pages per 64 tokens that the tape may take.
        bytes_per_token: bytes that it may take per finetuning token, all layers and shards together.

    Raises:
        ConfigError: not even the layer inputs fit.
    """
    plans = all_plans(work)
    within = lambda size, limit: limit is None or size <= limit
    affordable = [p for p in plans if within(p.columns, columns) and within(p.bytes_per_token, bytes_per_token)]
    if not affordable:
        least = plans[0]
        limits = {"pages per 64 tokens": columns, "bytes a token": bytes_per_token}
        budget = " and ".join(f"{limit:,} {unit}" for unit, limit in limits.items() if limit is not None)
        raise ConfigError(
            f"the tape's budget is {budget}; the layer inputs alone take {least.columns} pages per 64 tokens "
            f"({least.bytes_per_token:,} bytes a token): lower microbatch_tokens or raise pages or memory_bytes"
        )
    return affordable[-1]


def leaner_names(work: BackwardWork, names: Sequence[str]) -> tuple[str, ...] | None:
    """What a tape keeps when pages are short: of the plans that keep only some of ``names``, in at most half of their
    pages, the one with least recomputation. None if there is none."""
    kept = plan_of(work, names)
    others = [name for name in kept.names if name != "x"]
    subsets = chain.from_iterable(combinations(others, size) for size in range(len(others)))
    plans = [plan_of(work, ("x", *subset)) for subset in subsets]
    within = [plan for plan in plans if 2 * plan.columns <= kept.columns]
    return min(within, key=lambda p: (p.recompute_flops_per_token, p.columns, len(p.names))).names if within else None


def resolve_tape(
    tape: str | Sequence[str],
    work: BackwardWork,
    *,
    columns: int | None = None,
    bytes_per_token: int | None = None,
) -> TapePlan:
    """The plan a configuration asks for: "auto" is the best within the budget, names are taken as they are.

    Raises:
        ConfigError: an unknown name, no "x", or for "auto" a budget that nothing fits.
    """
    if tape == "auto":
        return plan_for_budget(work, columns=columns, bytes_per_token=bytes_per_token)
    names = (tape,) if isinstance(tape, str) else tuple(tape)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise ConfigError(f"tape names {listed}; it must be \"auto\" or some of {', '.join(NAMES)}")
    if "x" not in names:
        raise ConfigError(f"tape is {list(names)}; it must contain \"x\", the layer input from which the rest follows")
    return plan_of(work, names)
