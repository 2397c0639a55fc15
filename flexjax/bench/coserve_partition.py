"""Static partition: some GPUs serve, the others finetune. Composed from what each does alone; nothing is run."""

from dataclasses import dataclass

GPUS = 4


@dataclass(frozen=True)
class Partition:
    """Per GPU of all of them.

    Attributes:
        finetuning: how many of `GPUS` finetune.
        rate: requests per second that each GPU that serves gets; holds: it is within the capacity.
        finetune_tokens_per_s: over all GPUs.
        efficiency: as of a co-serving run.
    """

    finetuning: int
    rate: float
    holds: bool
    finetune_tokens_per_s: float
    efficiency: float


def partitions(rate: float, capacity: float, alone: float) -> list[Partition]:
    """With 1, 2, ... of the GPUs finetuning.

    Args:
        rate: requests per second and GPU, all GPUs counted.
        capacity: requests per second that a GPU holds when it only serves; alone: tokens per second of one that only
            finetunes.
    """
    return [partition(each, rate, capacity, alone) for each in range(1, GPUS)]


def partition(finetuning: int, rate: float, capacity: float, alone: float) -> Partition:
    share, served = finetuning / GPUS, rate * GPUS / (GPUS - finetuning)
    return Partition(finetuning, served, served <= capacity, share * alone, rate / capacity + share)


def best_partition(rate: float, capacity: float, alone: float) -> Partition | None:
    """The one that finetunes most among those that hold; None if none does."""
    holding = [each for each in partitions(rate, capacity, alone) if each.holds]
    return max(holding, key=lambda each: each.finetuning, default=None)
