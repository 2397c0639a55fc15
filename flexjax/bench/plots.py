"""The pictures of a run: how the loss fell, where the time of the iterations went, and rates and memory over time. Only
this file draws.

Figures are made without pyplot: nothing global, any thread may draw.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexjax.bench.percentiles import percentile
from flexjax.bench.report import IterationRecord

DECODE, PROMPT, FINETUNE = "#4269a5", "#7fb3d5", "#ef8636"
INK, FAINT = "#2b2b2b", "#9a9a9a"
MOST_BINS = 160
"""Spans of time drawn side by side; more would be thinner than a pixel or two and flicker."""

type Span = list[tuple[IterationRecord, float]]
"""The iterations that ran in a span of time, each with the seconds of it that lie inside."""


def plot_losses(
    path: str | os.PathLike, losses: Sequence[float], validation: Sequence[tuple[int, float]] = ()
) -> Figure:
    """Training loss by optimizer step (1, 2, ...), smoothed once there are many, and validation losses (step, loss)."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    steps = np.arange(1, len(losses) + 1)
    if len(losses) > 20:
        axes.plot(steps, losses, color=FINETUNE, alpha=0.3, linewidth=1, label="training, each step")
        axes.plot(steps, smoothed(losses), color=FINETUNE, linewidth=2, label="training, smoothed")
    else:
        axes.plot(steps, losses, color=FINETUNE, linewidth=2, marker="o", markersize=4, label="training")
    if len(validation):
        at, values = zip(*validation, strict=True)
        axes.plot(at, values, color=DECODE, linewidth=1.5, marker="o", markersize=5, label="validation")
    axes.set_title("Finetuning loss", loc="left")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token")
    seen = [value for value in (*losses, *(value for _, value in validation)) if np.isfinite(value)]
    axes.set_ylim(0, max(seen, default=0.0) * 1.08 or 1.0)
    tidy(axes)
    axes.legend(frameon=False)
    return saved(figure, path)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Mean of each value and its neighbours, an eighth of the curve wide at most; narrower at the ends."""
    half = max(1, len(values) // 16)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def plot_iterations(
    path: str | os.PathLike, records: Sequence[IterationRecord], objective: float | None = None
) -> Figure:
    """Time of an iteration split into decoding, prompts and finetuning, along the run; below it, what that achieved.

    The run is cut into spans of time and each shows the average over it, so that thousands of iterations stay readable;
    a span in which nothing ran is left empty.

    Args:
        records: in the order of their start; times in seconds.
        objective: seconds per iteration that the scheduler aimed at; drawn as a line.
    """
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    time, rows, tokens = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    edges, bins = spans(records)
    draw_split(time, edges, bins, objective)
    draw_amount(rows, edges, [average(inside, lambda r: r.decode_slots) for inside in bins], DECODE, "decoding rows")
    per_second = [average(inside, lambda r: r.finetune_slots / r.seconds) for inside in bins]
    draw_amount(tokens, edges, per_second, FINETUNE, "finetuning\ntokens / s")
    tokens.set_xlabel("seconds since start")
    tokens.set_xlim(edges[0], edges[-1])
    figure.align_ylabels()
    return saved(figure, path)


def spans(records: Sequence[IterationRecord]) -> tuple[np.ndarray, list[Span]]:
    """Edges [n + 1] of equal spans of time, and who ran in each: an iteration counts in every span that it touches."""
    records = [record for record in records if record.seconds > 0]
    first = records[0].start if records else 0.0
    last = max((record.end for record in records), default=first + 1.0)
    count = min(MOST_BINS, max(1, len(records)))
    edges = np.linspace(first, last, count + 1)
    bins = [[] for _ in range(count)]
    for record in records:
        at = max(int(np.searchsorted(edges, record.start, side="right")) - 1, 0)
        while at < count and edges[at] < record.end:
            bins[at].append((record, min(record.end, edges[at + 1]) - max(record.start, edges[at])))
            at += 1
    return edges, bins


def average(inside: Span, value: Callable[[IterationRecord], float]) -> float:
    """Average over the time of a span that iterations filled, 0 if none did."""
    seconds = sum(share for _, share in inside)
    return sum(value(record) * share for record, share in inside) / seconds if seconds else 0.0


def draw_split(axes: Axes, edges: np.ndarray, bins: list[Span], objective: float | None) -> None:
    """Stacked milliseconds per iteration, with the slowest iteration of each span as a thin line."""
    floor = np.zeros(len(bins))
    for part, (label, colour) in enumerate((("decoding", DECODE), ("prompts", PROMPT), ("finetuning", FINETUNE))):
        ceiling = floor + [average(inside, lambda r, part=part: r.split[part] * 1e3) for inside in bins]
        axes.stairs(ceiling, edges, baseline=floor, fill=True, color=colour, label=label, linewidth=0)
        floor = ceiling
    slowest = np.array([max((r.seconds for r, _ in inside), default=np.nan) for inside in bins]) * 1e3
    axes.stairs(slowest, edges, baseline=None, color=INK, linewidth=0.6, alpha=0.55, label="slowest iteration")
    if objective is not None:
        label = f"objective, {objective * 1e3:g} ms"
        axes.axhline(objective * 1e3, color=INK, linestyle="--", linewidth=1.3, label=label)
    axes.set_ylim(0, highest(bins, objective))
    axes.set_title("Time of an iteration", loc="left")
    axes.set_ylabel("ms per iteration")
    tidy(axes)
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 5, "borderaxespad": 0.2}
    axes.legend(frameon=False, fontsize=9, handlelength=1.4, columnspacing=1.4, **above)


def highest(bins: list[Span], objective: float | None) -> float:
    """Upper end of the axis in milliseconds; a compilation or a hiccup leaves the picture, not flattens the rest."""
    seconds = list({record.index: record.seconds for inside in bins for record, _ in inside}.values())
    return max(percentile(seconds, 99) or 0.0, objective or 0.0) * 1e3 * 1.25 or 1.0


def draw_amount(axes: Axes, edges: np.ndarray, values: Sequence[float], colour: str, label: str) -> None:
    axes.stairs(values, edges, fill=True, color=colour, alpha=0.85, linewidth=0)
    axes.set_ylabel(label)
    axes.set_ylim(0, max(values, default=0.0) * 1.15 or 1.0)
    tidy(axes)


def plot_rates(path: str | os.PathLike, timeline: Mapping[str, Sequence[float]]) -> Figure:
    """Arrivals, tokens per second of inference and of finetuning, and who holds the pages, along a trace.

    Args:
        timeline: columns of `flexjax.bench.coserve_timeline.timeline`, an entry per second.
    """
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    arrivals, output, finetuning, memory = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1.4, 1.4, 1.4))
    begins = np.asarray(timeline["seconds"], float)
    edges = np.append(begins, begins[-1] + 1.0)
    draw_amount(arrivals, edges, timeline["arrivals"], PROMPT, "requests\narriving / s")
    draw_amount(output, edges, timeline["output_tokens"], DECODE, "output\ntokens / s")
    draw_amount(finetuning, edges, timeline["finetune_tokens"], FINETUNE, "finetuning\ntokens / s")
    draw_pages(memory, edges, timeline)
    arrivals.set_title("Inference and finetuning over time", loc="left")
    memory.set_xlabel("seconds since the trace began")
    memory.set_xlim(edges[0], edges[-1])
    figure.align_ylabels()
    return saved(figure, path)


def draw_pages(axes: Axes, edges: np.ndarray, timeline: Mapping[str, Sequence[float]]) -> None:
    """Stacked gigabytes of the pool by holder."""
    floor = np.zeros(len(edges) - 1)
    for kind, colour in (("requests", DECODE), ("finetuning", FINETUNE), ("free", "#e4e4e4")):
        ceiling = floor + np.asarray(timeline[f"memory_mb_{kind}"], float) / 1e3
        axes.stairs(ceiling, edges, baseline=floor, fill=True, color=colour, label=kind, linewidth=0)
        floor = ceiling
    axes.set_ylabel("pages, GB")
    axes.set_ylim(0, float(floor.max()) * 1.25 or 1.0)
    tidy(axes)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper right", borderaxespad=0.2)


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)


def saved(figure: Figure, path: str | os.PathLike) -> Figure:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=140)
    return figure
