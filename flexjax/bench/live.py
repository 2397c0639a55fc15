"""LiveDisplay: a run as it goes on, drawn in place on a terminal, as plain lines elsewhere. It measures nothing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH, BAR_WIDTH = 42, 42
LINE_SECONDS = 5.0
"""Between two plain lines."""

PARTS = (("decoding", "blue", "█"), ("prompts", "cyan", "▓"), ("finetuning", "yellow", "░"))


@dataclass(frozen=True)
class Snapshot:
    """What is shown; seconds throughout, None where nothing was measured yet.

    Attributes:
        elapsed: since the run began.
        phase: a few words on what goes on.
        waiting, running, done: requests.
        ttft, tpot: {"p50", "p90"} of the requests.
        objective: seconds per output token to aim at.
        step, steps: optimizer steps done and in all.
        losses: one per step done.
        tokens_per_second: finetuning tokens through the forward step.
        shares: of recent iterations, spent decoding, on prompts, on finetuning; they add up to 1, or to 0.
    """

    elapsed: float
    phase: str
    waiting: int = 0
    running: int = 0
    done: int = 0
    ttft: dict[str, float] | None = None
    tpot: dict[str, float] | None = None
    objective: float | None = None
    step: int = 0
    steps: int = 0
    losses: Sequence[float] = field(default=())
    tokens_per_second: float = 0.0
    shares: tuple[float, float, float] = (0.0, 0.0, 0.0)


class LiveDisplay:
    """A context manager; ``update`` as often as you like.

    Args:
        clock: seconds, for the pace of plain lines.
    """

    def __init__(self, console: Console, title: str, clock=time.monotonic):
        self.console, self.title, self._clock = console, title, clock
        self._live = Live(console=console, auto_refresh=False) if drawable(console) else None
        self._next_line = clock()

    def __enter__(self) -> "LiveDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, snapshot: Snapshot, last: bool = False) -> None:
        """Show a snapshot: at once on a terminal; as a line if the last one is old enough, or this is the ``last``."""
        if self._live is not None:
            self._live.update(panel(self.title, snapshot), refresh=True)
        elif last or self._clock() >= self._next_line:
            self._next_line = self._clock() + LINE_SECONDS
            self.console.print(line(snapshot), highlight=False, markup=False, soft_wrap=True)


def drawable(console: Console) -> bool:
    """Whether lines that were printed can be drawn again."""
    return console.is_terminal and not console.is_dumb_terminal


def line(snapshot: Snapshot) -> str:
    """Everything on one line of plain text."""
    s = snapshot
    shares = ", ".join(f"{name} {share:.0%}" for (name, _, _), share in zip(PARTS, s.shares, strict=True))
    loss = f", loss {s.losses[-1]:.3f}" if s.losses else ""
    parts = [
        f"[{s.elapsed:4.0f} s] {s.phase}",
        f"requests {s.running} running, {s.waiting} waiting, {s.done} done",
        f"TTFT {pair(s.ttft)}",
        f"TPOT {pair(s.tpot)}{aim(s.objective)}",
        f"finetuning step {s.step}/{s.steps}, {s.tokens_per_second:.0f} tokens/s{loss}",
        f"time: {shares}",
    ]
    return " | ".join(parts)


def panel(title: str, snapshot: Snapshot) -> Panel:
    """The same as a box of rows."""
    s = snapshot
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column()
    rows.add_row("requests", f"[bold]{s.running}[/] running   {s.waiting} waiting   [green]{s.done}[/] done")
    rows.add_row("TTFT", pair(s.ttft))
    rows.add_row("TPOT", Text(f"{pair(s.tpot)}{aim(s.objective)}", style=tone(s)))
    rows.add_row("finetuning", f"step [bold]{s.step}[/] of {s.steps}   [yellow]{s.tokens_per_second:.0f}[/] tokens/s")
    curve = Text(sparkline(s.losses, SPARKLINE_WIDTH), style="yellow")
    rows.add_row("loss", curve.append(f"  {s.losses[-1]:.3f}" if s.losses else "", style="bold"))
    rows.add_row("iterations", bar(s.shares))
    legend = Text("   ").join(
        Text(f"{name} {share:.0%}", style=colour) for (name, colour, _), share in zip(PARTS, s.shares, strict=True)
    )
    heading = f"{title} · {s.phase} · {int(s.elapsed) // 60}:{int(s.elapsed) % 60:02d}"
    return Panel(Group(rows, Text(" " * 12).append(legend)), title=heading, title_align="left", expand=False)


def pair(values: dict[str, float] | None) -> str:
    """Median and 90th percentile in milliseconds."""
    return "-" if values is None else f"p50 {values['p50'] * 1e3:.0f} ms, p90 {values['p90'] * 1e3:.0f} ms"


def aim(objective: float | None) -> str:
    return "" if objective is None else f" (objective {objective * 1e3:.0f} ms)"


def tone(snapshot: Snapshot) -> str:
    """Colour of the time per token: whether its median keeps the objective."""
    if snapshot.tpot is None or snapshot.objective is None:
        return ""
    return "green" if snapshot.tpot["p50"] <= snapshot.objective else "red"


def bar(shares: Sequence[float]) -> Text:
    """Shares of the time as lengths; cut at rounded sums, so that the lengths add up."""
    text, total, drawn = Text(), 0.0, 0
    for (_, colour, mark), share in zip(PARTS, shares, strict=True):
        total += share
        length = round(total * BAR_WIDTH) - drawn
        text.append(mark * length, style=colour)
        drawn += length
    return text


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve from 0 to the largest value in one line of text, each mark the mean of its share of the values."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * place // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    highest = max(means) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(mean / highest * len(BLOCKS)))] for mean in means)
