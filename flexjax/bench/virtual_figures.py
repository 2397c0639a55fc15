"""Figures of a virtual run: what requests felt, how fast finetuning went, how well iterations were foretold."""

from collections.abc import Sequence

from flexjax.bench.percentiles import PERCENTILES, percentile
from flexjax.bench.virtual_engine import VirtualEngine


def summary(engine: VirtualEngine, begin: float, end: float, tpot: float, ttft: float) -> dict[str, float]:
    """Figures of a finished run; rates between ``begin`` and ``end`` seconds, latencies (ms) over every request.

    Args:
        tpot, ttft: objective in seconds, for ``attainment``.
    """
    met = [each.done and each.ttft < ttft and (each.tpot or 0.0) < tpot for each in engine.asked]
    gaps = [gap for each in engine.asked for gap in each.gaps]
    tokens = sum(begin <= at < end for each in engine.asked for at in each.times)
    trained = sum(count for job in engine.jobs.values() for at, count in job.finished if begin <= at < end)
    errors = engine.scheduler.latency.errors()
    return {
        **at_percentiles("ttft_ms", [1e3 * each.ttft for each in engine.asked if each.times]),
        **at_percentiles("tpot_ms", [1e3 * each.tpot for each in engine.asked if each.tpot is not None]),
        **at_percentiles("itl_ms", [1e3 * gap for gap in gaps]),
        "max_gap_ms_p99": percentile([1e3 * max(each.gaps) for each in engine.asked if each.gaps], 99) or 0.0,
        "attainment": sum(met) / len(met) if met else 1.0,
        "output_tokens_per_s": tokens / (end - begin),
        "finetune_tokens_per_s": trained / (end - begin),
        "preemptions": engine.scheduler.statistics.preemptions,
        "prediction_error_p50": errors.p50,
        "prediction_error_p99": errors.p99,
    }


def at_percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Of nothing, zeros."""
    return {f"{name}_p{percent}": percentile(values, percent) or 0.0 for percent in PERCENTILES}
