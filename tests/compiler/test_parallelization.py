"""Sharded LoRA against dense LoRA, on shards simulated in numpy, and the choice against what the engine executes."""

import re
from itertools import product

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from flexjax.compiler.communication import Collective, CommunicationModel, Traffic
from flexjax.compiler.parallelization import (
    COLLECTIVES,
    COLUMNS,
    GRADIENTS,
    PARTIAL,
    PLACEMENTS,
    PRODUCTS,
    ROWS,
    SPLIT,
    WHOLE,
    State,
    chosen_specs,
    follow,
    module_candidates,
    parallel_plan,
)
from flexjax.engine.specs import factor_specs
from flexjax.fields import ConfigError
from flexjax.models.lora import MODULES

SHARDS = 2

# --- the rules of the states, by what the shards really hold


def value_shards(value, state, seed=0):
    """What each shard holds of a value [T, n]."""
    match state:
        case State.WHOLE:
            return [value] * SHARDS
        case State.SPLIT:
            return np.split(value, SHARDS, axis=1)
    terms = list(np.random.default_rng(seed).normal(size=(SHARDS - 1, *value.shape)))
    return [*terms, value - sum(terms)]


def assembled(shards, state):
    match state:
        case State.WHOLE:
            assert all(np.allclose(shard, shards[0]) for shard in shards)
            return shards[0]
        case State.SPLIT:
            return np.concatenate(shards, axis=1)
    return sum(shards)


def factor_shards(factor, placement):
    return [factor] * SHARDS if placement is None else np.split(factor, SHARDS, axis=placement)


@pytest.mark.parametrize(("state", "placement"), list(PRODUCTS))
def test_products_end_in_the_state_of_the_table(state, placement):
    rng = np.random.default_rng(1)
    value, factor = rng.normal(size=(3, 4)), rng.normal(size=(4, 6))
    shards = [v @ f for v, f in zip(value_shards(value, state), factor_shards(factor, placement), strict=True)]
    np.testing.assert_allclose(assembled(shards, PRODUCTS[state, placement]), value @ factor)


@pytest.mark.parametrize(("left", "right", "placement"), list(GRADIENTS))
def test_gradients_are_summed_where_the_table_says(left, right, placement):
    """d_factor = value^T cotangent, on the shard's own rows or columns of the factor."""
    rng = np.random.default_rng(2)
    value, cotangent = rng.normal(size=(3, 4)), rng.normal(size=(3, 6))
    lefts, rights = value_shards(value, left, 3), value_shards(cotangent, right, 4)
    if placement == ROWS and left is WHOLE:
        lefts = np.split(value, SHARDS, axis=1)
    if placement == COLUMNS and right is WHOLE:
        rights = np.split(cotangent, SHARDS, axis=1)
    own = [a.T @ b for a, b in zip(lefts, rights, strict=True)]
    expected = factor_shards(value.T @ cotangent, placement)
    if GRADIENTS[left, right, placement]:
        np.testing.assert_allclose(sum(own), value.T @ cotangent)
        assert not np.allclose(own[0], expected[0])
    else:
        np.testing.assert_allclose(own, expected)


def test_free_changes_of_state_need_no_other_shard():
    """Whole to split: take own columns. To partial: one copy counts, or own columns among zeros."""
    free = {(a, b) for a, b in product(State, State) if a != b and (a, b) not in COLLECTIVES}
    assert free == {(WHOLE, SPLIT), (WHOLE, PARTIAL), (SPLIT, PARTIAL)}


# --- candidates worked out by hand


def candidates_of(module, **options):
    defaults = dict(width=64, out=128, rank=16, item=2, tp=2)
    return list(module_candidates(module, **(defaults | options)))


def collectives(*pairs):
    return tuple(Collective(kind, size) for kind, size in pairs)


@pytest.mark.parametrize(
    ("module", "a", "b", "forward", "backward", "update"),
    [
        # each shard has all of h; A's gradient is a sum of what the shards' outputs ask for
        ("q_proj", None, COLUMNS, (), (), [("all-reduce", 4 * 64 * 16)]),
        # h split by rank: gathered for B, gathered again and scattered in the backward pass
        ("q_proj", COLUMNS, COLUMNS, [("all-gather", 32)], [("all-gather", 32), ("reduce-scatter", 32)], ()),
        # h in partial sums
        ("q_proj", ROWS, COLUMNS, [("all-reduce", 32)], [("all-reduce", 32), ("all-reduce", 32)], ()),
        # partial sums of h pass through B and join the backbone's own all-reduce; B's gradient is summed once
        ("down_proj", ROWS, None, (), (), [("all-reduce", 4 * 16 * 128)]),
        # as partial sums, scattered over the rank; B's gradient is then complete
        ("down_proj", ROWS, ROWS, [("reduce-scatter", 32)], [("reduce-scatter", 32), ("all-gather", 32)], ()),
    ],
)
def test_a_placement_costs_what_was_worked_out_by_hand(module, a, b, forward, backward, update):
    expected = (collectives(*forward), collectives(*backward), collectives(*update))
    model, traffic = CommunicationModel(), Traffic()
    same = [c for c in candidates_of(module) if (c.a, c.b) == (a, b)]
    best = min(same, key=lambda c: c.seconds_per_token(model, traffic, 2))
    assert (best.forward, best.backward, best.update) == expected


