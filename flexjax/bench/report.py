"""The report of a run: what every iteration did, what every request felt, what finetuning achieved; as JSON.

Plain numbers in, plain numbers out; it does not know the plots made of them.
Times are seconds throughout.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from flexjax.bench.percentiles import percentiles
from flexjax.engine.metrics import IterationRecord

FORMAT = 1
"""Raised whenever a field of the file changes its meaning."""


def finetune_tokens_per_second(records: Sequence[IterationRecord]) -> float:
    """Finetuning tokens through the forward step per second, from the first to the last iteration that finetuned."""
    busy = [record for record in records if record.finetunes]
    seconds = busy[-1].end - busy[0].start if busy else 0.0
    return sum(record.finetune_slots for record in busy) / seconds if seconds else 0.0


def shared_fraction(records: Iterable[IterationRecord]) -> float:
    """Share of the finetuning forward tokens that were computed in an iteration with decode rows."""
    records = list(records)
    total = sum(record.finetune_slots for record in records)
    shared = sum(record.finetune_slots for record in records if record.decode_slots)
    return shared / total if total else 0.0


def prediction_error(records: Iterable[IterationRecord]) -> float | None:
    """Mean of |predicted - real| / real over the iterations that were predicted."""
    errors = [abs(r.predicted - r.seconds) / r.seconds for r in records if r.predicted is not None and r.seconds > 0]
    return sum(errors) / len(errors) if errors else None


def iteration_summary(records: Sequence[IterationRecord]) -> dict:
    limited = [record for record in records if record.limit is not None]
    decode, prompt, finetune = (sum(record.split[part] for record in records) for part in range(3))
    return {
        "iterations": len(records),
        "elapsed_seconds": records[-1].end - records[0].start if records else 0.0,
        "decode_seconds": decode,
        "prompt_seconds": prompt,
        "finetune_seconds": finetune,
        "iteration_seconds": percentiles(record.seconds for record in records),
        "over_limit_fraction": sum(r.seconds > r.limit for r in limited) / len(limited) if limited else None,
        "prediction_error": prediction_error(records),
        "decode_tokens": sum(record.decode_slots for record in records),
        "prompt_tokens": sum(record.prompt_slots for record in records),
        "finetune_tokens": sum(record.finetune_slots for record in records),
        "finetune_tokens_per_second": finetune_tokens_per_second(records),
        "finetune_shared_fraction": shared_fraction(records),
        "backward_units": sum(record.backward_units for record in records),
        "updates": sum(record.updates for record in records),
    }


def request_summary(requests: Sequence[Mapping]) -> dict:
    """Of dicts with ``ttft``, ``tpot`` (seconds or None), ``output_tokens``, ``finish_reason``; all may be absent."""
    reasons = [request.get("finish_reason") for request in requests]
    return {
        "requests": len(requests),
        "finish_reasons": {str(reason): reasons.count(reason) for reason in sorted(set(reasons), key=str)},
        "output_tokens": sum(request.get("output_tokens") or 0 for request in requests),
        "ttft": percentiles(request.get("ttft") for request in requests),
        "tpot": percentiles(request.get("tpot") for request in requests),
    }


def loss_summary(losses: Sequence[float]) -> dict:
    """First and last loss, each the mean of up to five steps, since single steps are noisy."""
    few = min(5, len(losses))
    return {
        "steps": len(losses),
        "first": sum(losses[:few]) / few if few else None,
        "last": sum(losses[-few:]) / few if few else None,
    }


def write_report(
    path: str | os.PathLike,
    config: Mapping,
    records: Sequence[IterationRecord],
    requests: Sequence[Mapping],
    losses: Sequence[float] = (),
    validation: Sequence[tuple[int, float]] = (),
    extra: Mapping | None = None,
) -> dict:
    """Write the report as JSON and return it. A reader never finds half a file.

    Args:
        path: of the file; its folder is made if need be.
        config: what was run, any JSON values.
        requests: one dict each, see `request_summary`; every key is kept.
        losses: one per optimizer step.
        validation: (optimizer step, loss).
        extra: more entries of the report, such as other runs to compare with.
    """
    report = {
        "format": FORMAT,
        "config": dict(config),
        "summary": {
            **iteration_summary(records),
            **request_summary(requests),
            "loss": loss_summary(losses),
        },
        **(extra or {}),
        "losses": list(losses),
        "validation": [{"step": step, "loss": loss} for step, loss in validation],
        "requests": [dict(request) for request in requests],
        "iterations": columns(records),
    }
    return write_finite(path, report)


def write_finite(path: str | os.PathLike, values: dict) -> dict:
    """Write JSON, `finite`, and return it. A reader never finds half a file; its folder is made if need be."""
    path, values = Path(path), finite(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)
    return values


def columns(records: Sequence[IterationRecord]) -> dict[str, list]:
    """Field by field, which is a fifth of the size of one dict per iteration."""
    return {name: [getattr(record, name) for record in records] for name in IterationRecord._fields}


def read_records(report: Mapping) -> list[IterationRecord]:
    """The iterations of a report that was written by `write_report`."""
    iterations = report["iterations"]
    rows = zip(*iterations.values(), strict=True)
    return [IterationRecord(**dict(zip(iterations, values, strict=True))) for values in rows]


def finite(value):
    """The same JSON value with None for what JSON cannot say (NaN, infinities)."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
