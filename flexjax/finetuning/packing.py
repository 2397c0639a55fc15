"""Packing: the sequences of one optimizer step onto few microbatch axes. It knows no order of data."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flexjax.fields import ConfigError
from flexjax.finetuning.dataset import Dataset, Example
from flexjax.layout import PAGE_TOKENS, tiles_for

NO_TARGET = -1


@dataclass(frozen=True, eq=False)
class PackedMicrobatch:
    """Sequences of one job on one microbatch axis of M slots, each from a multiple of 64, in tiles of their own::

        slots   0            64           128
                | a a a a .. | a a . . .. | b b b . .. |        a has 66 tokens to compute, b has 3

    Attributes:
        examples: the sequences, in the order of their place.
        starts: first slot of each, a multiple of 64.
        capacity: M.
        step: optimizer step that it belongs to, from 0 (evaluation: optimizer steps done before it).
        epoch: pass over the data, from 0.
        index: place among the microbatches of its group.
        closes_group: the update, or the evaluation's mean, follows it.
        trained_tokens: targets in the whole group; the group's loss and gradients are divided by it.
        evaluation: only the loss is wanted.
    """

    examples: tuple[Example, ...]
    starts: tuple[int, ...]
    capacity: int
    step: int
    epoch: int
    index: int
    closes_group: bool
    trained_tokens: int
    evaluation: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens to compute of each sequence, from its position 0."""
        return tuple(each.computed_tokens for each in self.examples)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def slots(self) -> int:
        """Slots up to the end of the last tile in use, a multiple of 64."""
        return self.starts[-1] + tiles_for(self.lengths[-1]) * PAGE_TOKENS

    @property
    def lines(self) -> tuple[int, ...]:
        """Lines of the data file, in order."""
        return tuple(sorted(each.line for each in self.examples))

    @cached_property
    def input_ids(self) -> np.ndarray:
        """int32 [M], 0 in slots without a token."""
        return self._scatter([each.input_ids[: each.computed_tokens] for each in self.examples], 0)

    @cached_property
    def positions(self) -> np.ndarray:
        """int32 [M], place of the token in its sequence, -1 in slots without a token."""
        return self._scatter([np.arange(length) for length in self.lengths], -1)

    @cached_property
    def targets(self) -> np.ndarray:
        """int32 [M], the next token of the sequence where that one is trained, elsewhere -1."""
        return self._scatter([following_targets(each) for each in self.examples], NO_TARGET)

    def _scatter(self, pieces: Sequence[np.ndarray], idle: int) -> np.ndarray:
        axis = np.full(self.capacity, idle, np.int32)
        for start, piece in zip(self.starts, pieces, strict=True):
            axis[start : start + len(piece)] = piece
        axis.setflags(write=False)
        return axis


def following_targets(example: Example) -> np.ndarray:
    following = slice(1, example.computed_tokens + 1)
    return np.where(example.loss_mask[following], example.input_ids[following], NO_TARGET)


def pack_group(
    group: Sequence[Example], capacity: int, step: int, epoch: int, evaluation: bool = False
) -> list[PackedMicrobatch]:
    """Packs the sequences of one group by their tiles, as `pack_bins` says.

    Args:
        capacity: slots of a microbatch, a multiple of 64; every example fits (`check_lengths`).
    """
    bins = pack_bins([tiles_for(each.computed_tokens) for each in group], capacity // PAGE_TOKENS)
    trained_tokens = sum(each.trained_tokens for each in group)
    microbatches = []
    for index, members in enumerate(bins):
        examples = tuple(group[member] for member in members)
        tiles = [tiles_for(each.computed_tokens) for each in examples]
        starts = tuple(PAGE_TOKENS * sum(tiles[:place]) for place in range(len(tiles)))
        place = {"step": step, "epoch": epoch, "index": index, "closes_group": index == len(bins) - 1}
        microbatches.append(
            PackedMicrobatch(examples, starts, capacity, **place, trained_tokens=trained_tokens, evaluation=evaluation)
        )
    return microbatches


def pack_bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``sizes``, each at least 1, in few bins of ``capacity``: filled one by one, or first fit decreasing
    where that makes fewer (a subset that fills its bin can leave sizes that go badly together). In a bin the largest
    first, equals in the order given. The same bins whenever asked.
    """
    filled = fill_one_by_one(sizes, capacity)
    if len(filled) * capacity < sum(sizes) + capacity:  # none could be spared
        return filled
    return min(filled, first_fit_decreasing(sizes, capacity), key=len)


def fill_one_by_one(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Each bin opens with the largest item left and takes those others that leave the least room in it."""
    waiting: dict[int, deque[int]] = {}
    for item in largest_first(sizes):
        waiting.setdefault(sizes[item], deque()).append(item)
    bins = []
    while waiting:
        largest = next(iter(waiting))
        opening = waiting[largest].popleft()
        rest = fullest_subset({size: len(items) for size, items in waiting.items()}, capacity - largest)
        bins.append([opening, *(waiting[size].popleft() for size in rest)])
        waiting = {size: items for size, items in waiting.items() if items}
    return bins


def fullest_subset(counts: Mapping[int, int], room: int) -> list[int]:
    """Sizes whose sum comes closest to ``room`` from below; of several such choices the one of the largest sizes.

    Args:
        counts: how many there are of each size, in falling order of the sizes.

    Which sums the sizes from one on can make are the binary digits of an integer::

        sizes 3 2 2, room 6     none: 1     2: 101     2 2: 10101     3 2 2: 111101 (7 is too much), so 5 = 3 + 2
    """
    offered = [size for size, count in counts.items() for _ in range(min(count, room // size))]
    within = (1 << room + 1) - 1
    sums = [1]
    for size in reversed(offered):
        sums.append((sums[-1] | sums[-1] << size) & within)
    missing = sums[-1].bit_length() - 1
    taken = []
    for size, sums_of_later in zip(offered, reversed(sums[:-1]), strict=True):
        if size <= missing and sums_of_later >> missing - size & 1:
            taken.append(size)
            missing -= size
    return taken


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Each item in the first bin that has room, the largest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in largest_first(sizes):
        fitting = next((each for each, left in enumerate(room) if left >= sizes[item]), len(bins))
        if fitting == len(bins):
            bins.append([])
            room.append(capacity)
        bins[fitting].append(item)
        room[fitting] -= sizes[item]
    return bins


def largest_first(sizes: Sequence[int]) -> list[int]:
    """Indices of ``sizes``, equals in the order given."""
    return sorted(range(len(sizes)), key=lambda item: -sizes[item])


def check_lengths(dataset: Dataset, capacity: int) -> None:
    """Raises ConfigError if a sequence is longer than a microbatch."""
    longest = max(dataset.examples, key=lambda each: each.computed_tokens)
    if longest.computed_tokens > capacity:
        raise ConfigError(
            f"{dataset.source}, row {longest.line} has {longest.computed_tokens} tokens to compute; microbatch_tokens "
            f"is {capacity}: raise it, or lower the job's max_length"
        )
