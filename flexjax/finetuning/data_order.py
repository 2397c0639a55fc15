"""DataOrder: which examples make which optimizer step of a job. It knows no tokens, only lengths."""

import bisect
import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class DataOrder:
    """Groups of example indices, one group an optimizer step, the same ones whenever asked.

    Each epoch is a permutation drawn from (seed, epoch) alone, cut into groups of ``batch_size`` sequences, or of as
    many as ``batch_tokens`` tokens hold (at least one). The last group of an epoch may be smaller; none crosses epochs.

    Args:
        lengths: tokens of each example.
        max_steps: exact number of steps, over as many epochs as that takes; None runs ``epochs``.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        seed: int,
        epochs: int,
        batch_size: int,
        batch_tokens: int | None = None,
        max_steps: int | None = None,
    ):
        self._lengths = lengths
        self._seed = seed
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self._groups_of = lru_cache(maxsize=2)(self._cut_epoch)
        self._ends = self._epoch_ends(epochs, max_steps)

    @property
    def total_steps(self) -> int:
        return self._ends[-1]

    def epoch_of(self, step: int) -> int:
        return bisect.bisect_right(self._ends, step)

    def ends_epoch(self, step: int) -> bool:
        """Whether ``step`` is the last of its epoch, or of the job."""
        return self._ends[self.epoch_of(step)] == step + 1

    def group(self, step: int) -> tuple[int, ...]:
        """Example indices of optimizer step ``step``, in data order."""
        epoch = self.epoch_of(step)
        first = self._ends[epoch - 1] if epoch else 0
        return self._groups_of(epoch)[step - first]

    def _epoch_ends(self, epochs: int, max_steps: int | None) -> list[int]:
        """Steps done at the end of each epoch."""
        if max_steps is None:
            return list(itertools.accumulate(self._count_groups(epoch) for epoch in range(epochs)))
        ends = [self._count_groups(0)]
        while ends[-1] < max_steps:
            ends.append(ends[-1] + self._count_groups(len(ends)))
        return [*ends[:-1], max_steps]

    def _count_groups(self, epoch: int) -> int:
        if self._batch_tokens is None:
            return -(-len(self._lengths) // self._batch_size)
        return len(self._groups_of(epoch))

    def _cut_epoch(self, epoch: int) -> list[tuple[int, ...]]:
        random = np.random.Generator(np.random.Philox([self._seed, epoch]))
        permutation = random.permutation(len(self._lengths)).tolist()
        if self._batch_tokens is None:
            size = self._batch_size
            return [tuple(permutation[start : start + size]) for start in range(0, len(permutation), size)]
        return [tuple(group) for group in self._cut_by_tokens(permutation)]

    def _cut_by_tokens(self, permutation: Sequence[int]) -> list[list[int]]:
        groups: list[list[int]] = []
        held = 0
        for index in permutation:
            length = self._lengths[index]
            if not groups or held + length > self._batch_tokens:
                groups.append([])
                held = 0
            groups[-1].append(index)
            held += length
        return groups
