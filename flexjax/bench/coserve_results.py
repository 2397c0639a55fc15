"""The files of co-serving results, one per run and per denominator of its ratios: where they lie and who used which."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexjax.bench.coserve_plan import CoservePlan
from flexjax.bench.coserve_trace import Trace
from flexjax.bench.results import write_results
from flexjax.fields import ConfigError

CAPACITY, ALONE = "capacity_requests_per_s", "alone_finetune_tokens_per_s"
RATIOS = ("finetune_kept", "efficiency", "bound_efficiency")

REFUSED, STOPPED = "requests were refused", "told to stop"
"""How the notes begin that say so."""

DECIDES = {
    CAPACITY: ("objective", "objective_ms", "ttft_objective_ms", "adapters", "rank"),
    ALONE: ("target_modules", "rank", "lengths", "longest", "batch_sequences", "batch_tokens", "more_jobs"),
}
"""Fields of the plan that a denominator depends on."""


@dataclass(frozen=True)
class Denominator:
    """A figure that others are divided by.

    Attributes:
        metric: its name; file: of the results that it comes from; commit: at which it was measured.
    """

    metric: str
    value: float
    file: str
    commit: str | None


@dataclass(frozen=True)
class ResultFolder:
    """Attributes:
    facts: of the device and the versions, see `device_facts`; with "model" in words.
    """

    path: Path
    plan: CoservePlan
    facts: Mapping[str, Any]
    implementations: Mapping[str, str] = field(default_factory=dict)

    def run_file(self, trace: Trace, policy: str) -> Path:
        return self.path / f"coserve_{self.plan.setup}_{trace.name}_{policy}.json"

    def capacity_file(self, trace: Trace) -> Path:
        return self.path / f"coserve_{self.plan.setup}_{trace.shape}_capacity.json"

    @property
    def alone_file(self) -> Path:
        return self.path / f"coserve_{self.plan.alone_setup or self.plan.setup}_alone.json"

    def denominators(self, trace: Trace) -> dict[str, Denominator]:
        """By metric; those measured on this device with this model, to this plan."""
        wanted = ((self.capacity_file(trace), CAPACITY), (self.alone_file, ALONE))
        found = (self._denominator(*each) for each in wanted)
        return {each.metric: each for each in found if each is not None}

    def write(
        self, file: Path, metrics: Mapping[str, float], cases: Sequence[Mapping] = (), **more: Any
    ) -> dict[str, Any]:
        """Write a file in the form of every benchmark's results; ``more`` are entries of its own."""
        facts = {**self.facts, "setup": self.plan.setup, "plan": vars(self.plan), **more}
        return write_results(file, facts, self.implementations, metrics, cases)

    def earlier(self, file: Path) -> dict[str, Any] | None:
        """Results of an earlier run on this device with this model; None if there are none.

        Raises:
            ConfigError: the file is something else.
        """
        if not file.is_file():
            return None
        found = read_results(file)
        return found if all(found.get(name) == self.facts[name] for name in ("device", "model")) else None

    def _denominator(self, file: Path, metric: str) -> Denominator | None:
        found = self.earlier(file)
        return None if found is None or not self.holds(found, metric) else self.denominator_of(found, file, metric)

    @staticmethod
    def denominator_of(found: Mapping[str, Any], file: Path, metric: str) -> Denominator:
        return Denominator(metric, found["metrics"][metric], file.name, found["commit"])

    def holds(self, found: Mapping[str, Any], metric: str) -> bool:
        """Whether results have a denominator of this plan."""
        plan = {name: listed(getattr(self.plan, name)) for name in DECIDES[metric]}
        same = all(found["plan"].get(name) == value for name, value in plan.items())
        return same and bool(found["metrics"].get(metric))


def read_results(file: Path) -> dict[str, Any]:
    """Raises ConfigError unless the file is JSON."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not a file of results ({error}); name another folder with --out") from error


def listed(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def ratios(
    rate: float, tokens: float | None, bound: float | None, found: Mapping[str, Denominator]
) -> dict[str, float]:
    """`RATIOS`, each if its denominators are known.

    Args:
        rate: requests per second that were held; tokens: finetuning tokens per second, None without a job.
        bound: finetuning tokens per second that conservation leaves, see `flexjax.bench.coserve_bound`, or None.
    """
    made = {}
    if tokens is not None and ALONE in found:
        made["finetune_kept"] = tokens / found[ALONE].value
    if CAPACITY in found and (tokens is None or "finetune_kept" in made):
        made["efficiency"] = rate / found[CAPACITY].value + made.get("finetune_kept", 0.0)
    if CAPACITY in found and ALONE in found and bound is not None:
        made["bound_efficiency"] = rate / found[CAPACITY].value + bound / found[ALONE].value
    return made


def divided_line(found: Denominator) -> str:
    return f"divided by {found.metric} {found.value:,.4g} of {found.file}"


def missing_lines(found: Mapping[str, Denominator], commit: str | None, alone_setup: str | None = None) -> list[str]:
    """What stands in the way of a ratio, or in doubt, in words.

    Args:
        commit: of the run; alone_setup: of its plan.
    """
    alone = "--alone" if alone_setup is None else f"--alone and the file of set-up {alone_setup!r}"
    how = {CAPACITY: ("efficiency", "--capacity"), ALONE: ("finetune_kept and efficiency", alone)}
    lines = []
    for metric, (ratio, option) in how.items():
        if metric not in found:
            measured = f"{metric} has not been measured for this set-up on this device"
            lines.append(f"no {ratio}: {measured}; run the command with {option}")
        elif found[metric].commit != commit:
            lines.append(f"{metric} is of commit {found[metric].commit}, this run of {commit}")
    return lines
