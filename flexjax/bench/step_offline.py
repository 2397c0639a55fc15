"""Offline: output tokens per second of requests that are all there at the beginning."""

import json
import time
from pathlib import Path

from flexjax.bench.step_model import product_parameters
from flexjax.bench.step_plan import StepCase, StepPlan
from flexjax.bench.step_setup import StepReport, StepSetup
from flexjax.bench.step_traffic import random_prompts, submit_together
from flexjax.engine.engine import Engine

WORKLOAD = "offline_azure512.jsonl"


def run_offline(setup: StepSetup, cases: tuple[StepCase, ...], report: StepReport) -> None:
    """One pass over the workload, from the first request's submission to the last answer's end."""
    plan, (case,) = setup.plan, cases
    requests = read_requests(setup.workload(WORKLOAD), plan)
    with Engine(setup.engine_config(case), report.show) as engine:
        report.describe(engine)
        seconds, statistics = offline_seconds(engine, requests)
        parameters, config = product_parameters(engine.model), engine.config
    prompts, outputs = (sum(column) for column in zip(*requests, strict=True))
    report.add(
        {"offline_output_tokens_per_s": outputs / seconds},
        case.name,
        f"{len(requests)} requests of {WORKLOAD}, {prompts} prompt and {outputs} output tokens, {config.max_rows} rows",
        1e3 * seconds,
        flops=2 * (prompts + outputs) * parameters,
        total_tokens_per_s=(prompts + outputs) / seconds,
        preemptions=statistics.preemptions,
        row_sizes=list(config.row_sizes),
        chunk_sizes=list(config.chunk_sizes),
    )


def read_requests(path: Path, plan: StepPlan) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of each request."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    longest = plan.longest or max(max(row["p"], row["o"]) for row in rows)
    return [(min(row["p"], longest), min(row["o"], longest)) for row in rows[: plan.offline_requests]]


def offline_seconds(engine: Engine, requests: list[tuple[int, int]]):
    """Seconds, and the scheduler's statistics."""
    prompts = random_prompts([prompt for prompt, _ in requests], engine.model.vocab_size, seed=0)
    started = time.perf_counter()
    answers = submit_together(engine, prompts, [output for _, output in requests])
    ended = max(answer.wait().times[-1] for answer in answers)
    assert [len(answer.times) for answer in answers] == [output for _, output in requests], (
        "an answer has another length"
    )
    return ended - started, engine.scheduler.statistics
