"""``flexjax bench kernels``: every kernel at real shapes, beside the ceilings of the chip and the best alternative."""

import fnmatch
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.bench.ceilings import FULL as FULL_CEILINGS
from flexjax.bench.ceilings import TINY as TINY_CEILINGS
from flexjax.bench.ceilings import Ceilings, CeilingSizes, measure_ceilings
from flexjax.bench.kernel_case import Alternative, KernelCase, as_they_are
from flexjax.bench.kernel_cases import FULL, TINY, all_cases
from flexjax.bench.kernel_metrics import kernel_metrics, metrics_of
from flexjax.bench.measurement import clock_watch, device_facts
from flexjax.bench.results import case_result, write_results
from flexjax.bench.timing import Timed, compiled, time_calls
from flexjax.fields import ConfigError


def run_kernel_bench(workloads: Path | None, out: Path, only: Sequence[str]) -> int:
    """Measure the cases whose names ``only`` picks (all if it is empty); the exit code. The results are written after
    every case, so that a run that is ended leaves what it has."""
    on_gpu = jax.default_backend() == "gpu"
    sizes, ceiling_sizes = (FULL, FULL_CEILINGS) if on_gpu else (TINY, TINY_CEILINGS)
    metric_cases = {metric.name: metric.cases for metric in metrics_of(sizes)}
    cases = chosen_cases(all_cases(sizes, workloads), only, metric_cases)
    facts, entries, metrics = device_facts(), [], {}
    implementations = {case.operation: case.chosen(on_gpu) for case in cases}
    print(f"{facts['device']}, {len(cases)} cases")
    if not on_gpu:
        print("no GPU: tiny shapes, reference implementations; the figures say nothing of a GPU")
    with clock_watch() as clock:
        ceilings = measure_ceilings(ceiling_sizes)
        print(f"copy {ceilings.copy / 1e12:.3f} TB/s, product {ceilings.product / 1e12:.1f} TFLOP/s", flush=True)
        for case in cases:
            if entry := measured(case, ceilings, on_gpu):
                entries.append(entry)
            metrics = kernel_metrics(sizes, {entry["name"]: entry for entry in entries})
            limits = ceiling_entries(ceilings, ceiling_sizes, clock.mean_mhz)
            write_results(out, facts, implementations, metrics, [*limits, *entries])
    print("\n".join([*(f"{name} = {value:.4g}" for name, value in metrics.items()), f"written: {out}"]))
    return 0 if len(entries) == len(cases) else 1


def chosen_cases(
    cases: Sequence[KernelCase], only: Sequence[str], metric_cases: Mapping[str, Sequence[str]]
) -> list[KernelCase]:
    """Those that one of ``only`` picks: the name of a metric picks its cases, anything else those whose name or
    operation begins so or matches.

    Raises:
        ConfigError: one of ``only`` picks nothing; the message lists what there is.
    """
    names = set()
    for pattern in only:
        found = metric_cases.get(pattern) or [case.name for case in cases if picked(case, pattern)]
        if not found:
            raise ConfigError(f"--only {pattern!r} names no case; there are: {'; '.join(case.name for case in cases)}")
        names.update(found)
    return [case for case in cases if not only or case.name in names]


def picked(case: KernelCase, pattern: str) -> bool:
    return any(name.startswith(pattern) or fnmatch.fnmatch(name, pattern) for name in (case.name, case.operation))


def measured(case: KernelCase, ceilings: Ceilings, on_gpu: bool) -> dict | None:
    """One case and its alternatives, all on the same data; None if it failed, which is shown."""
    implementation = case.chosen(on_gpu)
    try:
        state, arguments = jax.block_until_ready(case.prepare(implementation))
        timed = time_calls(case.call(implementation), case.calls, state, arguments, engine_options=True)
    except Exception:  # one kernel that fails must not hide the others
        print(f"FAILED {case.name} ({implementation})\n{traceback.format_exc()}")
        return None
    entry = own_entry(case, implementation, ceilings, timed)
    state = timed.state
    for name, rival in case.rivals(on_gpu).items():
        try:
            state, entry["alternatives"][name], deviation = against(rival, case.calls, state, arguments, timed.output)
        except Exception as error:  # an alternative may not take this shape; say so and go on
            entry["failures"][name] = str(error).splitlines()[0]
            continue
        if deviation is not None:
            entry["deviations"][name] = deviation
    entry["alternative_ms"] = min(entry["alternatives"].values(), default=None)
    print(line_of(entry), flush=True)
    return entry


def own_entry(case: KernelCase, implementation: str, ceilings: Ceilings, timed: Timed) -> dict:
    """Fraction: of the ceiling that binds. Deviation: largest difference from another's output, by the largest value
    of that."""
    work = (case.bytes, case.flops)
    return case_result(
        case.name,
        case.shape,
        timed.best * 1e3,
        *work,
        fraction=ceilings.least_seconds(*work) / timed.best,
        implementation=implementation,
        median_ms=timed.median * 1e3,
        bound=ceilings.bound(*work),
        fraction_of_copy=case.bytes / ceilings.copy / timed.best,
        alternatives={},
        deviations={},
        failures={},
    )


def against(rival: Alternative, calls: int, state, arguments, output) -> tuple[Any, float, float | None]:
    """The state, milliseconds of the alternative, and how far its output is from ``output`` where they compare."""
    adapted = (
        jax.block_until_ready(compiled(rival.adapt)(state, arguments)) if rival.adapt is not as_they_are else arguments
    )
    timed = time_calls(rival.call, calls, state, adapted, rival.engine_options)
    comparable = rival.comparable and jax.tree.leaves(output)
    return timed.state, timed.best * 1e3, deviation(output, timed.output) if comparable else None


def deviation(ours, theirs) -> float:
    def largest(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30)

    return max(float(each) for each in jax.tree.leaves(jax.tree.map(largest, ours, theirs)))


def line_of(entry: dict) -> str:
    rivals = ", ".join(f"{name} {ms:.4f}" for name, ms in entry["alternatives"].items())
    failed = "".join(f"; {name} cannot: {why}" for name, why in entry["failures"].items())
    deviations = entry["deviations"].values()
    worst = f" | deviation {max(deviations):.1e}" if deviations else ""
    own = f"{entry['ms']:9.4f} ms  {entry['fraction']:5.2f} of {entry['bound']:<7} {entry['implementation']:<10}"
    return f"{entry['name']:<40} {own} | {rivals}{failed}{worst}"


def ceiling_entries(ceilings: Ceilings, sizes: CeilingSizes, mean_mhz: float | None) -> list[dict]:
    """The ceilings as cases; the clock is that of the whole run."""
    copied, flops = 2 * sizes.copied_bytes, 2 * sizes.product**3
    shape = " x ".join([str(sizes.product)] * 3)
    return [
        case_result("copy", f"{sizes.copied_bytes} bytes", copied / ceilings.copy * 1e3, bytes=copied, fraction=1.0),
        case_result("product", shape, flops / ceilings.product * 1e3, flops=flops, fraction=1.0, mean_mhz=mean_mhz),
    ]
