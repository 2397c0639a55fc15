"""CoserveBench: `flexjax bench coserve`. One command measures one thing with one engine and writes a file of it, or of
each of several traces."""

import dataclasses
import functools
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flexjax.bench.coserve_bound import Demand, demand
from flexjax.bench.coserve_denominators import measure_alone, measure_capacity, write_partition
from flexjax.bench.coserve_division import divide_runs
from flexjax.bench.coserve_engine import CoserveSetup
from flexjax.bench.coserve_metrics import (
    finetune_metrics,
    job_metrics,
    milliseconds,
    output_rate,
    prediction_metrics,
    request_metrics,
)
from flexjax.bench.coserve_plan import ALONE as ALONE_POLICY
from flexjax.bench.coserve_plan import INFERENCE, JOB, PARTITION, CoservePlan, read_coserve_plan
from flexjax.bench.coserve_results import REFUSED, STOPPED, divided_line, missing_lines, ratios
from flexjax.bench.coserve_run import Outcome
from flexjax.bench.coserve_session import CoserveSession, session
from flexjax.bench.coserve_timeline import timeline
from flexjax.bench.coserve_watch import memory_metrics
from flexjax.bench.results import case_result
from flexjax.fields import ConfigError
from flexjax.models.build import dtype_of

Show = Callable[[str], None]


def run_coserve_bench(
    config_path: str,
    workloads: Path | None,
    out: Path,
    what: str = "run",
    traces: Sequence[str] = (),
    policies: Sequence[str] = (),
    **overrides: Any,
) -> int:
    """Measure and write files of results into ``out``.

    Args:
        config_path: TOML with [bench] (`CoservePlan`) and [engine] tables.
        what: "run" replays the trace under the policy; "capacity" searches for the rate that the policy holds without a
            job; "alone" lets finetuning have the engine to itself; "divide" measures nothing and divides the runs in
            ``out`` by the denominators there.
        traces: instead of the file's, names of workloads; with "run", one after another.
        policies: instead of the file's; with "run", one after another over the traces, with one engine.
        overrides: fields of the plan; None leaves the file's.

    Raises:
        ConfigError: the configuration, the workloads or earlier results cannot be used, or the run was stopped before
            there was anything to count.
    """
    read = [
        read_coserve_plan(config_path, policy=policy, workload=name, **overrides)
        for policy in policies or (None,)
        for name in traces or (None,)
    ]
    (plan, engine_table), plans, show = read[0], [each for each, _ in read], functools.partial(print, flush=True)
    check_asked(plans, what, {"workload": traces or None, "policy": policies or None, **overrides})
    if what == "divide":
        files = divide_runs(plan.setup, workloads, out, show)
    elif plan.policy == PARTITION:
        files = [write_partition(plan, plan.trace(workloads), out, show)]
    else:
        with tempfile.TemporaryDirectory(prefix="flexjax-coserve-") as folder:
            places = engine_table, Path(config_path).parent, workloads, Path(folder)
            files = measure(lambda what: [make_setup(each, *places, what) for each in plans], plan, what, out, show)
    for file in files:
        show(f"\n{file}")
    return 0


def check_asked(plans: Sequence[CoservePlan], what: str, given: Mapping[str, Any]) -> None:
    """Raises ConfigError for what does not go together; ``given`` are options by name, None where there is none."""
    plan, traces, policies = plans[0], given["workload"] or (), given["policy"] or ()
    replayed = what == "run" and {PARTITION, ALONE_POLICY}.isdisjoint(each.policy for each in plans)
    for option, names, kind in (("--workload", traces, "traces"), ("--policy", policies, "policies")):
        if len(names) > 1 and not replayed:
            raise ConfigError(f"{option} names {len(names)} {kind}; several can only be replayed, not used otherwise")
    if len(policies) > 1 and (own := [name for name in policies if name in plan.engines]):
        raise ConfigError(
            f"--policy names {len(policies)} policies for one engine, but [bench.engines] has one of its own for "
            f"{', '.join(own)}; run it in a command of its own"
        )
    if what == "divide" and (asked := [name.replace("_", "-") for name, each in given.items() if each is not None]):
        options = " and ".join(f"--{name}" for name in asked)
        raise ConfigError(f"--divide takes every run of the set-up as it is; leave {options} out")
    alone = what == "alone" or (what == "run" and plan.policy == ALONE_POLICY)
    if alone and plan.alone_setup is not None:
        raise ConfigError(
            f"set-up {plan.setup!r} divides by what finetuning alone reaches in set-up {plan.alone_setup!r} "
            "(alone_setup); measure it with that set-up's file"
        )
    if what == "capacity" and plan.policy in (PARTITION, ALONE_POLICY):
        raise ConfigError(f"--capacity tries policies that serve, not {plan.policy!r}; choose one with --policy")


def measure(
    make: Callable[[str], list[CoserveSetup]], plan: CoservePlan, what: str, out: Path, show: Show
) -> list[Path]:
    if what == "alone" or plan.policy == ALONE_POLICY:
        return [measure_alone(*make("alone"), out, show)]
    if what == "capacity":
        return [measure_capacity(*make("capacity"), plan.policy, out, show)]
    return measure_runs(make("run"), out, show)