@pytest.mark.parametrize("module", ["q_proj", "down_proj"])
def test_every_candidate_computes_the_dense_product_and_gradients(module):
    """Follow value and cotangents through the shards with every combination of states that fits."""
    rng = np.random.default_rng(5)
    x, a, b, d_y = (rng.normal(size=shape) for shape in ((3, 4), (4, 2), (2, 6), (3, 6)))
    row, followed = module == "down_proj", 0
    for p_a, p_b in product(PLACEMENTS, PLACEMENTS):
        for states in product(State, repeat=4):
            if follow(row, p_a, p_b, *states, widths=(4, 2, 6), item=2) is None:
                continue
            s_x, s_h, s_d_y, s_d_h = states
            multiply = lambda value, state, factor, placement: assembled(
                [v @ f for v, f in zip(value_shards(value, state), factor_shards(factor, placement), strict=True)],
                PRODUCTS[state, placement],
            )
            turned = {None: None, ROWS: COLUMNS, COLUMNS: ROWS}
            np.testing.assert_allclose(multiply(multiply(x, s_x, a, p_a), s_h, b, p_b), x @ a @ b)
            d_h = multiply(d_y, s_d_y, b.T, turned[p_b])
            np.testing.assert_allclose(multiply(d_h, s_d_h, a.T, turned[p_a]), d_y @ b.T @ a.T)
            followed += 1
    assert followed >= 9


def test_ranks_that_do_not_divide_are_not_split():
    placements = {(c.a, c.b) for c in candidates_of("q_proj", rank=9)}
    assert placements == {(a, b) for a in (None, ROWS) for b in (None, COLUMNS)}


def test_memory_is_that_of_the_shards():
    held = {(c.a, c.b): c.bytes_per_device for c in candidates_of("q_proj")}
    assert held[None, COLUMNS] == 4 * (64 * 16 + 16 * 128 // 2)
    assert held[COLUMNS, COLUMNS] == 4 * (64 * 16 + 16 * 128) // 2


# --- the choice


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("model", ["llama_8b", "qwen_14b"])
def test_the_choice_is_what_the_engine_executes(request, model, tp):
    plan = parallel_plan(request.getfixturevalue(model), MODULES, "bfloat16", tp=tp)
    specs = {f: {name: PartitionSpec(*s) for name, s in each.items()} for f, each in chosen_specs(plan).items()}
    assert specs == factor_specs(MODULES)


def test_a_ring_sends_all_but_the_own_share():
    model = CommunicationModel(latency=1.0, bandwidth=100.0)
    assert model.seconds(Collective("all-gather", 50), tokens=4, tp=4) == pytest.approx(1 + 0.75 * 200 / 100)
    assert model.seconds(Collective("all-reduce", 50), tokens=4, tp=4) == pytest.approx(1 + 2 * 0.75 * 200 / 100)


def test_costs_decide(llama_8b):
    """With free calls and an update after every few tokens, summing a large gradient costs more than moving h."""
    options = dict(tp=8, model=CommunicationModel(latency=0.0), traffic=Traffic(step_tokens=8, update_tokens=8))
    chosen = {c.module: c.chosen for c in parallel_plan(llama_8b, MODULES, "bfloat16", **options).choices}
    q, down = chosen["q_proj"], chosen["down_proj"]
    assert (q.a, q.b, q.backward, q.update) == (None, COLUMNS, collectives(("all-reduce", 32)), ())
    assert (down.a, down.b, down.forward, down.update) == (ROWS, ROWS, collectives(("reduce-scatter", 32)), ())


def test_the_choice_and_its_rivals_print(llama_8b):
    plan = parallel_plan(llama_8b, ("q_proj", "down_proj"), "bfloat16", tp=2)
    lines = [" ".join(line.split()) for line in str(plan).splitlines()]
    assert re.fullmatch(r"q_proj column [\d.]+ A whole B by output - - all-reduce 262,144 B", lines[2])
    assert re.fullmatch(r"down_proj row [\d.]+ A by input B whole - - all-reduce 262,144 B", lines[3])
    assert len(str(plan.choices[0]).splitlines()) == 9


def test_widths_that_do_not_divide_are_refused(llama_8b):
    with pytest.raises(ConfigError, match="the output of q_proj has 4096 values, which tp = 3 does not divide"):
        parallel_plan(llama_8b, MODULES, "bfloat16", tp=3)
