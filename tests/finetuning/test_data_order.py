"""DataOrder: each epoch sees every row once, in an order that only seed and epoch decide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.finetuning.data_order import DataOrder


def order(lengths=(1,) * 10, **values):
    return DataOrder(lengths, **{"seed": 0, "epochs": 1, "batch_size": 4} | values)


def rows_of(data, steps):
    return [row for step in steps for row in data.group(step)]


def test_groups_of_sequences():
    data = order(epochs=2)
    assert data.total_steps == 6
    assert [len(data.group(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    assert [data.epoch_of(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [data.ends_epoch(step) for step in range(6)] == [False, False, True, False, False, True]
    assert sorted(rows_of(data, range(3))) == sorted(rows_of(data, range(3, 6))) == list(range(10))


def test_epochs_and_seeds_differ_and_repeat():
    first, second = rows_of(order(epochs=2), range(3)), rows_of(order(epochs=2), range(3, 6))
    other = rows_of(order(seed=1), range(3))
    assert len({tuple(first), tuple(second), tuple(other)}) == 3
    assert rows_of(order(epochs=5), range(3, 6)) == second


@pytest.mark.parametrize("max_steps", [1, 3, 4, 8])
def test_max_steps_is_exact(max_steps):
    data = order(max_steps=max_steps)
    assert data.total_steps == max_steps
    assert data.ends_epoch(max_steps - 1)
    assert rows_of(data, range(max_steps)) == rows_of(order(epochs=9), range(max_steps))


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    batch_tokens=st.integers(1, 120),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_groups_of_tokens_are_full_but_not_over(lengths, batch_tokens, epochs, seed):
    data = order(lengths, batch_tokens=batch_tokens, epochs=epochs, seed=seed)
    groups = [data.group(step) for step in range(data.total_steps)]
    assert sorted(rows_of(data, range(data.total_steps))) == sorted(list(range(len(lengths))) * epochs)
    for step, group in enumerate(groups):
        tokens = sum(lengths[row] for row in group)
        assert tokens <= batch_tokens or len(group) == 1
        if not data.ends_epoch(step):
            assert tokens + lengths[groups[step + 1][0]] > batch_tokens
