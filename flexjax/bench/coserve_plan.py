"""CoservePlan: what `flexjax bench coserve` replays, against which objective, beside which job, under which policy.

It measures nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flexjax.bench.coserve_metrics import Objective
from flexjax.bench.coserve_trace import Trace, read_trace, recorded_trace
from flexjax.bench.step_model import SHAPES
from flexjax.config import from_table, load_tables
from flexjax.fields import ConfigError, check_range, check_types
from flexjax.finetuning.job import TARGET_MODULES, ordered_modules
from flexjax.scheduler.policies import POLICIES

ALTERNATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "temporal_sharing_64": ("temporal_sharing", {"n": 64}),
    "temporal_sharing_128": ("temporal_sharing", {"n": 128}),
    "temporal_sharing_512": ("temporal_sharing", {"n": 512}),
    "fixed_budget": ("fixed_budget", {"finetune_tokens": 256, "backward_units": 8}),
}
"""Names of their own for a scheduler's policy with options; any other policy goes by its name there."""

ALONE, INFERENCE, PARTITION = "finetune_only", "inference_only", "static_partition"
CHOICES = tuple(dict.fromkeys([*POLICIES, *ALTERNATIVES, PARTITION]))


JOB = "coserve"
"""Name of the first finetuning job."""

JOB_FIELDS = ("rank", "target_modules", "weight")
"""What further jobs may have for themselves."""


@dataclass(frozen=True)
class Recorded:
    """A trace made of recorded arrivals and lengths; see `recorded_trace`."""

    arrivals: str
    lengths: str
    start: float
    seconds: float
    rate: float

    def __post_init__(self):
        check_types(self)


