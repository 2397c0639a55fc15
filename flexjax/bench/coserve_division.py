"""Division: ratios of runs by denominators that were measured later than they. It measures nothing."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexjax.bench.coserve_plan import PARTITION, CoservePlan
from flexjax.bench.coserve_results import (
    RATIOS,
    REFUSED,
    Denominator,
    ResultFolder,
    divided_line,
    missing_lines,
    ratios,
)
from flexjax.bench.report import write_finite
from flexjax.config import from_table
from flexjax.fields import ConfigError


def divide_runs(setup: str, workloads: Path | None, out: Path, show: Callable[[str], None]) -> list[Path]:
    """Divide every run of a set-up that ``out`` has by the denominators that it has now, or else by those that the run
    had; the files.

    Raises:
        ConfigError: there is no run, or its trace is not among the workloads.
    """
    runs = {path: run for path in sorted(out.glob(f"coserve_{setup}_*.json")) if is_run(run := read_run(path), setup)}
    if not runs:
        raise ConfigError(f"{out} has no run of set-up {setup!r}; name the folder with --out, or run a trace first")
    for path, run in runs.items():
        plan = from_table(CoservePlan, run["plan"], str(path))
        had = {name: Denominator(**each) for name, each in run["denominators"].items()}
        found = had | ResultFolder(out, plan, run).denominators(plan.trace(workloads))
        write_finite(path, divided(run, found))
        show("\n  ".join([path.name, *map(divided_line, found.values())]))
    return list(runs)


def divided(run: Mapping[str, Any], found: Mapping[str, Denominator]) -> dict[str, Any]:
    """Results of a run with these denominators instead of those it had."""
    kept = {name: value for name, value in run["metrics"].items() if name not in RATIOS}
    figures = (kept.get(name) for name in ("requests_per_s", "finetune_tokens_per_s", "bound_finetune_tokens_per_s"))
    refused = [note for note in run["notes"] if note.startswith(REFUSED)]
    return {
        **run,
        "metrics": kept | ratios(*figures, found),
        "denominators": {name: asdict(each) for name, each in found.items()},
        "notes": missing_lines(found, run["commit"]) + refused,
    }


def read_run(path: Path) -> dict[str, Any]:
    """Raises ConfigError unless the file is JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not a file of results ({error}); name another folder with --out") from error


def is_run(found: Mapping[str, Any], setup: str) -> bool:
    """A partition is none: it is computed from its denominators."""
    return "workload" in found and found["setup"] == setup and found["policy"] != PARTITION
