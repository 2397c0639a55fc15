"""What the engine remembers of its iterations, in plain numbers."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flexjax.scheduler import Iteration, UnitKind


class IterationRecord(NamedTuple):
    """One iteration of the engine.

    Attributes:
        index: 0, 1, ... in the order of dispatch.
        start: seconds since the run began.
        seconds: what it took.
        predicted: seconds foretold by the latency model, None without one.
        limit: seconds that the scheduler allowed, None without an objective.
        decode_slots: rows that decoded.
        prompt_slots: prompt tokens computed.
        finetune_slots: finetuning tokens computed in the forward step.
        loss_units, backward_units, updates: calls of these programs.
        inference_share: part of the time owed to requests, 0 .. 1; the rest is finetuning's.
        context_tokens: key positions read, as in `Iteration`; reports of older versions do not have them.
        unit_share: part of the time owed to units (loss, backward, update), 0 .. 1, as predicted; nor this.
    """

    index: int
    start: float
    seconds: float
    predicted: float | None
    limit: float | None
    decode_slots: int
    prompt_slots: int
    finetune_slots: int
    loss_units: int
    backward_units: int
    updates: int
    inference_share: float
    context_tokens: int = 0
    unit_share: float = 0.0

    @property
    def end(self) -> float:
        return self.start + self.seconds

    @property
    def finetunes(self) -> bool:
        return bool(self.finetune_slots or self.loss_units or self.backward_units or self.updates)

    @property
    def split(self) -> tuple[float, float, float]:
        """Seconds of decoding, prompts and finetuning; inference's part goes to slots alike."""
        inference = self.seconds * self.inference_share
        decode = inference * self.decode_slots / max(self.decode_slots + self.prompt_slots, 1)
        return decode, inference - decode, self.seconds - inference

    @property
    def parts(self) -> tuple[float, float, float, float]:
        """As `split`, with finetuning's time divided into that of its forward windows and that of its units."""
        decode, prompt, finetune = self.split
        units = min(finetune, self.seconds * self.unit_share) if self.finetune_slots else finetune
        return decode, prompt, finetune - units, units


class SettledMicrobatch(NamedTuple):
    """A microbatch whose backward pass has ended.

    Attributes:
        iteration: index of the one in which it ended.
        tokens: that went through the model, padding left out; trained_tokens: that have a loss.
        lean: its tape kept less, for want of pages.
    """

    job: str
    iteration: int
    tokens: int
    trained_tokens: int
    lean: bool = False


class History[Record: tuple](Sequence):
    """The newest records of a kind, the oldest of them first. It is appended to by one thread and read by any, but for
    `reversed`, which only that thread may use. It has no slices.

    They are kept as plain tuples, which the interpreter does not search for garbage if all they hold is numbers and
    text. Of 100,000 objects of any class of our own a search took 15 ms, in which every row waits.

    Args:
        kind: a named tuple of such values.
        most: so many are kept.
    """

    def __init__(self, kind: type[Record], most: int):
        self._kind, self._kept = kind, deque(maxlen=most)

    def append(self, record: Record) -> None:
        self._kept.append(tuple(record))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, place: int) -> Record:
        return self._kind._make(self._kept[place])

    def __iter__(self) -> Iterator[Record]:
        """Those that are there now, whatever is appended meanwhile."""
        return map(self._kind._make, tuple(self._kept))

    def __reversed__(self) -> Iterator[Record]:
        """The newest first, made one by one."""
        return map(self._kind._make, reversed(self._kept))


def record_of(iteration: Iteration, start: float, seconds: float, serving_seconds: float) -> IterationRecord:
    """The record of a finished iteration.

    Args:
        start: seconds since the engine started.
        serving_seconds: what the requests of it would have taken alone, as predicted.
    """
    kinds = [unit.kind for unit in iteration.units]
    finetunes = bool(iteration.windows or iteration.units)
    share = min(1.0, serving_seconds / iteration.predicted) if finetunes else 1.0
    return IterationRecord(
        index=iteration.index,
        start=start,
        seconds=seconds,
        predicted=iteration.predicted,
        limit=iteration.limit,
        decode_slots=iteration.decode_slots,
        prompt_slots=iteration.prompt_slots,
        finetune_slots=iteration.finetuning_slots,
        loss_units=kinds.count(UnitKind.LOSS),
        backward_units=kinds.count(UnitKind.BACKWARD),
        updates=kinds.count(UnitKind.UPDATE),
        inference_share=share if iteration.decode or iteration.prompts else 0.0,
        context_tokens=iteration.context_tokens,
        unit_share=min(1.0, iteration.unit_seconds / iteration.predicted) if iteration.units else 0.0,
    )
