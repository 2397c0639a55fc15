"""The display: what is on the screen, and how often a line is printed where there is none."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from flexjax.bench.live import BAR_WIDTH, BLOCKS, LINE_SECONDS, LiveDisplay, Snapshot, bar, line, sparkline

BEGINNING = Snapshot(elapsed=0.2, phase="starting")
MIDDLE = Snapshot(
    elapsed=75.4,
    phase="serving and finetuning",
    waiting=1,
    running=3,
    done=17,
    ttft={"p50": 0.21, "p90": 0.34},
    tpot={"p50": 0.281, "p90": 0.297},
    objective=0.3,
    step=12,
    steps=42,
    losses=(4.0, 3.0, 2.0, 1.034),
    tokens_per_second=61.4,
    shares=(0.31, 0.06, 0.63),
)


def console_of(terminal: bool) -> Console:
    environment = {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, _environ=environment)


def test_a_line_says_it_all():
    assert line(MIDDLE) == (
        "[  75 s] serving and finetuning | requests 3 running, 1 waiting, 17 done | TTFT p50 210 ms, p90 340 ms | "
        "TPOT p50 281 ms, p90 297 ms (objective 300 ms) | finetuning step 12/42, 61 tokens/s, loss 1.034 | "
        "time: decoding 31%, prompts 6%, finetuning 63%"
    )
    assert "TTFT - | TPOT - | finetuning step 0/0, 0 tokens/s | " in line(BEGINNING)


def test_lines_come_at_a_pace_and_at_the_end():
    now = 100.0
    console = console_of(terminal=False)
    with LiveDisplay(console, "model", clock=lambda: now) as display:
        for tenth in range(101):
            now = 100.0 + tenth / 10
            display.update(replace(MIDDLE, elapsed=tenth / 10))
        display.update(MIDDLE, last=True)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 10 / LINE_SECONDS + 2  # at 0, 5 and 10 s, and the last
    assert "\x1b" not in console.file.getvalue(), "control characters in plain output"
    assert lines[-1] == line(MIDDLE)


def test_a_terminal_shows_every_snapshot():
    console = console_of(terminal=True)
    with LiveDisplay(console, "model [x]") as display:
        display.update(BEGINNING)
        display.update(MIDDLE)
    shown = console.file.getvalue()
    for text in ("starting", "1:15", "17", "p50 281 ms, p90 297 ms (objective 300 ms)", "1.034", "finetuning 63%"):
        assert text in shown
    assert "\x1b[?25h" in shown, "the cursor was not given back"


def test_a_terminal_that_cannot_redraw_gets_lines():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "dumb"})
    with LiveDisplay(console, "model") as display:
        display.update(MIDDLE, last=True)
    assert console.file.getvalue() == line(MIDDLE) + "\n"


@pytest.mark.parametrize("shares", [(0.31, 0.06, 0.63), (1 / 3, 1 / 3, 1 / 3), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)])
def test_the_bar_is_full_and_in_proportion(shares):
    text = bar(shares)
    assert len(text) == BAR_WIDTH
    for mark, share in zip("█▓░", shares, strict=True):
        assert text.plain.count(mark) == pytest.approx(share * BAR_WIDTH, abs=1)
    assert len(bar((0.0, 0.0, 0.0))) == 0


def test_a_sparkline_is_as_high_as_its_values():
    assert sparkline([], 5) == ""
    assert sparkline([0.0, 0.0], 5) == BLOCKS[0] * 2
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1, 0], 9) == "█" + BLOCKS[::-1]
    assert sparkline([4.0] * 50 + [1.0] * 50, 4) == "██▃▃"
