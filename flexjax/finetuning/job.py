"""FinetuneJob: what a user asks of a finetuning job, and the states it passes through. It knows no jax and no data."""

import enum
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flexjax.config import PATH, PATH_OR_NAME
from flexjax.fields import ConfigError, check_range, check_types

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DECAYING_OPTIMIZERS = ("adamw", "lion")


@dataclass(frozen=True)
class FinetuneJob:
    """A LoRA adapter to train.

    Attributes:
        name: of the adapter, as requests will ask for it.
        data: JSONL path or iterable of rows ``{"messages"}``, ``{"prompt", "completion"}`` or
            ``{"input_ids", "loss_mask"}``.
        validation: rows of the evaluation split, in the same forms.
        alpha: the adapter's product is multiplied by ``alpha / rank`` (``alpha / sqrt(rank)`` with ``use_rslora``).
        target_modules: names of linear layers, or "all-linear"; kept in the model's order.
        init_adapter: PEFT directory or name of a loaded adapter to start from; None starts a fresh one.
        learning_rate: peak; ``schedule`` falls from it to zero over the job's steps after ``warmup_steps``.
        max_steps: exact number of optimizer steps, over as many epochs as it takes; None runs ``epochs``.
        batch_tokens: an optimizer step takes sequences up to this many slots, each in whole tiles of 64 as it is
            computed, so that steps of full microbatches come out full; None takes ``batch_size`` sequences.
        max_length: longer rows are cut off there; None takes the largest that a microbatch holds.
        max_grad_norm: global norm to clip to; None does not clip.
        train_on: "assistant" trains completions and the assistant's messages but those with ``"weight": 0``, "all"
            every token. The ``loss_mask`` of a row of token ids always decides for itself.
        weight: share of the finetuning room among the jobs that run.
        checkpoint_every, evaluate_every: optimizer steps between two; None checkpoints only when stopped or done
            and evaluates at the end of each epoch.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
    """

    name: str
    data: str | os.PathLike | Iterable[Mapping[str, Any]] = field(metadata=PATH)
    validation: str | os.PathLike | Iterable[Mapping[str, Any]] | None = field(default=None, metadata=PATH)
    rank: int = 16
    alpha: float = 32
    use_rslora: bool = False
    dropout: float = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = TARGET_MODULES
    init_adapter: str | os.PathLike | None = field(default=None, metadata=PATH_OR_NAME)
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    epochs: int = 1
    max_steps: int | None = None
    batch_tokens: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor", "rmsprop"] = "adamw"
    train_on: Literal["assistant", "all"] = "assistant"
    seed: int = 0
    weight: float = 1.0
    checkpoint_every: int | None = None
    evaluate_every: int | None = None

    def __post_init__(self):
        check_types(self)
        if not self.name.strip() or "/" in self.name or self.name in (".", ".."):
            raise ConfigError(f"name is {self.name!r}; it names a folder, so it must be text without '/'")
        if isinstance(self.data, Mapping) or self.data == "":
            raise ConfigError(f"data is {self.data!r}; it must be a JSONL path or an iterable of rows")
        check_range(self, "dropout", 0.0, 1.0, open_high=True)
        for name in ("rank", "epochs", "max_steps", "batch_tokens", "batch_size", "checkpoint_every", "evaluate_every"):
            check_range(self, name, 1)
        for name in ("learning_rate", "warmup_steps", "weight_decay", "seed"):
            check_range(self, name, 0)
        for name in ("alpha", "max_grad_norm", "weight"):
            check_range(self, name, 0.0, open_low=True)
        check_range(self, "max_length", 2)
        object.__setattr__(self, "target_modules", ordered_modules(self.target_modules))
        self._check_weight_decay()

    def _check_weight_decay(self) -> None:
        if self.weight_decay and self.optimizer not in DECAYING_OPTIMIZERS:
            raise ConfigError(
                f"weight_decay is {self.weight_decay}, but optimizer {self.optimizer!r} has none; "
                f"use {' or '.join(DECAYING_OPTIMIZERS)}"
            )

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied by (Hu et al. 2021; rsLoRA: Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def ordered_modules(names: tuple[str, ...] | str) -> tuple[str, ...]:
    if names == "all-linear":
        return TARGET_MODULES
    unknown = [name for name in names if name not in TARGET_MODULES]
    if unknown or not names:
        raise ConfigError(f"target_modules is {list(names)}; it must hold one or more of {', '.join(TARGET_MODULES)}")
    return tuple(name for name in TARGET_MODULES if name in names)


class JobStatus(enum.StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS = {
    JobStatus.QUEUED: {JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.RUNNING: {JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.PAUSED: {JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.SUCCEEDED: set(),
    JobStatus.FAILED: set(),
    JobStatus.CANCELLED: set(),
}
"""Which status may follow which. A paused job goes back to the queue if it had not begun."""
