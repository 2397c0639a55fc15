"""Results: the JSON file that a benchmark leaves, one form for kernels and steps."""

import os
from collections.abc import Mapping, Sequence

from flexjax.bench.report import write_finite


def case_result(
    name: str,
    shape: str,
    ms: float,
    bytes: float | None = None,
    flops: float | None = None,
    fraction: float | None = None,
    alternative_ms: float | None = None,
    **more,
) -> dict:
    """One entry of "cases".

    Args:
        shape: sizes in words, for a reader.
        ms: milliseconds of one call or step, best of the repeats.
        bytes: that must move once; flops: that must be computed.
        fraction: of the ceiling that limits the case, measured in the same run.
        alternative_ms: of the best alternative measured in the same run.
        more: what else is worth keeping, such as the median or which alternative; plain JSON values.
    """
    fields = {"name": name, "shape": shape, "ms": ms, "bytes": bytes, "flops": flops}
    return fields | {"fraction": fraction, "alternative_ms": alternative_ms, **more}


def write_results(
    path: str | os.PathLike,
    facts: Mapping,
    implementations: Mapping[str, str],
    metrics: Mapping[str, float],
    cases: Sequence[Mapping],
) -> dict:
    """Write the results and return them. A reader never finds half a file.

    Args:
        path: of the file; its folder is made if need be.
        facts: of ``measurement.device_facts``.
        implementations: which one every operation ran.
        metrics: under the names of docs/performance.md.
        cases: of `case_result`.
    """
    return write_finite(path, {**facts, "implementations": implementations, "metrics": metrics, "cases": cases})
