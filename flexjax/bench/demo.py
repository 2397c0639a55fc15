"""The demo: one real model serves a stream of chat requests and learns a LoRA adapter at the same time.

This file is the order of events: model, answers before, stream and job side by side, answers after, a second run with
a tighter objective, results.
"""

import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from flexjax.bench.co_serving import CoServing, Episode
from flexjax.bench.demo_plan import DemoPlan, read_plan
from flexjax.bench.demo_results import show_answers, show_verdict, write_results
from flexjax.bench.live import LiveDisplay
from flexjax.bench.outcome import Answer, check_all
from flexjax.bench.sample_model import SAMPLE_MODELS, cache_folder, fetch_model
from flexjax.config import EngineConfig
from flexjax.engine.engine import Engine
from flexjax.finetuning.job import FinetuneJob, JobStatus
from flexjax.request import SamplingParams

PLAIN_WIDTH = 120
"""Columns of tables where the output is not a terminal."""

ROOM, TIGHTER_ROOM = 2.5, 1.15
"""Least objectives of the two runs, in times of the smallest forward step that finetunes beside all rows. On a machine
that is too slow for the configured ones no finetuning window would fit beside a request, and nothing could be seen."""

LARGEST_TIGHTER = 0.65
"""Of the first run's objective. It wins over the room: a machine that became slower meanwhile may finetune nothing."""


class DemoFailed(RuntimeError):
    """The job did not end as it should, so there is nothing to show."""


def run_demo(config_path: Path, short: bool, output: Path | None) -> int:
    """Run the demo that a configuration describes; returns the exit code, 0 if it showed what it has to.

    Args:
        short: fewer optimizer steps and shorter streams.
        output: folder for the results instead of the configured one.

    Raises:
        ConfigError, SampleModelError, OSError: the configuration, the model or the output folder cannot be used.
    """
    console = make_console()
    show = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
    plan = read_plan(Path(config_path), short, output)
    plan.output.mkdir(parents=True, exist_ok=True)
    try:
        with Engine.from_config(with_model(plan.engine, show), progress=show) as engine:
            episode, answers = first_run(engine, plan, console)
            tighter = second_run(engine, plan, console, episode.objective * LARGEST_TIGHTER)
    except DemoFailed as error:
        show(f"the demo failed: {error}")
        return 1
    checks = check_all(episode, tighter, answers, plan.demo.signature)
    write_results(plan, episode, tighter, answers, checks)
    show_verdict(console, plan, episode, tighter, checks)
    return 0 if all(each.passed for each in checks) else 1


def make_console() -> Console:
    """Standard output; characters that its encoding lacks are replaced."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def with_model(config: EngineConfig, show: Callable[[str], None]) -> EngineConfig:
    """The configuration with the file of a sample model in place of its name, and its caches in one folder."""
    cache = cache_folder()
    config = replace(config, compilation_cache=config.compilation_cache or str(cache / "compiled"))
    if config.model not in SAMPLE_MODELS:
        return config
    path = fetch_model(SAMPLE_MODELS[config.model], cache / "models", show)
    return replace(config, model=str(path), served_model_name=config.served_model_name or config.model)


def first_run(engine: Engine, plan: DemoPlan, console: Console) -> tuple[Episode, list[Answer]]:
    """The job beside the stream, and the held-out questions before and after. Raises DemoFailed."""
    aim(engine, console, max(plan.engine.tpot_objective_ms / 1e3, ROOM * smallest_step(engine)))
    before = ask(engine, plan, None)
    with run_of(engine, plan, plan.job, console) as run:
        ended = run.run(plan.demo.time_limit_seconds)
        require_success(run, ended, plan)
        answers = ask_both(engine, plan, before)
        show_answers(console, plan, answers)
        engine.export_adapter(plan.job.name, plan.output / "adapter")
        return run.finish(), answers


def second_run(engine: Engine, plan: DemoPlan, console: Console, largest: float) -> Episode:
    """A while of the same with a tighter objective and another job of the same kind, which is given up at the end.

    Args:
        largest: seconds per token that the objective must not exceed.
    """
    wanted = max(plan.demo.tighter_objective_ms / 1e3, TIGHTER_ROOM * smallest_step(engine))
    aim(engine, console, min(wanted, largest))
    endless = dict(max_steps=None, epochs=1000, validation=None)
    job = replace(plan.job, name=f"{plan.job.name}-tighter", **endless)
    with run_of(engine, plan, job, console) as run:
        run.run(plan.tighter_seconds)
        return run.finish()


def smallest_step(engine: Engine) -> float:
    """Seconds, as predicted, of the smallest forward step that finetunes beside all rows."""
    smallest = min(layout for layout in engine.scheduler.layouts if layout.tape)
    return engine.scheduler.latency.forward_seconds(smallest, context_tokens=0)


def aim(engine: Engine, console: Console, objective: float) -> None:
    """Set the objective, seconds per output token, to the nearest millisecond, and say so."""
    objective = max(round(objective, 3), 1e-3)
    console.rule(f"objective: {objective * 1e3:.0f} ms per output token", align="left")
    engine.set_objective(objective * 1e3)


def run_of(engine: Engine, plan: DemoPlan, job: FinetuneJob, console: Console) -> CoServing:
    demo = plan.demo
    options = dict(rate=demo.request_rate, answer_tokens=demo.answer_tokens, seed=demo.seed)
    display = LiveDisplay(console, engine.config.served_model_name)
    return CoServing(engine, job, plan.questions, display=display, **options)


def require_success(run: CoServing, ended: bool, plan: DemoPlan) -> None:
    limit = plan.demo.time_limit_seconds
    if not ended:
        raise DemoFailed(
            f"job {plan.job.name!r} was not done after time_limit_seconds = {limit:g}; lower max_steps of [[finetune]] "
            "or raise the limit"
        )
    if run.handle.status != JobStatus.SUCCEEDED:
        raise DemoFailed(f"job {plan.job.name!r} ended as {run.handle.status}: {run.handle.error}")


def ask(engine: Engine, plan: DemoPlan, adapter: str | None) -> list[str]:
    """Greedy answers to the held-out questions."""
    sampling = SamplingParams(temperature=0.0, max_tokens=plan.demo.answer_tokens)
    outputs = engine.chat([list(each) for each in plan.held_out], sampling, adapter=adapter)
    return [output.text.strip() for output in outputs]


def ask_both(engine: Engine, plan: DemoPlan, before: list[str]) -> list[Answer]:
    """The base model and the new adapter, asked at the same time, so that rows of both share iterations."""
    with ThreadPoolExecutor(2) as pool:
        base, adapter = pool.map(lambda name: ask(engine, plan, name), (None, plan.job.name))
    questions = [messages[-1]["content"] for messages in plan.held_out]
    return [Answer(*each) for each in zip(questions, before, base, adapter, strict=True)]
