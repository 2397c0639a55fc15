"""ParallelPlan: how LoRA factors are sharded, given how the backbone is (dependent parallelization).

The backbone decides the states at a module's ends. In a column-parallel product (q, k, v, gate, up) the input is whole
on every shard and the output split; in a row-parallel one (o, down) the input is split and the outputs are partial
sums that the backbone reduces:

                x          y = x W      cotangent of y    cotangent of x
    column      whole      split        split             partial, reduced by the backbone
    row         split      partial      whole             split

For y = (x A) B every placement of A and B, with every state of h = x A and of the cotangents between, is followed from
end to end; where two states do not meet, a collective makes them meet. The cheapest is taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import jax.numpy as jnp

from flexjax.compiler.communication import Collective, CommunicationModel, Traffic
from flexjax.compiler.pruning import checked_modules
from flexjax.fields import ConfigError
from flexjax.models.config import ModelConfig
from flexjax.models.lora import ROW_PARALLEL, module_widths
from flexjax.models.sharding import TP_AXIS


class State(StrEnum):
    """How a value lies on the shards."""

    WHOLE = "whole"  # each has all of it
    SPLIT = "split"  # each has its own columns
    PARTIAL = "partial"  # each has a term of the sum


WHOLE, SPLIT, PARTIAL = State
ROWS, COLUMNS = 0, 1
PLACEMENTS = (None, ROWS, COLUMNS)
"""The sharded axis of a factor: none, the one it is contracted over, or that of its result."""

COLLECTIVES = {(PARTIAL, WHOLE): "all-reduce", (PARTIAL, SPLIT): "reduce-scatter", (SPLIT, WHOLE): "all-gather"}
"""What a change of state takes. The other changes are free: a shard takes its columns, or only one copy counts."""

PRODUCTS = {
    (WHOLE, None): WHOLE,
    (PARTIAL, None): PARTIAL,
    (SPLIT, ROWS): PARTIAL,
    (WHOLE, COLUMNS): SPLIT,
}
"""State of value times factor, by the value's state and the factor's placement; other pairs do not fit."""

TRANSPOSED = {None: None, ROWS: COLUMNS, COLUMNS: ROWS}

GRADIENTS = {
    (WHOLE, WHOLE, None): False,
    (WHOLE, PARTIAL, None): True,
    (PARTIAL, WHOLE, None): True,
    (SPLIT, WHOLE, ROWS): False,
    (WHOLE, WHOLE, ROWS): False,
    (WHOLE, SPLIT, COLUMNS): False,
    (WHOLE, WHOLE, COLUMNS): False,
}
"""Whether a factor's gradient must still be summed over shards, by the states of its input and of its output's
cotangent and by its placement; other triples do not fit."""


@dataclass(frozen=True)
class Candidate:
    """One way to shard a pair of factors.

    Attributes:
        a, b: sharded axis of A [in, rank] and B [rank, out], or None.
        forward, backward: collectives per call, bytes per token. h is recomputed in the backward pass.
        update: collectives once per update.
        bytes_per_device: of both factors in float32.
    """

    a: int | None
    b: int | None
    forward: tuple[Collective, ...]
    backward: tuple[Collective, ...]
    update: tuple[Collective, ...]
    bytes_per_device: int

    def seconds_per_token(self, model: CommunicationModel, traffic: Traffic, tp: int) -> float:
        """Time in collectives, for one layer and one finetuning token."""
        calls = sum(model.seconds(c, traffic.step_tokens, tp) for c in self.forward + self.backward)
        updates = sum(model.seconds(c, 1, tp) for c in self.update)
        return calls / traffic.step_tokens + updates / traffic.update_tokens

    def __str__(self) -> str:
        a = {None: "whole", ROWS: "by input", COLUMNS: "by rank"}[self.a]
        b = {None: "whole", ROWS: "by rank", COLUMNS: "by output"}[self.b]
        listed = lambda collectives: " + ".join(map(str, collectives)) or "-"
        parts = (f"A {a}", f"B {b}", *map(listed, (self.forward, self.backward, self.update)))
        return "{:<11} {:<12} {:<28} {:<28} {}".format(*parts)


@dataclass(frozen=True)
class Choice:
    """The candidates of one module, cheapest first, with the seconds that each takes per token and layer."""

    module: str
    candidates: tuple[tuple[Candidate, float], ...]

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0][0]

    def __str__(self) -> str:
        """The choice and, under it, what was not taken."""
        return "\n".join(f"{seconds * 1e9:>10.3f}  {candidate}" for candidate, seconds in self.candidates)


@dataclass(frozen=True)
class ParallelPlan:
    """The sharding of every adapted module; ``str()`` prints the choices."""

    tp: int
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        columns = "{:<10} {:<7} {:>9}  {:<11} {:<12} {:<28} {:<28} {}"
        devices = f"over {self.tp} devices" if self.tp > 1 else "on one device, costed as over two"
        title = f"LoRA sharding {devices}; per layer, bytes per token or, of an update, in all"
        header = columns.format("module", "product", "ns/token", "A", "B", "forward", "backward", "update")
        return "\n".join([title, header, *map(self._row, self.choices)])

    def _row(self, choice: Choice) -> str:
        kind = "row" if choice.module in ROW_PARALLEL else "column"
        candidate, seconds = choice.candidates[0]
        return f"{choice.module:<10} {kind:<7} {seconds * 1e9:>9.3f}  {candidate}"


def parallel_plan(
    config: ModelConfig,
    modules: Sequence[str],
    dtype,
    *,
    tp: int,
    rank: int = 16,
    model: CommunicationModel | None = None,
    traffic: Traffic | None = None,
) -> ParallelPlan:
    """Choose for every module. On one device the choice is the one two would make: it costs nothing there.

    Args:
        modules: adapted modules, in any order.
        model, traffic: the defaults of their classes when None.

    Raises:
        ConfigError: no module, an unknown one, or a width that does not divide over the shards.
    """
    model, traffic, widths = model or CommunicationModel(), traffic or Traffic(), module_widths(config)
    choices = []
    for name in checked_modules(modules):
        candidates = module_candidates(name, *widths[name], rank, jnp.dtype(dtype).itemsize, tp)
        cost = lambda candidate: candidate.seconds_per_token(model, traffic, max(tp, 2))
        ranked = sorted(((c, cost(c)) for c in candidates), key=lambda pair: (pair[1], pair[0].bytes_per_device))
        choices.append(Choice(name, tuple(best_of_each_placement(ranked))))
    return ParallelPlan(tp, tuple(choices))


def chosen_specs(plan: ParallelPlan) -> dict[str, dict[str, tuple]]:
    """{"a" or "b": module -> axis names of the stacked factor [layers, in, rank] or [layers, rank, out]}: what a
    `jax.sharding.PartitionSpec` takes; () is replicated."""
    by_axis = {None: (), ROWS: (None, TP_AXIS, None), COLUMNS: (None, None, TP_AXIS)}
    chosen = {choice.module: choice.chosen for choice in plan.choices}
    return {f: {name: by_axis[getattr(c, f)] for name, c in chosen.items()} for f in ("a", "b")}


def best_of_each_placement(ranked: list[tuple[Candidate, float]]) -> list[tuple[Candidate, float]]:
    """The first of every (a, b), in order."""
    first: dict[tuple, tuple[Candidate, float]] = {}
    for candidate, seconds in ranked:
        first.setdefault((candidate.a, candidate.b), (candidate, seconds))
    return list(first.values())


def module_candidates(module: str, width: int, out: int, rank: int, item: int, tp: int) -> Iterator[Candidate]:
    """Every way to shard the factors of one module that is possible with these sizes.

    Args:
        width: values of the module's input; out: of its output, whole model.
        item: bytes of an activation value.
    """
    row = module in ROW_PARALLEL
    for end, size in (("input", width),) if row else (("output", out),):
        if size % tp:
            raise ConfigError(f"the {end} of {module} has {size} values, which tp = {tp} does not divide; lower tp")
    for a, b in product(PLACEMENTS, PLACEMENTS):
        sizes = {(0, ROWS): width, (0, COLUMNS): rank, (1, ROWS): rank, (1, COLUMNS): out}
        if any(axis is not None and sizes[factor, axis] % tp for factor, axis in enumerate((a, b))):
            continue
        shares = [1 if axis is None else tp for axis in (a, b)]
        held = 4 * (width * rank // shares[0] + rank * out // shares[1])
        for states in product(State, repeat=4):
            followed = follow(row, a, b, *states, widths=(width, rank, out), item=item)
            if followed is not None:
                yield Candidate(a, b, *followed, held)


def follow(
    row: bool, a: int | None, b: int | None, x: State, h: State, d_y: State, d_h: State, *, widths, item: int
) -> tuple[tuple[Collective, ...], ...] | None:
    """Collectives of the forward pass, the backward pass and the update, or None where states do not fit.

    Args:
        x, h, d_y, d_h: states in which the products read these values.
        widths: of x, h and y, whole model; item: bytes of an activation value.
    """
    width, rank, out = widths
    given_x, given_d_y = (SPLIT, WHOLE) if row else (WHOLE, SPLIT)
    wanted_y, wanted_d_x = (PARTIAL, SPLIT) if row else (SPLIT, PARTIAL)
    made_h, made_y = PRODUCTS.get((x, a)), PRODUCTS.get((h, b))
    made_d_h, d_x = PRODUCTS.get((d_y, TRANSPOSED[b])), PRODUCTS.get((d_h, TRANSPOSED[a]))
    sum_a, sum_b = GRADIENTS.get((x, d_h, a)), GRADIENTS.get((h, d_y, b))
    if None in (made_h, made_y, made_d_h, d_x, sum_a, sum_b):
        return None
    change = lambda before, after, size: changes(before, after, size * item)
    inner = change(given_x, x, width) + change(made_h, h, rank)
    forward = inner + change(made_y, wanted_y, out)
    backward = inner + change(given_d_y, d_y, out) + change(made_d_h, d_h, rank) + change(d_x, wanted_d_x, width)
    summed = [size for size, needed in ((width * rank, sum_a), (rank * out, sum_b)) if needed]
    return forward, backward, tuple(Collective("all-reduce", 4 * size) for size in summed)


def changes(before: State, after: State, size: int) -> tuple[Collective, ...]:
    """The collective that a change of state takes, or nothing; size in bytes."""
    kind = COLLECTIVES.get((before, after))
    return () if kind is None else (Collective(kind, size),)