@dataclass(frozen=True)
class CoservePlan:
    """The [bench] table of a configuration.

    Attributes:
        setup: what the figures of this file go by.
        workload: file of the workloads without ``.jsonl``; with ``recorded``, a name for the trace that it makes.
        policy: one of `CHOICES`; policy_options: its options, by that name, over those of `ALTERNATIVES`.
        objective: kind of `flexjax.bench.coserve_metrics.Objective`; objective_ms, ttft_objective_ms: its limits, which
            are co_serve's too unless [engine] has others.
        seconds: beginning of the trace that is replayed, None for all; leave_out_every: this many-th rows are left out.
        count_from: seconds from which rates are counted, to the last arrival.
        drain_seconds: most that the last requests may take; those that take longer are misses.
        shape, layers: as in `StepPlan`, unless [engine] names a model.
        adapters: served; row i of the trace asks adapter i modulo their number. 0: all ask the base model.
        target_modules, rank: of the adapter that is trained, and the rank of those served.
        more_jobs: jobs beside the first, by name: what of ``target_modules``, ``rank`` and ``weight`` they have for
            themselves. All train on the same sequences.
        lengths: file of the workloads with a length of a finetuning sequence in each line; longest: cut off there.
        trained_share: of each sequence, from its end, that has a loss.
        batch_sequences, batch_tokens: of an optimizer step; one of them is given. With 1, one sequence at a time.
        alone_seconds: counted of finetuning alone, after ``alone_warmup``; alone_setup: another set-up with the same
            job, whose figure of finetuning alone is divided by instead.
        capacity_from: requests per second at which the search for the capacity begins; capacity_seconds: of the trace
            in a trial; capacity_precision: ratio of a rate that fails to one that holds at which the search ends;
            capacity_budget: seconds, once the engine has started, in which a command begins trials that can end in it.
        engines: further fields of [engine], by policy; they win over those.
    """

    setup: str
    workload: str
    lengths: str
    objective_ms: float
    ttft_objective_ms: float
    objective: Literal["tpot", "itl"] = "tpot"
    policy: str = "co_serve"
    policy_options: Mapping[str, Mapping] = field(default_factory=dict)
    recorded: Mapping[str, Any] | None = None
    seconds: float | None = None
    leave_out_every: int | None = None
    count_from: float = 40.0
    drain_seconds: float = 120.0
    shape: str = "llama-3.1-8b"
    layers: int | None = None
    adapters: int = 0
    target_modules: tuple[str, ...] = TARGET_MODULES
    rank: int = 16
    longest: int | None = None
    trained_share: float = 1.0
    batch_sequences: int | None = None
    batch_tokens: int | None = None
    alone_seconds: float = 60.0
    alone_warmup: float = 10.0
    alone_setup: str | None = None
    capacity_from: float = 10.0
    capacity_seconds: float = 40.0
    capacity_precision: float = 1.05
    capacity_budget: float = 400.0
    more_jobs: Mapping[str, Mapping] = field(default_factory=dict)
    engines: Mapping[str, Mapping] = field(default_factory=dict)

    def __post_init__(self):
        check_types(self)
        ordered_modules(self.target_modules)
        self._check_jobs()
        for name in ("objective_ms", "ttft_objective_ms", "seconds", "drain_seconds", "alone_seconds"):
            check_range(self, name, 0.0, open_low=True)
        for name in ("capacity_from", "capacity_seconds", "capacity_budget"):
            check_range(self, name, 0.0, open_low=True)
        for name in ("count_from", "alone_warmup", "adapters"):
            check_range(self, name, 0)
        for name in ("layers", "rank", "batch_sequences", "batch_tokens"):
            check_range(self, name, 1)
        for name in ("leave_out_every", "longest"):
            check_range(self, name, 2)
        check_range(self, "trained_share", 0.0, 1.0, open_low=True)
        check_range(self, "capacity_precision", 1.0, open_low=True)
        self._check_names()
        if self.alone_setup == self.setup:
            raise ConfigError(f"alone_setup is {self.setup!r}, this set-up itself; leave it out")

    def _check_jobs(self) -> None:
        for name, own in self.more_jobs.items():
            if unknown := sorted(set(own) - set(JOB_FIELDS)):
                raise ConfigError(f"job {name!r} of more_jobs has {', '.join(unknown)}; it may have {JOB_FIELDS}")
            if name == JOB:
                raise ConfigError(f"more_jobs has a job {name!r}, which is the name of the first")

    def _check_names(self) -> None:
        for name in (self.policy, *self.policy_options, *self.engines):
            if name not in CHOICES:
                raise ConfigError(f"policy is {name!r}; it must be one of {', '.join(CHOICES)}")
        if self.shape not in SHAPES:
            raise ConfigError(f"shape is {self.shape!r}; it must be one of {', '.join(SHAPES)}")
        if (self.batch_sequences is None) == (self.batch_tokens is None):
            raise ConfigError(
                f"batch_sequences is {self.batch_sequences} and batch_tokens is {self.batch_tokens}; one of them says "
                "what an optimizer step takes"
            )

    @property
    def limits(self) -> Objective:
        return Objective(self.objective, self.objective_ms / 1e3, self.ttft_objective_ms / 1e3)

    def engine_policy(self, policy: str) -> tuple[str, dict[str, Any]]:
        """Name of the scheduler's policy, and its options."""
        name, options = ALTERNATIVES.get(policy, (policy, {}))
        return name, {**options, **self.policy_options.get(policy, {})}

    def trace(self, workloads: Path | None) -> Trace:
        """What is replayed. Raises ConfigError if it is not among the workloads or cannot be used."""
        if self.recorded is None:
            trace = read_trace(self.workload_file(workloads, f"{self.workload.removesuffix('.jsonl')}.jsonl"))
        else:
            made = vars(from_table(Recorded, self.recorded, "[bench.recorded]"))
            files = {name: self.workload_file(workloads, made[name]) for name in ("arrivals", "lengths")}
            trace = recorded_trace(self.workload, **made | files)
        if self.leave_out_every is not None:
            trace = trace.without_every(self.leave_out_every)
        return trace if self.seconds is None else trace.first(self.seconds)

    def counted_trace(self, workloads: Path | None) -> Trace:
        """The same, with a time in which rates can be counted. Raises ConfigError without."""
        trace = self.trace(workloads)
        if trace.seconds <= self.count_from:
            raise ConfigError(
                f"rates are counted from {self.count_from:g} s on, but the last request of {trace.name} arrives at "
                f"{trace.seconds:g} s; lower count_from (--count-from) or replay more of the trace"
            )
        return trace

    def sequence_lengths(self, workloads: Path | None) -> list[int]:
        """Tokens of the finetuning sequences."""
        lengths = [int(line) for line in self.workload_file(workloads, self.lengths).read_text().split()]
        longest = self.longest or max(lengths)
        return [max(2, min(length, longest)) for length in lengths]

    def workload_file(self, workloads: Path | None, name: str) -> Path:
        """Raises ConfigError without one."""
        if workloads is None:
            raise ConfigError(f"{name} is wanted, but no folder of workloads is given; give --workloads DIR")
        if not (workloads / name).is_file():
            raise ConfigError(
                f"{workloads / name} does not exist; --workloads DIR names the folder, and --workload NAME, or "
                "workload and lengths of [bench], the files"
            )
        return workloads / name


def read_coserve_plan(path: str, **overrides: Any) -> tuple[CoservePlan, dict[str, Any]]:
    """The plan, with what is not None of ``overrides`` instead, and the [engine] table, of a configuration.

    Raises:
        ConfigError: the file cannot be used.
    """
    tables = load_tables(path)
    plan = from_table(CoservePlan, tables.get("bench", {}), f"{path} [bench]")
    chosen = {name: value for name, value in overrides.items() if value is not None}
    if "workload" in chosen and plan.recorded is not None:
        chosen["recorded"] = None
    return replace(plan, **chosen), dict(tables.get("engine", {}))
