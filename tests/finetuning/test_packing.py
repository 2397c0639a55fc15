"""Packing: every token once, each sequence in tiles of its own, one normaliser for the whole group."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.fields import ConfigError
from flexjax.finetuning.dataset import Dataset, Example
from flexjax.finetuning.packing import check_lengths, first_fit_decreasing, pack_group

CAPACITY = 256


def example(ids, mask, line=1):
    return Example(np.asarray(ids, np.int32), np.asarray(mask, bool), line)


@st.composite
def groups(draw):
    lengths = draw(st.lists(st.integers(2, CAPACITY + 1), min_size=1, max_size=12))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    examples, first = [], 0
    for line, length in enumerate(lengths, 1):
        mask = random.random(length) < 0.4
        mask[0], mask[-1] = False, mask[-1] or not mask[1:].any()
        examples.append(example(np.arange(first, first + length), mask, line))
        first += length
    return examples


def test_a_hand_made_microbatch():
    group = [example([5, 6, 7, 8], [0, 0, 1, 0], 3), example([9] * 67, [0] * 65 + [1, 1], 1)]
    (microbatch,) = pack_group(group, CAPACITY, step=4, epoch=2)
    assert (microbatch.starts, microbatch.lengths) == ((0, 128), (66, 2))
    assert (microbatch.slots, microbatch.tokens, microbatch.lines) == (192, 68, (1, 3))
    assert (microbatch.trained_tokens, microbatch.closes_group) == (3, True)
    assert (microbatch.step, microbatch.epoch, microbatch.index) == (4, 2, 0)
    assert microbatch.input_ids[[0, 65, 66, 127, 128, 129, 130]].tolist() == [9, 9, 0, 0, 5, 6, 0]
    assert microbatch.positions[[0, 65, 66, 128, 129, 130, 255]].tolist() == [0, 65, -1, 0, 1, -1, -1]
    assert np.flatnonzero(microbatch.targets >= 0).tolist() == [64, 65, 129]
    assert microbatch.targets[[64, 65, 128, 129]].tolist() == [9, 9, -1, 7]


@given(groups())
def test_every_token_that_matters_is_computed_once(group):
    microbatches = pack_group(group, CAPACITY, step=0, epoch=0)
    computed = np.concatenate([each.input_ids[each.positions >= 0] for each in microbatches])
    wanted = [ids for each in group for ids in each.input_ids[: np.flatnonzero(each.loss_mask)[-1]]]
    assert sorted(computed.tolist()) == sorted(wanted)


@given(groups())
def test_every_target_stands_one_slot_before_its_token(group):
    successors, trained = [], 0
    for each in group:
        successors += each.input_ids[each.loss_mask].tolist()
        trained += int(each.loss_mask.sum())
    microbatches = pack_group(group, CAPACITY, step=0, epoch=0)
    targets = [target for each in microbatches for target in each.targets[each.targets >= 0]]
    assert sorted(targets) == sorted(successors)
    assert {each.trained_tokens for each in microbatches} == {trained}
    for each in microbatches:
        slots = np.flatnonzero(each.targets >= 0)
        assert (each.targets[slots] == each.input_ids[slots] + 1).all()  # tokens ascend within an example


@given(groups())
def test_tiles_hold_one_sequence_each_and_fit(group):
    microbatches = pack_group(group, CAPACITY, step=0, epoch=0)
    assert [each.closes_group for each in microbatches] == [False] * (len(microbatches) - 1) + [True]
    assert [each.index for each in microbatches] == list(range(len(microbatches)))
    for each in microbatches:
        assert each.slots <= CAPACITY == len(each.targets) == len(each.input_ids) == len(each.positions)
        for start, following, length in zip(each.starts, [*each.starts[1:], each.slots], each.lengths, strict=True):
            assert start % 64 == 0 and start + length <= following
            assert each.positions[start : start + length].tolist() == list(range(length))


@given(st.lists(st.integers(1, 8), min_size=1, max_size=30))
def test_first_fit_decreasing_stays_within_its_bound(sizes):
    bins = first_fit_decreasing(sizes, 8)
    assert sorted(item for each in bins for item in each) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in each) <= 8 for each in bins)
    fewest = -(-sum(sizes) // 8)
    assert len(bins) <= 1.5 * fewest + 1  # two bins that are half empty would have been one


def test_equal_sequences_keep_their_order():
    assert first_fit_decreasing([1, 2, 1, 2, 1], 4) == [[1, 3], [0, 2, 4]]


def test_a_sequence_longer_than_a_microbatch_is_refused():
    dataset = Dataset("rows.jsonl", (example([1, 2], [0, 1], 1), example([1] * 258, [0, *[1] * 257], 7)), 0)
    with pytest.raises(ConfigError, match=r"rows.jsonl, row 7 has 257 tokens .*microbatch_tokens is 256.*max_length"):
        check_lengths(dataset, CAPACITY)
    check_lengths(Dataset("rows.jsonl", (example([1] * 257, [0, *[1] * 256]),), 0), CAPACITY)
