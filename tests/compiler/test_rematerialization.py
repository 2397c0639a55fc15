"""Plans against brute force over all subsets of names, on tables of random costs and on real models."""

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.compiler.pruning import NameCost, PruningTable, Recompute
from flexjax.compiler.rematerialization import (
    PLAN_HEADER,
    BackwardWork,
    all_plans,
    backward_work,
    leaner_names,
    plan_for_budget,
    plan_of,
    resolve_tape,
)
from flexjax.fields import ConfigError
from flexjax.models.lora import MODULES

OPTIONAL = ("q", "attention", "mid", "gate", "up")
SUBSETS = [("x", *s) for s in chain.from_iterable(combinations(OPTIONAL, size) for size in range(6))]


def table(columns, flops, needed=("x", *OPTIONAL), lowest=False) -> PruningTable:
    """A layer with these pages per name (x first) and FLOPs of q, attention, mid, gate, up, and gate with up."""
    q, attention, mid, gate, up, both = flops
    runs = (
        Recompute(("q",), ("x",), q),
        Recompute(("attention",), ("q",), attention),
        Recompute(("mid",), ("x", "attention"), mid),
        Recompute(("gate",), ("mid",), gate),
        Recompute(("up",), ("mid",), up),
        Recompute(("gate", "up"), ("mid",), both),
    )
    costs = tuple(NameCost(n, n in needed, 10 * c, c) for n, c in zip(("x", *OPTIONAL), columns, strict=True))
    return PruningTable(("down_proj",), lowest, costs, runs, 10, 0)


@st.composite
def tables(draw) -> PruningTable:
    columns = draw(st.tuples(*[st.integers(1, 9)] * 6))
    q, attention, mid, gate, up = draw(st.tuples(*[st.integers(0, 50)] * 5))
    both = draw(st.integers(max(gate, up), gate + up))
    needs = [("x", *OPTIONAL), ("gate", "up"), ("mid", "gate"), ("attention", "mid", "gate", "up")]
    needed = draw(st.sampled_from(needs))
    return table(columns, (q, attention, mid, gate, up, both), needed)


def recomputed_by_hand(costs: PruningTable, kept: tuple[str, ...]) -> int:
    """Make each needed name by asking for what it is made of; count every stage run once."""
    price = {run.outputs: run.flops for run in costs.recomputes}
    made = set()

    def make(name):
        if name in kept or name in made:
            return
        made.add(name)
        sources = dict(q=(), attention=("q",), mid=("attention",), gate=("mid",), up=("mid",))
        for source in sources[name]:
            make(source)

    for name in costs.needed:
        make(name)
    pair = tuple(name for name in ("gate", "up") if name in made)
    single = sum(price[(name,)] for name in made - {"gate", "up"})
    return single + (price[pair] if pair else 0)


@given(tables())
def test_recomputation_counts_every_stage_once(costs):
    for kept in SUBSETS:
        assert costs.recompute_flops(kept) == recomputed_by_hand(costs, kept)


@given(tables(), st.data())
def test_keeping_more_never_recomputes_more(costs, data):
    more = data.draw(st.sampled_from(SUBSETS))
    fewer = tuple(name for name in more if name == "x" or data.draw(st.booleans()))
    assert costs.recompute_flops(more) <= costs.recompute_flops(fewer)


@given(tables())
def test_the_plans_are_the_pareto_front(costs):
    work = BackwardWork(costs, costs, num_layers=3)
    points = {(costs.columns(kept), 3 * recomputed_by_hand(costs, kept)) for kept in SUBSETS}
    beaten = lambda a: any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)
    front = sorted(point for point in points if not beaten(point))
    assert [(plan.columns, plan.recompute_flops_per_token) for plan in all_plans(work)] == front


@given(tables(), st.integers(1, 60))
def test_the_budget_is_kept_and_used_best(costs, columns):
    work = BackwardWork(costs, costs, num_layers=2)
    affordable = [recomputed_by_hand(costs, kept) for kept in SUBSETS if costs.columns(kept) <= columns]
    if not affordable:
        with pytest.raises(ConfigError, match=f"the tape's budget is {columns} pages per 64 tokens"):
            plan_for_budget(work, columns=columns)
        return
    plan = plan_for_budget(work, columns=columns)
    assert plan.columns <= columns
    assert plan.recompute_flops_per_token == 2 * min(affordable)
    richer = plan_for_budget(work, columns=columns + 1)
    assert richer.recompute_flops_per_token <= plan.recompute_flops_per_token


@given(tables(), st.integers(1, 600))
def test_bytes_and_columns_are_the_same_budget(costs, columns):
    """A column is 10 bytes a token in each of two layers."""
    work = BackwardWork(costs, costs, num_layers=2)
    if costs.columns(("x",)) <= columns:
        by_bytes = plan_for_budget(work, bytes_per_token=20 * columns + 19)
        assert by_bytes == plan_for_budget(work, columns=columns)
        assert by_bytes.bytes_per_token == 20 * by_bytes.columns


