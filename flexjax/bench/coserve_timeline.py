"""Timeline: rates and memory of a run, second by second, for its picture and its file."""

from collections.abc import Sequence

import numpy as np

from flexjax.bench.coserve_metrics import Useful
from flexjax.bench.coserve_run import Outcome

BIN = 1.0
"""Seconds."""

POOL = ("requests", "finetuning", "free", "running", "waiting")


def timeline(outcome: Outcome, page_bytes: int) -> dict[str, list[float]]:
    """Columns of equal length, one entry per second of the trace, from its beginning until the last token.

    ``seconds`` is where each second begins. ``arrivals``, ``output_tokens`` and ``finetune_tokens`` are per second; the
    last are useful tokens, spread evenly from the end of one microbatch to the end of the next. ``memory_mb_*`` are
    pages by holder and ``running`` and ``waiting`` requests, as last seen.
    """
    came = [at for felt in outcome.requests for at in felt.times]
    edges = np.arange(0.0, max([outcome.trace.seconds, *came]) + BIN, BIN)
    arrivals = [felt.due for felt in outcome.requests]
    columns = {
        "seconds": edges[:-1],
        "arrivals": np.histogram(arrivals, edges)[0] / BIN,
        "output_tokens": np.histogram(came, edges)[0] / BIN,
        "finetune_tokens": spread(outcome.useful, edges),
        **pool_columns(outcome, edges[1:], page_bytes),
    }
    return {name: np.round(values, 1).tolist() for name, values in columns.items()}


def spread(useful: Sequence[Useful], edges: np.ndarray) -> np.ndarray:
    """Useful tokens per second between edges, [edges - 1]; 0 before the first microbatch ended and after the last."""
    if not useful:
        return np.zeros(len(edges) - 1)
    done = np.cumsum([each.tokens for each in useful], dtype=float)
    return np.diff(np.interp(edges, [each.at for each in useful], done)) / BIN


def pool_columns(outcome: Outcome, times: np.ndarray, page_bytes: int) -> dict[str, np.ndarray]:
    """The last sample at or before each time, the first one before there is any."""
    seen = np.searchsorted([sample.at for sample in outcome.pool], times, side="right") - 1
    last = [outcome.pool[max(place, 0)] for place in seen]
    values = {name: np.array([getattr(sample, name) for sample in last], float) for name in POOL}
    held = {f"memory_mb_{name}": values[name] * page_bytes / 1e6 for name in POOL[:3]}
    return held | {name: values[name] for name in POOL[3:]}
