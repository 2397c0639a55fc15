"""StepBench: `flexjax bench step`. Runs the cases of a plan, each kind in a process of its own, and gathers figures.

This process never touches the device, whose memory belongs to the one that measures. A process that fails or takes too
long costs its own figures only; the results are written after every one.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexjax.bench.results import write_results
from flexjax.bench.step_plan import StepCase, StepPlan, read_step_plan
from flexjax.fields import ConfigError

PROBE_SECONDS = 120.0


def run_step_bench(config_path: str | None, workloads: Path | None, out: Path, only: list[str]) -> int:
    """Measure and write ``out``; 1 if some process failed.

    Figures that ``out`` already has, of the same device and model, stay, so that a long benchmark can be taken in
    parts; each case names its commit.

    Args:
        config_path: TOML with [bench] (`StepPlan`) and [engine] tables; None takes the real plan on a GPU and a tiny
            one elsewhere.
        workloads: folder of lengths; without it, what needs them fails.
        only: names, kinds or metrics of cases; empty for all.

    Raises:
        ConfigError: the configuration or ``only`` cannot be used.
        RuntimeError: there is no device to measure on.
    """
    read_step_plan(config_path, "cpu")[0].chosen([])  # refuses a wrong file before anything is started
    with tempfile.TemporaryDirectory(prefix="flexjax-step-") as folder:
        found = run_process(Path(folder), {"kind": "probe"}, PROBE_SECONDS)
        if not found:
            raise RuntimeError("the device could not be probed; what the process said stands above")
        plan, engine = read_step_plan(config_path, found["platform"])
        task = {"plan": dataclasses.asdict(plan), "engine": engine, "ceilings": found["ceilings"]}
        task["workloads"] = None if workloads is None else str(workloads.resolve())
        results = StepResults(out, found["facts"])
        failed = [group for group in plan.processes(plan.chosen(only)) if not run_group(group, task, plan, results)]
    print(f"\n{results.table()}\n\n{out}")
    for group in failed:
        print(f"failed: {', '.join(case.name for case in group)}")
    return 1 if failed else 0


def run_group(group: tuple[StepCase, ...], task: dict, plan: StepPlan, results: "StepResults") -> bool:
    """Measure the cases of one process; whether all their metrics came."""
    names = [case.name for case in group]
    print(f"{', '.join(names)} ...", flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="flexjax-step-") as folder:
        seconds = plan.process_seconds * (2 if group[0].kind == "startup" else 1)
        report = run_process(Path(folder), task | {"kind": group[0].kind, "cases": names}, seconds)
    results.add(report)
    print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    wanted = {metric for case in group for metric in case.metrics}
    return wanted <= set(report.get("metrics", ()))


def run_process(folder: Path, task: dict, seconds: float) -> dict[str, Any]:
    """What a measuring process reported, perhaps not everything; {} for nothing at all. Ended after ``seconds``."""
    task_file, report = folder / "task.json", folder / "report.json"
    task_file.write_text(json.dumps(task | {"report": str(report)}))
    command = [sys.executable, "-m", "flexjax.bench.step_group", str(task_file)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"  ended after {seconds:.0f} s; process_seconds of [bench] allows more", flush=True)
    finally:
        end_session(process)
    return json.loads(report.read_text()) if report.is_file() else {}


def end_session(process: subprocess.Popen) -> None:
    """End the process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class StepResults:
    """The file of results as it grows.

    Attributes:
        metrics, cases, implementations, model: of everything measured.
    """

    def __init__(self, path: Path, facts: dict):
        self.path, self.facts = path, facts
        self.metrics: dict[str, float] = {}
        self.cases: list[dict] = []
        self.implementations: dict[str, str] = {}
        self.model: str | None = None
        self._earlier = read_earlier(path, facts)

    def add(self, report: dict[str, Any]) -> None:
        """Take in what a process reported and write the file."""
        self.model = report.get("model") or self.model
        if self._earlier is not None and self.model is not None:
            self._take_earlier()
        self.metrics |= report.get("metrics", {})
        self.cases = replaced(self.cases, of_commit(report.get("cases", ()), self.facts["commit"]))
        self.implementations |= report.get("implementations", {})
        facts = {**self.facts, "model": self.model}
        write_results(self.path, facts, self.implementations, self.metrics, self.cases)

    def table(self) -> str:
        """Every metric and its value."""
        width = max(map(len, self.metrics), default=0)
        return "\n".join(f"{name:<{width}}  {value:>12,.4g}" for name, value in self.metrics.items())

    def _take_earlier(self) -> None:
        earlier, self._earlier = self._earlier, None
        if earlier.get("model") == self.model:
            cases = of_commit(earlier["cases"], earlier["commit"])
            self.metrics, self.cases = earlier["metrics"] | self.metrics, replaced(cases, self.cases)


def read_earlier(path: Path, facts: dict) -> dict | None:
    """Results of an earlier run on the same device, None if there are none."""
    try:
        earlier = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} is not a file of results ({error}); name another with --out") from error
    return earlier if earlier.get("device") == facts["device"] else None


def of_commit(cases: Sequence[dict], commit: str | None) -> list[dict]:
    """Cases that name the commit at which they were measured: this one, unless they know better."""
    return [{"commit": commit, **case} for case in cases]


def replaced(cases: Sequence[dict], newer: Sequence[dict]) -> list[dict]:
    """Cases by name, the newer ones instead of the older."""
    names = {case["name"] for case in newer}
    return [*(case for case in cases if case["name"] not in names), *newer]
