"""What the engine tells of a job, as events of OpenAI's API, each with a key that is the same when it is told again.

A job that resumes repeats the steps since its checkpoint, to the bit; by their keys they are kept once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

FINAL = ("succeeded", "failed", "cancelled")
STATUS_MESSAGES = {
    "queued": "The job waits for its turn",
    "running": "Fine-tuning runs",
    "paused": "Fine-tuning is paused",
}


def event_row(key: str, created: float, message: str, level: str = "info", **data: Any) -> dict[str, Any]:
    """Columns of an event; one with data is of the type "metrics"."""
    kind = "metrics" if data else "message"
    return {"key": key, "created": int(created), "message": message, "level": level, "type": kind, "data": data}


def rows_of(events: Sequence[Mapping[str, Any]], start: int, total_steps: int) -> list[dict[str, Any]]:
    """Rows of a job's events from index ``start`` on. How it ended is told by `JobBook.end`, and checkpoints by
    `JobBook.keep_checkpoint`, together with what is kept of them."""
    rows = []
    for index, event in enumerate(events[start:], start):
        if event["type"] == "status" and event["status"] not in FINAL:
            number = sum(each["type"] == "status" for each in events[:index])
            rows.append(status_row(event, number))
        elif event["type"] in TRANSLATORS:
            rows.append(TRANSLATORS[event["type"]](event, total_steps))
    return rows


def status_row(event: Mapping[str, Any], number: int) -> dict[str, Any]:
    status = event["status"]
    return event_row(f"status {number} {status}", event["time"], STATUS_MESSAGES[status])


def step_row(event: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
    step, loss = event["step"], event["loss"]
    return event_row(
        f"step {step}",
        event["time"],
        f"Step {step}/{total_steps}: training loss={loss:.4f}",
        step=step,
        total_steps=total_steps,
        train_loss=loss,
        learning_rate=event["learning_rate"],
        grad_norm=event["grad_norm"],
        tokens=event["tokens"],
    )


def evaluation_row(event: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
    step, loss = event["step"], event["loss"]
    message = f"Step {step}/{total_steps}: validation loss={loss:.4f}"
    return event_row(f"evaluation {step}", event["time"], message, step=step, valid_loss=loss)


def epoch_row(event: Mapping[str, Any], _: int) -> dict[str, Any]:
    return event_row(f"epoch {event['epoch']}", event["time"], f"Epoch {event['epoch']} is done")


def failure_row(event: Mapping[str, Any], _: int) -> dict[str, Any]:
    key = f"checkpoint failed {event['step']} {event['time']}"
    message = f"The checkpoint of step {event['step']} could not be written; the job goes on"
    return event_row(key, event["time"], message, level="warn")


TRANSLATORS = {
    "step": step_row,
    "evaluation": evaluation_row,
    "epoch": epoch_row,
    "checkpoint_failed": failure_row,
}
