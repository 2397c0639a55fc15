"""The denominators of a set-up: what inference alone holds, and what finetuning alone reaches; and what a static
partition makes of the two."""

import dataclasses
import time
from pathlib import Path

from flexjax.bench.coserve_capacity import MISSES, RULE, Misses, Trial, highest_held, lowest_failed, next_rate
from flexjax.bench.coserve_engine import CoserveSetup
from flexjax.bench.coserve_metrics import request_metrics, steady_finetune_metrics
from flexjax.bench.coserve_partition import GPUS, Partition, best_partition, partitions
from flexjax.bench.coserve_plan import ALONE as ALONE_POLICY
from flexjax.bench.coserve_plan import PARTITION, CoservePlan
from flexjax.bench.coserve_results import ALONE, CAPACITY, ResultFolder, read_results
from flexjax.bench.coserve_run import finetune_alone
from flexjax.bench.coserve_session import CoserveSession, session
from flexjax.bench.coserve_trace import Trace
from flexjax.bench.results import case_result
from flexjax.fields import ConfigError


def measure_alone(setup: CoserveSetup, out: Path, show) -> Path:
    """Finetuning that has the engine to itself; the file of results."""
    plan = setup.plan
    with session(setup, ALONE_POLICY, out, show) as run:
        jobs = setup.jobs(run.engine.model.vocab_size)
        useful, mhz = finetune_alone(run.engine, jobs, plan.alone_warmup, plan.alone_seconds)
        found = steady_finetune_metrics(useful)
        metrics = {ALONE: found["finetune_tokens_per_s"], **found, "sm_clock_mhz": mhz}
        seconds, file = useful[-1].at - useful[0].at, run.results.alone_file
        shape = f"{len(useful) - 1} microbatches in {seconds:.1f} s"
        case = case_result("alone", shape, 1e3 * seconds / (len(useful) - 1))
        run.results.write(file, metrics, [case], engine=run.engine_facts(), ceilings=dataclasses.asdict(run.ceilings))
    show(f"  {ALONE} {metrics[ALONE]:,.0f} ({shape})")
    return file


def measure_capacity(setup: CoserveSetup, policy: str, out: Path, show) -> Path:
    """Search for the capacity; the file of results, which a later command goes on from. Trials of several policies and
    durations stand in one file; the best policy counts, among trials as long as the plan's."""
    plan = setup.plan
    with session(setup, policy, out, show) as run:
        file, started = run.results.capacity_file(setup.trace), time.monotonic()
        earlier = run.results.earlier(file)
        cases = earlier["cases"] if earlier is not None and earlier["commit"] == run.results.facts["commit"] else []
        tried = lambda: trials_of(cases, policy, plan.capacity_seconds)
        fits, made = lambda: time.monotonic() - started + plan.capacity_seconds <= plan.capacity_budget, 0
        while (rate := next_rate(tried(), plan.capacity_from, plan.capacity_precision)) is not None:
            if made and not fits():
                show(f"  not precise to {plan.capacity_precision} yet; the same command goes on from here")
                break
            cases, made = [*cases, trial(run, policy, rate, seed=len(cases) + 1)], made + 1
            write_capacity(run, file, cases)
            show(f"  {cases[-1]['name']}: {cases[-1]['shape']}")
    return file


def trial(run: CoserveSession, policy: str, rate: float, seed: int) -> dict:
    """One rate; see `flexjax.bench.coserve_capacity`."""
    plan, objective = run.setup.plan, run.setup.plan.limits
    trace = run.setup.trace.at_rate(rate).lasting(plan.capacity_seconds)
    longest = max(row.output for row in trace.rows)
    patience = objective.ttft + longest * objective.per_token  # whoever takes longer has missed
    misses = Misses(objective, len(trace.rows))
    limits = {"drain_seconds": min(plan.drain_seconds, patience), "hopeless": misses.too_many}
    outcome = run.replay(trace, seed=seed, count_from=0.0, **limits)
    metrics = request_metrics(outcome.requests, objective)
    return case_result(
        f"{policy} {rate:.3g}/s",
        f"{len(trace.rows)} requests in {trace.seconds:.1f} s, attainment {metrics['attainment']:.4f}",
        metrics["tpot_ms_p50"],
        policy=policy,
        rate=rate,
        seconds=plan.capacity_seconds,
        held=metrics["attainment"] >= 1 - MISSES,
        preemptions=outcome.preemptions,
        sm_clock_mhz=outcome.mhz,
        metrics=metrics,
    )


