"""The metrics of kernels: which cases each is the worst of, and what of a case it says. Results in, numbers out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flexjax.bench.kernel_cases import Sizes, modules

Results = Mapping[str, Mapping]
"""Entries of "cases" by name."""


@dataclass(frozen=True)
class Metric:
    """Attributes:
    cases: names of those that it is the worst of.
    value: (name of a case, all results) to a number, or None where something it needs was not measured.
    worst: min where more is better.
    """

    name: str
    cases: tuple[str, ...]
    value: Callable[[str, Results], float | None]
    worst: Callable[[Iterable[float]], float] = min


def kernel_metrics(sizes: Sizes, results: Results) -> dict[str, float]:
    """Every metric of which all cases were measured."""
    found = {}
    for metric in metrics_of(sizes):
        values = [metric.value(name, results) if name in results else None for name in metric.cases]
        if None not in values:
            found[metric.name] = metric.worst(values)
    return found


def metrics_of(sizes: Sizes) -> tuple[Metric, ...]:
    decode = tuple(f"decode {rows} x {context}" for rows, context in sizes.decode)
    few = tuple(f"decode {rows} x {context}" for rows, context in sizes.few_rows)
    chunks = tuple(f"chunk {tokens} of {context}" for tokens, context in sizes.chunks if tokens == context)
    context = max(context for _, context in sizes.windows)
    windows = tuple(f"window_grad {window} of {total}" for window, total in sizes.windows if total == context)
    whole = f"window_grad {context} of {context}"
    return (
        Metric("decode_attention_fraction_of_copy", decode, fraction_of_copy),
        Metric("decode_attention_few_rows_fraction_of_copy", few, fraction_of_copy),
        Metric("chunk_attention_fraction_of_cudnn", chunks, fraction_of_cudnn),
        Metric(
            "window_grad_fraction_of_cudnn_backward",
            windows,
            lambda name, results: rate_against_cudnn(results[name], results.get(whole)),
        ),
        Metric("page_write_2048_rows_us", (f"page_write {sizes.written} rows in pages",), microseconds, max),
        Metric("lora_grads_fraction_of_copy", tuple(f"lora_grads {m}" for m in modules(sizes.model)), fraction_of_copy),
    )


def fraction_of_copy(name: str, results: Results) -> float:
    """Bytes that must move once, per second, against bytes read and written per second by a copy."""
    return results[name]["fraction_of_copy"]


def fraction_of_cudnn(name: str, results: Results) -> float | None:
    """cuDNN's time on the same work divided by ours."""
    milliseconds = results[name]["alternatives"].get("cudnn")
    return milliseconds / results[name]["ms"] if milliseconds else None


def rate_against_cudnn(case: Mapping, whole: Mapping | None) -> float | None:
    """Our FLOPs per second against those of cuDNN's backward, alone, over the whole sequence."""
    milliseconds = whole["alternatives"].get("cudnn") if whole else None
    return (case["flops"] / case["ms"]) / (whole["flops"] / milliseconds) if milliseconds else None


def microseconds(name: str, results: Results) -> float:
    return results[name]["ms"] * 1e3
