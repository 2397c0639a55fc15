"""Packing: every token once, each sequence in tiles of its own, one normaliser for the whole group."""

import itertools

import numpy as np
import pytest
from hypothesis import example as case
from hypothesis import given
from hypothesis import strategies as st

from flexjax.fields import ConfigError
from flexjax.finetuning.dataset import Dataset, Example
from flexjax.finetuning.packing import check_lengths, fullest_subset, pack_bins, pack_group

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


def bins_of_first_fit_decreasing(sizes, capacity):
    rooms = []
    for size in sorted(sizes, reverse=True):
        roomy = [number for number, room in enumerate(rooms) if room >= size]
        if roomy:
            rooms[roomy[0]] -= size
        else:
            rooms.append(capacity - size)
    return len(rooms)


@given(st.lists(st.integers(1, 16), max_size=40))
@case([8, 6, 6, 6, 6, 6, 4, 4])  # 8 + 4 + 4 fills one bin and leaves five 6 to three more
def test_bins_hold_every_item_once_and_are_no_more_than_first_fit_decreasing_needs(sizes):
    bins = pack_bins(sizes, 16)
    assert sorted(item for each in bins for item in each) == list(range(len(sizes)))
    assert all(0 < sum(sizes[item] for item in each) <= 16 for each in bins)
    assert len(bins) <= bins_of_first_fit_decreasing(sizes, 16)


def test_a_bin_takes_what_fills_it_rather_than_what_is_largest():
    """First fit decreasing would pair the 4s and need a third bin."""
    assert pack_bins([3, 4, 3, 3, 4, 3], 10) == [[1, 0, 2], [4, 3, 5]]


def test_only_the_last_bin_is_part_filled_where_small_sequences_abound():
    sizes = np.random.default_rng(0).integers(1, 20, 1000).tolist()
    fills = [sum(sizes[item] for item in each) for each in pack_bins(sizes, 64)]
    assert set(fills[:-1]) == {64} and fills[-1] == sum(sizes) - 64 * (len(fills) - 1)


def test_equal_sequences_keep_their_order():
    assert pack_bins([1, 2, 1, 2, 1], 4) == [[1, 3], [0, 2, 4]]


@given(st.lists(st.integers(1, 12), max_size=8), st.integers(0, 30))
def test_no_other_subset_is_fuller(sizes, room):
    falling = sorted(sizes, reverse=True)
    subsets = [taken for number in range(len(sizes) + 1) for taken in itertools.combinations(falling, number)]
    fitting = [taken for taken in subsets if sum(taken) <= room]
    fullest = max(map(sum, fitting))
    counts = {size: falling.count(size) for size in falling}
    assert tuple(fullest_subset(counts, room)) == max(taken for taken in fitting if sum(taken) == fullest)


def test_a_sequence_longer_than_a_microbatch_is_refused():
    dataset = Dataset("rows.jsonl", (example([1, 2], [0, 1], 1), example([1] * 258, [0, *[1] * 257], 7)), 0)
    with pytest.raises(ConfigError, match=r"rows.jsonl, row 7 has 257 tokens .*microbatch_tokens is 256.*max_length"):
        check_lengths(dataset, CAPACITY)
    check_lengths(Dataset("rows.jsonl", (example([1] * 257, [0, *[1] * 256]),), 0), CAPACITY)
