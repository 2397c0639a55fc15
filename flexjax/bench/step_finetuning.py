"""Finetuning steps: useful tokens per second of a job that has the engine to itself, sustained.

Useful tokens are those that go through the model, padding left out, of sequences whose backward pass and optimizer
step are done, each counted once: the tokens of the optimizer steps that ended between two of them, by the time between.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flexjax.bench.measurement import clock_watch
from flexjax.bench.step_breakdown import program_seconds
from flexjax.bench.step_memory import MemoryWatch
from flexjax.bench.step_model import product_parameters
from flexjax.bench.step_plan import RECIPES, Recipe, StepCase
from flexjax.bench.step_setup import StepReport, StepSetup
from flexjax.compiler.rematerialization import backward_work, resolve_tape
from flexjax.config import EngineConfig
from flexjax.engine.engine import Engine
from flexjax.engine.handles import FinetuneHandle
from flexjax.engine.machine import platform_of
from flexjax.engine.startup import dimensions_of
from flexjax.finetuning.job import FinetuneJob, JobStatus
from flexjax.layout import PAGE_TOKENS
from flexjax.models.build import dtype_of

CHAT = "finetune_chat.txt"
EPOCHS = 200
"""More than the measured time holds; the job is cancelled."""

LEARNING_RATE = 1e-6
POLL_SECONDS = 0.005
FORWARD_AND_INPUT_GRADIENT = 4
"""FLOPs per weight and token: the frozen weights have no gradient of their own."""


@dataclass(frozen=True)
class FinetuneSpeed:
    """Between two optimizer steps.

    Attributes:
        tokens: useful ones; mhz: mean SM clock, None without a GPU.
    """

    seconds: float
    tokens: int
    steps: int
    mhz: float | None


def run_finetuning(setup: StepSetup, cases: tuple[StepCase, ...], report: StepReport) -> None:
    """One case: an engine for it, its job for some seconds, then each of its programs alone."""
    (case,) = cases
    recipe, config = RECIPES[case.name], finetune_config(setup, case)
    data = list(rows(lengths_of(setup, recipe, config), setup.model.vocab_size))
    job = FinetuneJob(
        name=case.name,
        data=data,
        rank=setup.plan.rank,
        target_modules=recipe.modules,
        learning_rate=LEARNING_RATE,
        epochs=EPOCHS,
        batch_tokens=setup.plan.batch_microbatches * config.microbatch_tokens,
        max_length=min(config.max_model_len, config.microbatch_tokens),
        optimizer="adamw",
    )
    with Engine(config, report.show) as engine:
        report.describe(engine)
        handle, memory = engine.finetune(job), MemoryWatch(engine, case.name)
        speed = finetune_speed(handle, memory, setup.plan.warmup_steps, setup.plan.finetune_seconds)
        programs = engine.loop.call(program_seconds, engine, case.name)
        memory.count_arrays()
        report_finetuning(report, engine, case, speed, memory, programs)
        handle.cancel()


def report_finetuning(
    report: StepReport, engine: Engine, case: StepCase, speed: FinetuneSpeed, memory: MemoryWatch, programs: dict
) -> None:
    config, per_token = engine.config, FORWARD_AND_INPUT_GRADIENT * product_parameters(engine.model)
    figures = (speed.tokens / speed.seconds, memory.bytes / memory.microbatch_tokens / 1e6)
    report.add(
        dict(zip(case.metrics, figures, strict=False)),
        case.name,
        f"microbatches of {config.microbatch_tokens}, windows of {config.backward_window}, tape of "
        f"{', '.join(engine.loop.runner.programs.dims.tape)}; {speed.steps} optimizer steps in {speed.seconds:.1f} s",
        1e3 * speed.seconds / speed.steps,
        flops=per_token * speed.tokens / speed.steps,
        mean_sm_mhz=speed.mhz,
        useful_tokens=speed.tokens,
        microbatch_tokens=memory.microbatch_tokens,
        programs_ms={name: 1e3 * seconds for name, seconds in programs.items()},
        memory_mb={name: size / 1e6 for name, size in memory.parts.items()},
        in_use_mb=None if memory.in_use is None else memory.in_use / 1e6,
    )


def finetune_config(setup: StepSetup, case: StepCase) -> EngineConfig:
    """The case's engine, its pool no larger than the plan's microbatches need, unless the tables say how large."""
    plan, recipe = setup.plan, RECIPES[case.name]
    length, window = (
        (plan.microbatch_tokens, plan.backward_window) if recipe.chat else (plan.down_length, plan.down_window)
    )
    needed = {"microbatch_tokens": length, "backward_window": window, "chunk_sizes": (length,), "max_model_len": length}
    config = setup.engine_config(case, **needed)
    if config.pages is not None:
        return config
    work = backward_work(setup.model, recipe.modules, dtype_of(config.dtype), mean_context=length // 2)
    resolved = config.resolved(config.max_model_len, platform_of(config))
    dims = dimensions_of(resolved, setup.model, resolve_tape(config.tape, work).names)
    blocks = config.microbatch_tokens // PAGE_TOKENS
    pages = math.ceil(plan.pool_microbatches * dims.microbatch_pages(blocks))
    return setup.engine_config(case, **needed, pages=max(pages, dims.context_pages))


def lengths_of(setup: StepSetup, recipe: Recipe, config: EngineConfig) -> list[int]:
    """Tokens of the sequences."""
    if not recipe.chat:
        return [config.microbatch_tokens] * setup.plan.batch_microbatches
    lengths = [int(line) for line in setup.workload(CHAT).read_text().split()]
    longest = min(setup.plan.longest or config.microbatch_tokens, config.microbatch_tokens)
    return [max(2, min(length, longest)) for length in lengths]


def rows(lengths: list[int], vocabulary: int) -> Iterator[dict]:
    """Rows of random token ids, all of them trained but the first."""
    random = np.random.default_rng(0)
    for length in lengths:
        ids = random.integers(0, vocabulary, length).tolist()
        yield {"input_ids": ids, "loss_mask": [False] + [True] * (length - 1)}


def finetune_speed(handle: FinetuneHandle, memory: MemoryWatch, warmup: int, seconds: float) -> FinetuneSpeed:
    """Wait for the warm-up steps and for as many as ``seconds`` hold, looking at the memory meanwhile.

    Raises:
        RuntimeError: the job ended before.
    """
    first = steps_when(handle, lambda steps: len(steps) > warmup)[-1]
    with clock_watch() as clock:
        steps = steps_when(handle, lambda steps: steps[-1]["time"] - first["time"] >= seconds, memory.look)
    counted = [each for each in steps if each["step"] > first["step"]]
    elapsed = counted[-1]["time"] - first["time"]
    return FinetuneSpeed(elapsed, sum(each["tokens"] for each in counted), len(counted), clock.mean_mhz)


def steps_when(handle: FinetuneHandle, enough, meanwhile=lambda: None) -> list[dict]:
    """Events of the optimizer steps once ``enough`` of them says so."""
    while True:
        steps = [event for event in handle.events() if event["type"] == "step"]
        if steps and enough(steps):
            return steps
        if JobStatus(handle.status).final:
            raise RuntimeError(f"the job is {handle.status} after {len(steps)} optimizer steps: {handle.error}")
        meanwhile()
        time.sleep(POLL_SECONDS)
