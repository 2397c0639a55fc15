"""StepGroup: the process in which cases of one kind are measured. `flexjax.bench.step_bench` starts it.

    python -m flexjax.bench.step_group TASK.json

A process has the device's memory to itself and may fail or be ended; what it had measured by then is in its report.
"""

import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from flexjax.bench.ceilings import FULL, TINY, Ceilings, measure_ceilings
from flexjax.bench.measurement import device_facts
from flexjax.bench.step_decode import run_decode
from flexjax.bench.step_finetuning import run_finetuning
from flexjax.bench.step_offline import run_offline
from flexjax.bench.step_plan import StepCase, StepPlan
from flexjax.bench.step_prefill import run_prefill
from flexjax.bench.step_setup import StepReport, StepSetup
from flexjax.bench.step_startup import run_startup
from flexjax.config import from_table
from flexjax.engine.machine import claim_memory
from flexjax.fields import ConfigError

Run = Callable[[StepSetup, tuple[StepCase, ...], StepReport], None]

KINDS: dict[str, Run] = {
    "decode": run_decode,
    "decode_lora8": run_decode,
    "prefill": run_prefill,
    "offline": run_offline,
    "finetune": run_finetuning,
    "startup": run_startup,
}


def main(task_file: str) -> int:
    task = json.loads(Path(task_file).read_text())
    if task["kind"] == "probe":
        probe(Path(task["report"]))
        return 0
    plan = from_table(StepPlan, task["plan"], "plan")
    cases = tuple(case for case in plan.cases if case.name in task["cases"])
    report = StepReport(Path(task["report"]), Ceilings(**task["ceilings"]), functools.partial(print, flush=True))
    with tempfile.TemporaryDirectory(prefix="flexjax-step-") as folder:
        workloads = None if task["workloads"] is None else Path(task["workloads"])
        try:
            run_cases(StepSetup(plan, task["engine"], workloads, Path(folder)), cases, report)
        except ConfigError as error:
            print(f"  error: {error}")
            return 1
    return 0


def run_cases(setup: StepSetup, cases: tuple[StepCase, ...], report: StepReport) -> None:
    """Measure cases of one kind."""
    KINDS[cases[0].kind](setup, cases, report)


def probe(report: Path) -> None:
    """What the device is and what it does at best."""
    claim_memory(0.5)
    platform = jax.default_backend()
    ceilings = measure_ceilings(FULL if platform == "gpu" else TINY)
    found = {"platform": platform, "facts": device_facts(), "ceilings": dataclasses.asdict(ceilings)}
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
