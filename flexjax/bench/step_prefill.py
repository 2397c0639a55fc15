"""Prefill: prompt tokens per second, from handing over some long prompts until the last of them has its first token."""

import time
from statistics import median

from flexjax.bench.step_model import product_parameters
from flexjax.bench.step_plan import StepCase
from flexjax.bench.step_setup import StepReport, StepSetup
from flexjax.bench.step_traffic import random_prompts, submit_together
from flexjax.engine.engine import Engine
from flexjax.layout import tiles_for


def run_prefill(setup: StepSetup, cases: tuple[StepCase, ...], report: StepReport) -> None:
    """The median of a few times, after one that is not counted; fresh prompts each time."""
    plan, (case,) = setup.plan, cases
    lengths = [plan.prefill_length] * plan.prefill_prompts
    pages = plan.prefill_prompts * (tiles_for(plan.prefill_length + 1) + 1)
    config = setup.engine_config(case, max_model_len=plan.prefill_length + 64, pages=pages)
    with Engine(config, report.show) as engine:
        report.describe(engine)
        seconds = [prefill_seconds(engine, lengths, seed) for seed in range(plan.prefill_repeats + 1)][1:]
        flops = (
            2 * sum(lengths) * (product_parameters(engine.model) - engine.model.vocab_size * engine.model.hidden_size)
        )
    report.add(
        {"prefill_tokens_per_s": sum(lengths) / median(seconds)},
        case.name,
        f"{plan.prefill_prompts} prompts of {plan.prefill_length}, chunks of up to {config.chunk_sizes[-1]}",
        1e3 * median(seconds),
        flops=flops,
        all_ms=[1e3 * each for each in seconds],
    )


def prefill_seconds(engine: Engine, lengths: list[int], seed: int) -> float:
    prompts = random_prompts(lengths, engine.model.vocab_size, seed)
    started = time.perf_counter()
    answers = submit_together(engine, prompts, [1] * len(prompts))
    return max(answer.wait().times[0] for answer in answers) - started
