"""Packing: the sequences of one optimizer step onto few microbatch axes. It knows no order of data."""

from collections.abc import Sequence
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
    """Packs the sequences of one group, first fit by falling number of tiles (equals in the order given).

    Args:
        capacity: slots of a microbatch, a multiple of 64; every example fits (`check_lengths`).
    """
    bins = first_fit_decreasing([tiles_for(each.computed_tokens) for each in group], capacity // PAGE_TOKENS)
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


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``sizes`` in bins of ``capacity``, each index in the first bin that has room, the largest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        fitting = next((each for each, left in enumerate(room) if left >= sizes[item]), len(bins))
        if fitting == len(bins):
            bins.append([])
            room.append(capacity)
        bins[fitting].append(item)
        room[fitting] -= sizes[item]
    return bins


def check_lengths(dataset: Dataset, capacity: int) -> None:
    """Raises ConfigError if a sequence is longer than a microbatch."""
    longest = max(dataset.examples, key=lambda each: each.computed_tokens)
    if longest.computed_tokens > capacity:
        raise ConfigError(
            f"{dataset.source}, row {longest.line} has {longest.computed_tokens} tokens to compute; microbatch_tokens "
            f"is {capacity}: raise it, or lower the job's max_length"
        )
