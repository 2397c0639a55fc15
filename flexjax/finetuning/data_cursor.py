"""DataCursor: a job's microbatches one after another, from any place on. It knows no results and no status."""

import dataclasses
from dataclasses import dataclass

from flexjax.finetuning.data_order import DataOrder
from flexjax.finetuning.dataset import Dataset, Example
from flexjax.finetuning.job import FinetuneJob
from flexjax.finetuning.packing import PackedMicrobatch, check_lengths, pack_group
from flexjax.layout import PAGE_TOKENS, tiles_for


@dataclass(frozen=True)
class Position:
    """Place of the next microbatch.

    Attributes:
        step: optimizer step, from 0.
        evaluating: the step is trained and the evaluation split after it is being read.
        index: microbatch in the group of that step, or of the evaluation split.
    """

    step: int = 0
    evaluating: bool = False
    index: int = 0


class DataCursor:
    """Training groups in the order of `DataOrder`; after each epoch and every ``evaluate_every`` steps the
    evaluation split, as a group of its own.

    Attributes:
        order: which examples make which optimizer step.
        position: of the microbatch that ``peek`` shows; may be set to go on from there.

    Raises:
        ConfigError: a sequence is longer than ``capacity``, the slots of a microbatch.
    """

    def __init__(self, job: FinetuneJob, train: Dataset, validation: Dataset | None, capacity: int):
        for dataset in filter(None, (train, validation)):
            check_lengths(dataset, capacity)
        self.order = DataOrder(
            [tiles_for(example.computed_tokens) * PAGE_TOKENS for example in train.examples],
            seed=job.seed,
            epochs=job.epochs,
            batch_size=job.batch_size,
            batch_tokens=job.batch_tokens,
            max_steps=job.max_steps,
        )
        self.capacity = capacity
        self.position = Position()
        self._train, self._validation = train, validation
        self._evaluate_every = job.evaluate_every
        self._packed: tuple[Position, list[PackedMicrobatch]] | None = None

    @property
    def exhausted(self) -> bool:
        return self.position.step == self.order.total_steps

    def peek(self, ahead: int = 0) -> PackedMicrobatch | None:
        """The microbatch ``ahead`` places after the next one, None at the end or if its group ends before. It is the
        same object until ``advance`` has passed it."""
        if self.exhausted:
            return None
        first = dataclasses.replace(self.position, index=0)
        if self._packed is None or self._packed[0] != first:
            self._packed = (first, self._pack(first))
        place = self.position.index + ahead
        return self._packed[1][place] if place < len(self._packed[1]) else None

    def advance(self) -> None:
        """Moves past the microbatch that ``peek`` shows."""
        microbatch = self.peek()
        assert microbatch is not None, "no microbatch is left"
        step, evaluating, index = dataclasses.astuple(self.position)
        if not microbatch.closes_group:
            self.position = Position(step, evaluating, index + 1)
        elif not evaluating and self._evaluates_after(step):
            self.position = Position(step, evaluating=True)
        else:
            self.position = Position(step + 1)

    def examples_of(self, step: int) -> list[Example]:
        """What optimizer step ``step`` (from 0) trains on."""
        return [self._train.examples[index] for index in self.order.group(step)]

    def _pack(self, first: Position) -> list[PackedMicrobatch]:
        epoch = self.order.epoch_of(first.step)
        if first.evaluating:
            return pack_group(self._validation.examples, self.capacity, first.step + 1, epoch, evaluation=True)
        return pack_group(self.examples_of(first.step), self.capacity, first.step, epoch)

    def _evaluates_after(self, step: int) -> bool:
        every = self._evaluate_every
        due = self.order.ends_epoch(step) or (every is not None and (step + 1) % every == 0)
        return self._validation is not None and due
