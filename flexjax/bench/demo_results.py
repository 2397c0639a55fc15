"""The results of a demo: answers side by side, verdicts, the report and the plots. It measures and judges nothing."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexjax.bench.co_serving import Episode
from flexjax.bench.demo_plan import DemoPlan
from flexjax.bench.outcome import Answer, Check
from flexjax.bench.plots import plot_iterations, plot_losses
from flexjax.bench.report import columns, write_report

REPORT, LOSS_PLOT, ITERATIONS_PLOT = "report.json", "loss.png", "iterations.png"


def show_answers(console: Console, plan: DemoPlan, answers: Sequence[Answer]) -> None:
    """Held-out questions with the base model's and the adapter's answer."""
    table = Table(title="Questions held out from training", title_justify="left", show_lines=True)
    table.add_column("question", ratio=2)
    table.add_column("before: base model", ratio=3)
    table.add_column(f"after: adapter {plan.job.name}", ratio=3)
    for answer in answers:
        signed = Text(answer.adapter)
        signed.highlight_words([plan.demo.signature], style="bold green")
        table.add_row(Text(answer.question), Text(answer.before), signed)
    console.print(table)


def show_verdict(console: Console, plan: DemoPlan, episode: Episode, tighter: Episode, checks: Sequence[Check]) -> None:
    """Figures of both runs, what was checked, and where everything lies."""
    console.print(comparison(episode, tighter))
    for check in checks:
        mark = Text("ok    ", style="green") if check.passed else Text("FAILED", style="bold red")
        console.print(Text("  ").join([mark, Text(f"{check.claim}: {check.found}")]), soft_wrap=True)
    console.print(Text(f"adapter, report and plots: {plan.output.resolve()}"), soft_wrap=True)
    failed = sum(not check.passed for check in checks)
    if failed:
        console.print(Text(f"the demo failed: {failed} of {len(checks)} checks", style="bold red"), soft_wrap=True)


def comparison(episode: Episode, tighter: Episode) -> Table:
    table = Table(title="What the runs achieved", title_justify="left")
    table.add_column("")
    table.add_column("run", justify="right")
    table.add_column("tighter run", justify="right")
    both = [figures(each) for each in (episode, tighter)]
    for name in both[0]:
        table.add_row(name, *(each[name] for each in both))
    return table


def figures(episode: Episode) -> dict[str, str]:
    """Headline figures as text."""
    summary = episode.summary
    felt = {name: summary[name] or {} for name in ("ttft", "tpot", "iteration_seconds")}
    spent = [summary[f"{part}_seconds"] for part in ("decode", "prompt", "finetune")]
    total = sum(spent) or 1.0
    return {
        "objective, ms per token": f"{episode.objective * 1e3:.0f}",
        "TPOT p50 / p90, ms": milliseconds(felt["tpot"]),
        "TTFT p50 / p90, ms": milliseconds(felt["ttft"]),
        "iteration p50 / p90, ms": milliseconds(felt["iteration_seconds"]),
        "iterations": f"{summary['iterations']}",
        "requests": f"{summary['requests']}",
        "finetuning tokens/s": f"{episode.tokens_per_second:.1f}",
        "finetuning tokens beside decode rows": percent(summary["finetune_shared_fraction"]),
        "optimizer steps": f"{summary['updates']}",
        "time: decoding, prompts, finetuning": ", ".join(percent(each / total) for each in spent),
        "prediction error": percent(summary["prediction_error"]),
    }


def milliseconds(values: dict[str, float]) -> str:
    return " / ".join(f"{values[name] * 1e3:.0f}" for name in ("p50", "p90")) if values else "-"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def write_results(
    plan: DemoPlan, episode: Episode, tighter: Episode, answers: Sequence[Answer], checks: Sequence[Check]
) -> dict:
    """Report and plots into the output folder; returns the report."""
    folder = plan.output
    plot_losses(folder / LOSS_PLOT, episode.losses, episode.validation)
    plot_iterations(folder / ITERATIONS_PLOT, episode.records, episode.objective)
    extra = {
        "objective_seconds": episode.objective,
        "job_tokens_per_second": episode.tokens_per_second,
        "checks": [dataclasses.asdict(each) for each in checks],
        "answers": [dataclasses.asdict(each) for each in answers],
        "tighter": {
            "objective_seconds": tighter.objective,
            "job_tokens_per_second": tighter.tokens_per_second,
            "summary": tighter.summary,
            "requests": list(tighter.requests),
            "iterations": columns(tighter.records),
        },
    }
    return write_report(
        folder / REPORT,
        config_of(plan),
        episode.records,
        episode.requests,
        episode.losses,
        episode.validation,
        extra,
    )


def config_of(plan: DemoPlan) -> dict:
    """What was run, as JSON values."""
    tables = {"engine": plan.engine, "finetune": plan.job, "demo": plan.demo}
    return {name: {key: plain(value) for key, value in vars(table).items()} for name, table in tables.items()}


def plain(value):
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
