"""Job: a finetuning job that the engine knows, and its adapter in the shapes that programs have."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from flexjax.engine.adapters import AdapterVersion
from flexjax.engine.programs import JobShape
from flexjax.finetuning.job import FinetuneJob
from flexjax.finetuning.job_run import JobRun
from flexjax.finetuning.packing import PackedMicrobatch
from flexjax.scheduler.cursor import Microbatch
from flexjax.state import padded_rank
from flexjax.steps.update import OptimizerSpec
from flexjax.weights.adapter import LoraAdapter
from flexjax.weights.checkpoint import CheckpointInfo

ShowCheckpoint = Callable[[int, LoraAdapter, list[dict]], None]
"""Takes a checkpoint's step, its adapter and the job's events up to it."""

ShowTrained = Callable[[LoraAdapter], None]
"""Takes the adapter of a job that succeeds."""


@dataclass(eq=False)
class Job:
    """A job that the engine knows.

    Attributes:
        show_checkpoint, show_trained: see `Engine.finetune`.
        adapter: where it starts from; checkpoint: where it goes on from, None at the beginning.
        losses: of the group being read, by (microbatch, window); norm: of its update, once read.
        version: where its adapter lies on the device, or waits for a place; None before the job is admitted.
        packed: microbatches whose results are still to be read, by id.
        current: those that still have units to dispatch, the oldest first.
        steps: optimizer steps dispatched; saved: those in the newest checkpoint.
    """

    run: JobRun
    adapter: LoraAdapter
    checkpoint: CheckpointInfo | None = None
    show_checkpoint: ShowCheckpoint | None = None
    show_trained: ShowTrained | None = None
    version: AdapterVersion | None = None
    losses: dict[tuple[int, int], float] = field(default_factory=dict)
    norm: float | None = None
    packed: dict[int, PackedMicrobatch] = field(default_factory=dict)
    current: list[Microbatch] = field(default_factory=list)
    steps: int = 0
    saved: int = 0

    def __post_init__(self):
        self.steps = self.saved = len(self.run.losses)

    @property
    def due(self) -> bool:
        """A checkpoint is to be written before the next group begins."""
        every = self.run.job.checkpoint_every
        return every is not None and self.steps % every == 0 and self.steps != self.saved

    @property
    def name(self) -> str:
        return self.run.job.name

    @property
    def show(self) -> Callable[[int, dict, dict], None] | None:
        """What `Checkpoints.save` calls."""
        if self.show_checkpoint is None:
            return None
        adapter = self.adapter
        return lambda step, arrays, state: self.show_checkpoint(
            step, without_padding(adapter, arrays["a"], arrays["b"]), state["events"]
        )


def optimizer_of(run: JobRun) -> OptimizerSpec:
    return OptimizerSpec(run.job.optimizer, run.job.weight_decay, run.job.max_grad_norm)


def shape_of(job: FinetuneJob, adapter: LoraAdapter) -> JobShape:
    return JobShape(padded_rank(adapter.rank), adapter.target_modules, job.dropout > 0)


def padded_factors(adapter: LoraAdapter, rank: int) -> dict[str, dict[str, np.ndarray]]:
    """{"a": module -> [layers, in, rank], "b": module -> [layers, rank, out]}, zero beyond the adapter's own rank."""
    extra = rank - adapter.rank
    return {
        "a": {name: np.pad(a, ((0, 0), (0, 0), (0, extra))) for name, (a, _) in adapter.weights.items()},
        "b": {name: np.pad(b, ((0, 0), (0, extra), (0, 0))) for name, (_, b) in adapter.weights.items()},
    }


def without_padding(adapter: LoraAdapter, a: dict, b: dict) -> LoraAdapter:
    """The adapter with the weights of a master, whose rank axis `padded_factors` made longer."""
    columns = lambda factor, axis: np.take(np.asarray(factor), range(adapter.rank), axis=axis)
    return adapter.with_weights({name: (columns(a[name], 2), columns(b[name], 1)) for name in a})


def lowest_adapted_layer(adapter: LoraAdapter) -> int:
    """The backward pass ends there."""
    return min(layer for terms in adapter.terms.values() for layer, term in enumerate(terms) if term is not None)