def make_setup(
    plan: CoservePlan, engine_table: Mapping, base: Path, workloads: Path | None, folder: Path, what: str
) -> CoserveSetup:
    """Raises ConfigError, before any engine is started, if something is missing."""
    trace = {"alone": lambda _: None, "capacity": plan.trace, "run": plan.counted_trace}[what](workloads)
    return CoserveSetup(plan, engine_table, base, trace, plan.sequence_lengths(workloads), folder)


def measure_runs(setups: Sequence[CoserveSetup], out: Path, show: Show) -> list[Path]:
    """Replay the plans' traces under their policies, one after another, with an engine that takes the longest request.

    Raises:
        ConfigError: SIGTERM came before a trace's last request was sent. After it, the file is written, and what has
            not been answered is unfinished.
    """
    longest, files = max(setups, key=lambda setup: setup.trace.longest), []
    with session(longest, longest.plan.policy, out, show) as opened, stopped_by_sigterm() as stopped:
        for setup in setups:
            opened = opened.of(setup)
            files.append(measure_run(opened, stopped))
            if stopped.is_set():
                break
    if left := setups[len(files) :]:
        names = (f"{setup.trace.name} under {setup.plan.policy}" for setup in left)
        show(f"{STOPPED}: not replayed are {', '.join(names)}")
    return files


@contextmanager
def stopped_by_sigterm() -> Iterator[threading.Event]:
    """On the main thread, an event that SIGTERM sets instead of ending the process: a job system's time limit loses no
    run whose last answers alone are missing."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)


def measure_run(run: CoserveSession, stopped: threading.Event) -> Path:
    plan, trace = run.setup.plan, run.setup.trace
    outcome = run.replay(trace, job=plan.policy != INFERENCE, stopped=stopped)
    found = run.results.denominators(trace)
    metrics = run_metrics(run, outcome)
    tokens = metrics.get("finetune_tokens_per_s")
    metrics |= bound_metrics(run)
    metrics |= ratios(trace.rate, tokens, metrics["bound_finetune_tokens_per_s"], found)
    file = run.results.run_file(trace, plan.policy)
    notes = missing_lines(found, run.results.facts["commit"], plan.alone_setup)
    if stopped.is_set() and metrics["unfinished"]:
        notes.append(f"{STOPPED}: {metrics['unfinished']:.0f} requests that had not been answered count as missed")
    if outcome.refusal is not None:
        notes.append(f"{REFUSED}, the first because: {outcome.refusal}")
    run.results.write(
        file,
        metrics,
        [run_case(plan, outcome)],
        workload=trace.name,
        policy=plan.policy,
        denominators={name: dataclasses.asdict(each) for name, each in found.items()},
        notes=notes,
        engine=run.engine_facts(),
        ceilings=dataclasses.asdict(run.ceilings),
        timeline=timeline(outcome, run.engine.memory_plan.page_bytes),
    )
    run.show("\n".join([table(metrics), *map(divided_line, found.values()), *notes]))
    return file


def run_metrics(run: CoserveSession, outcome: Outcome) -> dict[str, float]:
    """Everything that needs no other run."""
    plan, trace = run.setup.plan, outcome.trace
    span = plan.count_from, trace.seconds
    counted = [each for each in outcome.records if span[0] < each.end <= span[1]]
    metrics = request_metrics(outcome.requests, plan.limits)
    metrics |= {"requests_per_s": trace.rate, "output_tokens_per_s": output_rate(outcome.requests, *span)}
    if plan.policy != INFERENCE:
        metrics |= finetune_metrics(outcome.useful, *span)
        if plan.more_jobs:
            metrics |= job_metrics(outcome.useful, [JOB, *plan.more_jobs], *span)
    metrics |= {"preemptions": outcome.preemptions, **prediction_metrics(counted), "sm_clock_mhz": outcome.mhz}
    metrics["handover_late_ms_p99"] = milliseconds("late", outcome.late)["late_ms_p99"]
    return metrics | memory_metrics(run.engine, outcome.pool)


def bound_metrics(run: CoserveSession) -> dict[str, float]:
    """What conservation leaves for finetuning, while rates are counted; see `flexjax.bench.coserve_bound`."""
    needed = counted_demand(run)
    return {
        "bound_finetune_tokens_per_s": needed.overlapping(run.ceilings),
        "bound_turns_finetune_tokens_per_s": needed.taking_turns(run.ceilings),
    }


def counted_demand(run: CoserveSession) -> Demand:
    plan, trace = run.setup.plan, run.setup.trace
    rows, seconds = trace.between(plan.count_from, trace.seconds), trace.seconds - plan.count_from
    itemsize = np.dtype(dtype_of(run.engine.config.dtype)).itemsize
    return demand(run.engine.model, rows, seconds, run.setup.lengths, itemsize)


def run_case(plan: CoservePlan, outcome: Outcome) -> dict:
    trace, seconds = outcome.trace, [each.seconds for each in outcome.records]
    shape = f"{len(trace.rows)} requests in {trace.seconds:.0f} s, counted from {plan.count_from:g} s"
    mean = 1e3 * sum(seconds) / len(seconds)
    return case_result(f"{trace.name} {plan.policy}", shape, mean, iterations=len(seconds))


def table(metrics: Mapping[str, float | None]) -> str:
    """Every metric and its value."""
    width = max(map(len, metrics))
    return "\n".join(f"{name:<{width}}  {value:>12,.4g}" for name, value in metrics.items() if value is not None)