def write_capacity(run: CoserveSession, file: Path, cases: list[dict]) -> None:
    seconds = run.setup.plan.capacity_seconds
    counted = [case["policy"] for case in cases if case["seconds"] == seconds]
    trials = {policy: trials_of(cases, policy, seconds) for policy in counted}
    best = max(trials, key=lambda policy: highest_held(trials[policy]))
    held, failed = highest_held(trials[best]), lowest_failed(trials[best])
    metrics = {CAPACITY: held, "capacity_failed_at_requests_per_s": failed}
    facts = {"engine": run.engine_facts(), "ceilings": dataclasses.asdict(run.ceilings), "trace": run.setup.trace.name}
    run.results.write(file, metrics, cases, policy=best, rule=" ".join(RULE.split()), **facts)


def trials_of(cases: list[dict], policy: str, seconds: float) -> list[Trial]:
    wanted = [case for case in cases if (case["policy"], case["seconds"]) == (policy, seconds)]
    return [Trial(case["rate"], case["held"]) for case in wanted]


def write_partition(plan: CoservePlan, trace: Trace, out: Path, show) -> Path:
    """The static partition of a trace, computed from the files of both denominators.

    Raises:
        ConfigError: one of them is missing, or they were measured on different devices.
    """
    folder = ResultFolder(out, plan, {})
    files = {folder.capacity_file(trace): CAPACITY, folder.alone_file: ALONE}
    found = {path: read_measured(folder, path, metric) for path, metric in files.items()}
    (capacity, alone), devices = found.values(), {each["device"] for each in found.values()}
    if len(devices) > 1:
        named = " and ".join(map(str, found))
        raise ConfigError(f"{named} were measured on {' and '.join(sorted(devices))}; measure one of them again")
    figures = trace.rate, capacity["metrics"][CAPACITY], alone["metrics"][ALONE]
    best, file = best_partition(*figures), folder.run_file(trace, PARTITION)
    metrics = {"attainment_held": float(best is not None), "requests_per_s": trace.rate}
    if best is not None:
        kept = best.finetuning / GPUS
        metrics |= {"finetune_tokens_per_s": best.finetune_tokens_per_s, "finetune_kept": kept}
        metrics["efficiency"] = best.efficiency
    facts = {name: capacity[name] for name in ("device", "versions", "commit", "model")}
    cases = [{"name": f"{each.finetuning} of {GPUS}", **vars(each)} for each in partitions(*figures)]
    used = (folder.denominator_of(found[path], path, metric) for path, metric in files.items())
    divided = {each.metric: dataclasses.asdict(each) for each in used}
    more = {"workload": trace.name, "policy": PARTITION, "denominators": divided}
    ResultFolder(out, plan, facts).write(file, metrics, cases, **more)
    show("\n".join(map(partition_line, partitions(*figures))))
    return file


def partition_line(found: Partition) -> str:
    holds = "holds" if found.holds else "does not hold"
    reached = f"{found.finetune_tokens_per_s:,.0f} finetuning tokens/s and GPU"
    return f"  {found.finetuning} of {GPUS} finetune: {reached}; {holds} {found.rate:.3g} requests/s where it serves"


def read_measured(folder: ResultFolder, path: Path, metric: str) -> dict:
    """Raises ConfigError unless the file has the denominator of this plan."""
    found = read_results(path) if path.is_file() else None
    if found is None or not folder.holds(found, metric):
        option = "--alone" if metric == ALONE else "--capacity"
        raise ConfigError(
            f"{path} has no {metric} of this set-up, from which the partition follows; measure it with {option}, or "
            "name its folder with --out"
        )
    return found
