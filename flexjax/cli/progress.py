"""What a person at the terminal is told while a command works: lines on standard error."""

import sys
from typing import Any


def show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class JobProgress:
    """Turns the events of one finetuning job into lines.

    Args:
        since: Unix seconds; events from before (of the run that this one resumes) are not shown.
    """

    def __init__(self, name: str, total_steps: int, since: float):
        self.name, self.total_steps, self.since = name, total_steps, since
        self._seen = 0
        self._last_time = since

    def new_lines(self, events: list[dict[str, Any]]) -> list[str]:
        """Lines for the events beyond those of the last call; ``events`` is the whole list."""
        new, self._seen = events[self._seen :], len(events)
        return [f"{self.name}: {self._line(event)}" for event in new if event["time"] >= self.since]

    def _line(self, event: dict[str, Any]) -> str:
        elapsed, self._last_time = event["time"] - self._last_time, event["time"]
        match event["type"]:
            case "step":
                speed = f"{event['tokens'] / elapsed:,.0f} tokens/s" if elapsed > 0 else ""
                rate = event["learning_rate"]
                return f"step {event['step']}/{self.total_steps}  loss {event['loss']:.4f}  lr {rate:.2e}  {speed}"
            case "evaluation":
                return f"step {event['step']}/{self.total_steps}  validation loss {event['loss']:.4f}"
            case "epoch":
                return f"epoch {event['epoch']} done"
            case "checkpoint":
                return f"step {event['step']}/{self.total_steps}  checkpoint {event['path']}"
            case "checkpoint_failed":
                return f"step {event['step']}/{self.total_steps}  no checkpoint: {event['error']}"
            case _:
                return str(event["status"])
