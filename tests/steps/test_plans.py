"""Gradients are the same under every tape plan, and a name that is kept is really read.

One forward pass keeps every name. The plan that keeps fewer is handed the pages of its names only, so that what it
lacks can come from nowhere but recomputation; its backward program is compiled for exactly these names.
"""

import dataclasses
import functools
from itertools import chain, combinations

import jax
import numpy as np
import pytest

from flexjax.finetuning.packing import pack_group
from flexjax.scheduler.output import MicrobatchPages
from flexjax.state import TAPE_NAMES
from tests.ladder import FULL, LLAMA, MICROBATCH, MIXED, Model, Rig, assert_close, assert_trees_close, example

PLANS = [("x", *names) for names in chain.from_iterable(combinations(TAPE_NAMES[1:], size) for size in range(6))]
SCALE = 1.5
DENSE_TOLERANCE = 2e-5
"""Relative to the largest gradient of a factor: float32 against float64 through three layers."""
PLAN_TOLERANCE = 4e-6
"""Recomputed names come from the same float32 stages, summed in another order: the forward step makes x A beside x W,
from A as rows; a backward unit from the master's columns."""


@functools.cache
def factors():
    return Model.random(LLAMA).factors(rank=4, seed=7)


@functools.cache
def examples():
    """Packed: three tiles and two; windows of 128 slots cut the first sequence and join its end to the second."""
    tokens = [Model.random(LLAMA).tokens(length, seed=length) for length in (150, 90)]
    return [example(each, np.arange(len(each)) > 20) for each in tokens]


@functools.cache
def after_loss() -> Rig:
    """Everything on the tape, and the cotangent of the last layer's output at hand. Not to be changed."""
    rig = Rig(Model.random(LLAMA), tape=FULL)
    rig.begin(factors(), SCALE)
    rig.hold(0, *pack_group(examples(), MICROBATCH, 0, 0))
    rig.step(MIXED, windows=rig.whole_windows(0))
    rig.loss(0)
    return rig


def pages_of(names) -> MicrobatchPages:
    """K/V and the columns of these names only; final states as they are."""
    rig = after_loss()
    layout = rig.dims.tape_layout
    first = {name: 1 + layout.first_column(name) for name in names}
    columns = [0, *chain.from_iterable(range(first[n], first[n] + layout.span(n)) for n in names)]
    pages = rig.training[0].pages
    return dataclasses.replace(pages, blocks=tuple(tuple(block[c] for c in columns) for block in pages.blocks))


def gradients_under(names, pool=None) -> dict:
    """Backward of the one forward pass, by the program of this plan."""
    source, rig = after_loss(), Rig(Model.random(LLAMA), tape=names)
    rig.job, rig.master, rig.pool = source.job, source.master, source.pool if pool is None else pool
    rig.training[0] = dataclasses.replace(source.training[0], pages=pages_of(names))
    rig.gradients = jax.tree.map(lambda sums: sums + 0, source.gradients)  # copies, since they are donated
    rig.backward(0)
    return rig.factor_gradients()


@functools.cache
def dense_gradients() -> dict:
    tokens, trained = [each.input_ids for each in examples()], [each.loss_mask for each in examples()]
    return Model.random(LLAMA).dense.loss_and_gradients(tokens, trained, factors(), SCALE)[1]


@functools.cache
def full_gradients() -> dict:
    return gradients_under(FULL)


def test_there_are_32_plans():
    assert len(set(PLANS)) == 32 and set(map(len, PLANS)) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("names", PLANS, ids=",".join)
def test_gradients_are_equal_under_every_plan(names):
    got = gradients_under(names)
    assert_trees_close(got, dense_gradients(), DENSE_TOLERANCE)
    for factor, expected in full_gradients().items():
        for module, value in expected.items():
            assert_close(got[factor][module], value, PLAN_TOLERANCE, f"{factor} of {module}")


@pytest.mark.parametrize("name", TAPE_NAMES)
def test_a_kept_name_is_read(name):
    """With the pages of one name changed, so are the gradients."""
    changed = [page for pages in pages_of((name,)).blocks for page in pages[1:]]
    pool = after_loss().pool.at[:, np.array(changed)].multiply(1.25)
    got, expected = gradients_under(FULL, pool)["b"], full_gradients()["b"]
    assert any(np.abs(got[module] - value).max() > 1e-3 * np.abs(value).max() for module, value in expected.items())


def test_a_plan_writes_its_own_tape():
    """From forward to backward with the layout of the plan."""
    rig = Rig(Model.random(LLAMA), tape=("x", "mid", "up"))
    rig.begin(factors(), SCALE)
    rig.hold(0, *pack_group(examples(), MICROBATCH, 0, 0))
    rig.train(0)
    assert_trees_close(rig.factor_gradients(), dense_gradients(), DENSE_TOLERANCE)
