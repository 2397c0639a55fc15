"""OwnerLimits: what one owner may take up at a time. Plain values; `flexjax.server.limits` holds owners to them."""

from dataclasses import dataclass

from flexjax.fields import check_range, check_types


@dataclass(frozen=True)
class OwnerLimits:
    """Of the numbers, 0 is no limit.

    Attributes:
        max_sequences: that run or wait for a row.
        max_unfinished_jobs: fine-tuning jobs that have not ended, those that are paused or wait among them.
        max_total_file_bytes: of files together, results of jobs included; those are written all the same.
        best_priority: the smallest that a request may ask for, None is no limit. One that asks for none has 0, or
            this where it is larger.
        max_job_weight: the largest that a job may ask for. One that asks for none has FinetuneJob's, or this where it
            is smaller.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
    """

    max_sequences: int = 0
    max_unfinished_jobs: int = 0
    max_total_file_bytes: int = 0
    best_priority: int | None = None
    max_job_weight: float = 0.0

    def __post_init__(self):
        check_types(self)
        for name in ("max_sequences", "max_unfinished_jobs", "max_total_file_bytes"):
            check_range(self, name, 0)
        check_range(self, "max_job_weight", 0.0)
