"""Division: ratios of runs by denominators that were measured later than they. It measures nothing."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexjax.bench.coserve_plan import PARTITION, CoservePlan
from flexjax.bench.coserve_results import (
    RATIOS,
    REFUSED,
    STOPPED,
    Denominator,
    ResultFolder,
    divided_line,
    missing_lines,
    ratios,
    read_results,
)
from flexjax.bench.report import write_finite
from flexjax.config import from_table
from flexjax.fields import ConfigError

PARTS = ("plan", "metrics", "denominators", "notes", "device", "model", "commit")


def divide_runs(setup: str, workloads: Path | None, out: Path, show: Callable[[str], None]) -> list[Path]:
    """Divide every run of a set-up that ``out`` has by the denominators that it has now, or else by those that the run
    had; the files. A partition is none of them: it is computed from denominators, and has to be computed anew.

    Raises:
        ConfigError: there is no run, its trace is not among the workloads, or a file is not whole; none was written.
    """
    found = {path: read_results(path) for path in sorted(out.glob(f"coserve_{setup}_*.json"))}
    runs = {path: run for path, run in found.items() if is_run(run, setup)}
    if not runs:
        raise ConfigError(f"{out} has no run of set-up {setup!r}; name the folder with --out, or run a trace first")
    made = {path: divided(run, denominators(path, run, workloads)) for path, run in runs.items()}
    for path, run in made.items():  # all of them can be divided
        write_finite(path, run)
        show("\n  ".join([path.name, *(divided_line(Denominator(**each)) for each in run["denominators"].values())]))
    return list(made)


def denominators(path: Path, run: Mapping[str, Any], workloads: Path | None) -> dict[str, Denominator]:
    """Of a run in the file ``path``: those beside it, or else those that it had."""
    if missing := [name for name in PARTS if name not in run]:
        raise ConfigError(f"{path} has no {', '.join(missing)}: another version wrote it; move it away or run it again")
    plan = from_table(CoservePlan, run["plan"], str(path))
    had = {name: Denominator(**each) for name, each in run["denominators"].items()}
    return had | ResultFolder(path.parent, plan, run).denominators(plan.trace(workloads))


def divided(run: Mapping[str, Any], found: Mapping[str, Denominator]) -> dict[str, Any]:
    """Results of a run with these denominators instead of those it had."""
    kept = {name: value for name, value in run["metrics"].items() if name not in RATIOS}
    figures = (kept.get(name) for name in ("requests_per_s", "finetune_tokens_per_s", "bound_finetune_tokens_per_s"))
    own = [note for note in run["notes"] if note.startswith((REFUSED, STOPPED))]
    return {
        **run,
        "metrics": kept | ratios(*figures, found),
        "denominators": {name: asdict(each) for name, each in found.items()},
        "notes": missing_lines(found, run["commit"], run["plan"].get("alone_setup")) + own,
    }


def is_run(found: Mapping[str, Any], setup: str) -> bool:
    return "workload" in found and found.get("setup") == setup and found.get("policy") != PARTITION