def test_layers_are_counted_from_the_lowest_adapted_one():
    interior = table((2, 2, 2, 2, 4, 4), (10, 20, 30, 100, 100, 150))
    lowest = table((2, 2, 2, 2, 4, 4), (10, 20, 30, 100, 100, 150), needed=("gate", "up"), lowest=True)
    flops = lambda **options: BackwardWork(interior, lowest, num_layers=5, **options).recompute_flops(("x", "mid"))
    assert flops() == 5 * (10 + 20 + 150)
    assert flops(lowest_layer=3) == 2 * (10 + 20 + 150)
    assert flops(lowest_layer=3, lowest_program=True) == (10 + 20 + 150) + 150
    assert flops(lowest_layer=4, lowest_program=True) == 150
    with pytest.raises(ValueError, match="the lowest adapted layer is 5; the model has 5 layers"):
        flops(lowest_layer=5)


def test_a_lowest_layer_alone_keeps_only_what_it_needs(llama_8b):
    """It needs gate and up, each of 117 MFLOP and 7 columns, which follow from mid; q, attention (2k keys) and mid take
    34 each. By hand, columns and MFLOP: 2 and 336, 4 and 235, 9 and 218, 11 and 117, 16 and 0."""
    work = backward_work(llama_8b, ("down_proj",), "bfloat16", lowest_layer=31, lowest_program=True)
    assert [plan.names for plan in all_plans(work)] == [
        ("x",),
        ("x", "mid"),
        ("x", "gate"),
        ("x", "mid", "gate"),
        ("x", "gate", "up"),
    ]


def test_plans_of_an_8b_model(llama_8b):
    """By hand, per page of the budget: q, mid, and gate with up save 17 MFLOP of a layer, attention (1k keys) 8."""
    work = backward_work(llama_8b, MODULES, "bfloat16", mean_context=1024)
    assert plan_for_budget(work, columns=4).names == ("x", "q")
    assert plan_for_budget(work, columns=6).names == ("x", "q", "mid")
    assert plan_for_budget(work, columns=8).names == ("x", "q", "attention", "mid")
    assert plan_for_budget(work, columns=21).names == ("x", "q", "mid", "gate", "up")
    assert plan_for_budget(work).names == ("x", *OPTIONAL)
    assert plan_for_budget(work).recompute_flops_per_token == 0
    assert plan_for_budget(work, columns=4).bytes_per_token == 4 * 2048 * 2 * 32


@given(tables(), st.data())
def test_a_leaner_tape_keeps_the_best_of_the_other_in_half_its_pages(costs, data):
    work, kept = BackwardWork(costs, costs, num_layers=2), data.draw(st.sampled_from(SUBSETS))
    found = leaner_names(work, kept)
    able = [names for names in SUBSETS if set(names) < set(kept) and 2 * costs.columns(names) <= costs.columns(kept)]
    if not able:
        assert found is None
        return
    assert set(found) < set(kept) and "x" in found and 2 * costs.columns(found) <= costs.columns(kept)
    assert recomputed_by_hand(costs, found) == min(recomputed_by_hand(costs, names) for names in able)


def test_leaner_tapes_of_an_8b_model(llama_8b):
    """Of 22 pages: 11 hold all but gate or up, one of which is then computed again, or all but both."""
    work = backward_work(llama_8b, MODULES, "bfloat16", mean_context=1024)
    assert leaner_names(work, ("x", *OPTIONAL)) == ("x", "q", "gate")
    assert leaner_names(work, ("x", "q", "mid", "gate")) == ("x", "q", "mid")
    assert leaner_names(work, ("x",)) is None


def test_a_configuration_is_resolved(smollm):
    work = backward_work(smollm, MODULES, "bfloat16")
    assert resolve_tape("auto", work, columns=16) == plan_for_budget(work, columns=16)
    assert resolve_tape(("up", "x", "gate"), work) == plan_of(work, ("x", "gate", "up"))
    assert resolve_tape(["x", "attention"], work).names == ("x", "attention")
    assert resolve_tape(("x", "gate"), work, columns=2).columns == 6, "names are taken as they are"


@pytest.mark.parametrize(
    ("tape", "message"),
    [
        (("x", "logits"), r"tape names 'logits'; it must be \"auto\" or some of x, q, attention, mid, gate, up"),
        ("all", r"tape names 'all'"),
        (("q", "mid"), r"tape is \['q', 'mid'\]; it must contain \"x\""),
        ((), r"it must contain \"x\""),
    ],
)
def test_bad_tapes_are_refused_by_name(smollm, tape, message):
    work = BackwardWork(table([1] * 6, [1] * 6), table([1] * 6, [1] * 6), 2)
    with pytest.raises(ConfigError, match=message):
        resolve_tape(tape, work)


def test_the_plans_print(smollm):
    plans = all_plans(backward_work(smollm, ("down_proj",), "float32", mean_context=512))
    text = "\n".join([PLAN_HEADER, *map(str, plans)])
    first, last = text.splitlines()[1].split(), text.splitlines()[-1].split()
    assert (first[0], first[3:]) == ("2", ["x"])
    assert last[2] == "0.000"
